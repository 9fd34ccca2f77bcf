"""What every stage shares: a document that is published after every row, a clock, workers, and a deadline."""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

from bench.gpu.workers import Outcome, Workers
from bench.harness.outcome import describe
from bench.harness.store import Row
from fastvq.testing.measure import Clock

Item = TypeVar("Item")


@dataclass
class Stage:
    """One stage of a run, and its document of status, rows and notes."""

    name: str
    device: torch.device
    deadline: float  # reading of ``time.monotonic()`` after which it begins nothing new
    publish: Callable[[Row], object]  # called with the document after every change
    dry: bool = False  # tiny sizes and two repeats, for a machine without a GPU
    quick: bool = False  # fewer problems
    workers: Workers = field(default_factory=Workers)
    document: Row = field(default_factory=lambda: {"status": "running", "rows": [], "notes": []})

    @cached_property
    def clock(self) -> Clock:
        """The clock of the device, made at its first use: on a GPU it takes memory."""
        return Clock(self.device)

    def add(self, *rows: Row) -> None:
        """Keep rows."""
        self.document["rows"] += rows
        self.publish(self.document)

    def note(self, text: str) -> None:
        """Keep a remark and print it."""
        self.document["notes"].append(text)
        print(f"[{self.name}] {text}", flush=True)
        self.publish(self.document)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @contextmanager
    def guarded(self, label: str) -> Iterator[None]:
        """Turn an error inside into a row that says so; the stage goes on."""
        try:
            yield
        except Exception as error:
            text = traceback.format_exc()
            print(f"[{self.name}] {label} FAILED\n{text}", flush=True)
            self.add({"name": label, "passed": False, "result": describe(error), "traceback": text})

    def while_time(self, items: Sequence[Item], label: Callable[[Item], str] = str) -> Iterator[Item]:
        """Yield items until the deadline. A note names the items that are left, and the status becomes "cut"."""
        for i, item in enumerate(items):
            if self.left() <= 0:
                self.document["status"] = "cut"
                self.note(f"cut: no time for {', '.join(map(label, items[i:]))}")
                return
            yield item

    def outcomes(self, tasks: Mapping[Any, Callable[[], Any]]) -> Iterator[Outcome]:
        """Run tasks on the workers until the deadline; a task without time makes the status "cut"."""
        for outcome in self.workers.run(tasks, self.deadline):
            if outcome.error.startswith("cut"):
                self.document["status"] = "cut"
            yield outcome

    def run(self, function: Callable[["Stage"], None]) -> None:
        """Run the stage; its status becomes "ok", "cut", or "failed" with the traceback, which is also printed."""
        start = time.monotonic()
        self.publish(self.document)
        try:
            function(self)
        except Exception:  # the next stage still runs
            self.document |= {"status": "failed", "traceback": traceback.format_exc()}
            print(f"[{self.name}] FAILED\n{self.document['traceback']}", flush=True)
        finally:
            self.workers.end()
        if self.document["status"] == "running":
            self.document["status"] = "ok"
        self.document["seconds"] = time.monotonic() - start
        self.publish(self.document)
