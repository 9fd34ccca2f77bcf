"""The frame of a stage: a document that is on disk after every row, and a clock that says when to stop."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.harness.outcome import describe
from bench.harness.store import write_json

Item = TypeVar("Item")
Row = dict[str, Any]


@dataclass
class Stage:
    """What a stage is given, and where it leaves its rows.

    Attributes:
        name: of the stage.
        device: where it runs.
        deadline: reading of ``time.monotonic()`` after which it should begin nothing new.
        path: JSON document of this stage, replaced as a whole with every row.
        dry: tiny sizes and two repeats, for a machine without a GPU.
        quick: fewer problems.
        workers: processes that compile and check side by side; 0 for none.
    """

    name: str
    device: torch.device
    deadline: float
    path: Path
    dry: bool = False
    quick: bool = False
    workers: int = 0
    document: Row = field(default_factory=lambda: {"status": "running", "rows": [], "notes": []})

    def add(self, row: Row) -> None:
        """Keep a row and write the document."""
        self.document["rows"].append(row)
        self.write()

    def note(self, text: str) -> None:
        """Keep a remark and print it."""
        self.document["notes"].append(text)
        print(f"[{self.name}] {text}", flush=True)
        self.write()

    def write(self) -> None:
        """Write the document as it is now."""
        write_json(self.path, self.document)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @contextmanager
    def guarded(self, label: str) -> Iterator[None]:
        """An error inside becomes a row that says so, and the stage goes on."""
        try:
            yield
        except Exception as error:
            text = traceback.format_exc()
            print(f"[{self.name}] {label} FAILED\n{text}", flush=True)
            self.add({"name": label, "passed": False, "result": describe(error), "traceback": text})

    def while_time(self, items: Iterable[Item], label: Callable[[Item], str] = str) -> Iterator[Item]:
        """The items, until the time is over; what is left out is named in a note and the status becomes "cut"."""
        items = list(items)
        for i, item in enumerate(items):
            if self.left() <= 0:
                self.document["status"] = "cut"
                self.note(f"cut: no time for {', '.join(map(label, items[i:]))}")
                return
            yield item


def run_stage(stage: Stage, function: Callable[[Stage], None]) -> None:
    """Run a stage; its status becomes "ok", "cut", or "failed" with the traceback, which is printed as well."""
    start = time.monotonic()
    stage.write()
    try:
        function(stage)
    except Exception:  # the next stage still runs
        stage.document["status"] = "failed"
        stage.document["traceback"] = traceback.format_exc()
        print(f"[{stage.name}] FAILED\n{stage.document['traceback']}", flush=True)
    if stage.document["status"] == "running":
        stage.document["status"] = "ok"
    stage.document["seconds"] = time.monotonic() - start
    stage.write()
