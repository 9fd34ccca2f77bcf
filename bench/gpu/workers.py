"""Tasks side by side in processes: kernels compile on all cores, and a GPU error stays in the process that made it.

A process that dies, hangs or has a broken CUDA context is replaced; the other tasks go on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from bench.harness.child import Child
from bench.harness.outcome import describe

# Compiling all kernels of one search takes 10 to 20 seconds on a busy core.
_TASK_SECONDS = 90.0
_CUT = "cut: no time left"


class Outcome(NamedTuple):
    """The end of the task named ``key``: ``result`` is what it returned if ``error`` is empty."""

    key: Any
    result: Any
    error: str


class Workers:
    """Up to ``count`` processes, started as tasks need them. With 0, tasks run one by one in this process."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self._idle: list[Child] = []

    def run(self, tasks: Mapping[Any, Callable[[], Any]], deadline: float) -> Iterator[Outcome]:
        """Call every task and yield the outcomes as they come.

        Args:
            tasks: by names of any hashable type; what they need must be picklable. They start in this order.
            deadline: reading of ``time.monotonic()`` at which open tasks end with an error that begins with "cut".
        """
        waiting = list(tasks.items())
        busy: dict[Child, tuple[Hashable, float]] = {}
        try:
            while waiting or busy:
                if time.monotonic() >= deadline:
                    yield from (Outcome(key, None, _CUT) for key, _ in waiting)
                    waiting = []
                elif waiting and not self.count:
                    key, task = waiting.pop(0)
                    yield Outcome(key, *_attempt(task))
                while waiting and len(busy) < self.count:
                    key, task = waiting.pop(0)
                    worker = self._idle.pop() if self._idle else Child(_serve)
                    worker.connection.send(task)
                    busy[worker] = key, min(deadline, time.monotonic() + _TASK_SECONDS)
                if busy:
                    wait([worker.connection for worker in busy], timeout=0.2)
                for worker, (key, limit) in list(busy.items()):
                    if worker.connection.poll():
                        del busy[worker]
                        yield Outcome(key, *self._collect(worker))
                    elif time.monotonic() >= limit:
                        del busy[worker]
                        worker.end()
                        yield Outcome(key, None, _CUT if limit >= deadline else f"not done in {_TASK_SECONDS:g} s")
        finally:
            for worker in busy:
                worker.end()

    def _collect(self, worker: Child) -> tuple[Any, str]:
        try:
            result, error, usable = worker.receive(0)
        except ChildProcessError as death:
            result, error, usable = None, str(death), False
        if usable:
            self._idle.append(worker)
        else:
            worker.end()
        return result, error

    def end(self) -> None:
        """End the idle processes; their memory on the device is free again."""
        while self._idle:
            self._idle.pop().end()


def _serve(connection: Connection) -> None:
    """Run the tasks that come through ``connection`` until it is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # without the destructors of a CUDA context that may be broken
        result, error = _attempt(task)
        connection.send((result, error, not error or _cuda_answers()))


def _attempt(task: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return task(), ""
    except Exception as error:  # any error is a finding about this task
        return None, describe(error)


def _cuda_answers() -> bool:
    """Whether this process can go on: after an illegal access every later CUDA call fails."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
