"""Processes that run tasks side by side: kernels compile on all cores, and an error of the GPU stays where it is.

A process whose CUDA context is broken, that dies or that hangs is replaced, and the other tasks go on.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, NamedTuple

import torch

from bench.harness.outcome import describe

# A task: compiling all kernels of one search takes 10 to 20 seconds on a busy core.
_TASK_SECONDS = 90.0


class Outcome(NamedTuple):
    """What became of one task: ``error`` is empty where ``result`` is what the function returned."""

    task: Any
    result: Any
    error: str


class Workers:
    """Up to ``count`` processes, started as tasks need them; with 0 the tasks run in this process, one by one."""

    def __init__(self, count: int, task_seconds: float = _TASK_SECONDS) -> None:
        self.count = count
        self.task_seconds = task_seconds
        self._idle: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._idle:
            worker.end()
        self._idle.clear()

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any], deadline: float) -> Iterator[Outcome]:
        """Call ``function`` with every task and give the outcomes as they come.

        Args:
            function: importable from a module, as are the types of tasks and results.
            tasks: started in this order.
            deadline: reading of ``time.monotonic()`` after which unfinished tasks end with an error that says so.
        """
        if not self.count:
            for task in tasks:
                yield _run_here(function, task) if time.monotonic() < deadline else Outcome(task, None, _CUT)
            return
        waiting = list(tasks)
        busy: dict[Connection, tuple[_Worker, Any, float]] = {}
        try:
            while waiting or busy:
                late = time.monotonic() >= deadline
                while waiting and (late or len(busy) < self.count):
                    task = waiting.pop(0)
                    if late:
                        yield Outcome(task, None, _CUT)
                        continue
                    worker = self._idle.pop() if self._idle else _Worker()
                    worker.connection.send((function, task))
                    limit = min(deadline, time.monotonic() + self.task_seconds)
                    busy[worker.connection] = worker, task, limit
                for ready in wait(list(busy), timeout=0.2):
                    worker, task, _ = busy.pop(ready)  # type: ignore[call-overload]
                    yield self._collect(worker, task)
                for connection, (worker, task, limit) in list(busy.items()):
                    if time.monotonic() >= limit:
                        del busy[connection]
                        worker.end()
                        yield Outcome(task, None, _CUT if limit >= deadline else f"not done in {self.task_seconds:g} s")
        finally:
            for worker, _, _ in busy.values():
                worker.end()

    def _collect(self, worker: _Worker, task: Any) -> Outcome:
        try:
            result, error, usable = worker.connection.recv()
        except EOFError:
            worker.process.join(5)
            return Outcome(task, None, f"its process ended with exit code {worker.process.exitcode}")
        if usable:
            self._idle.append(worker)
        else:
            worker.end()
        return Outcome(task, result, error)


_CUT = "cut: no time left"


class _Worker:
    """A process and the connection to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        self.process.kill()
        self.connection.close()


def _serve(connection: Connection) -> None:
    """Run what comes through ``connection`` until it is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            function, task = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # without the destructors of a CUDA context that may be broken
        outcome = _run_here(function, task)
        connection.send((outcome.result, outcome.error, not outcome.error or _cuda_answers()))


def _run_here(function: Callable[[Any], Any], task: Any) -> Outcome:
    try:
        return Outcome(task, function(task), "")
    except Exception as error:  # whatever it is, it is a finding about this task
        return Outcome(task, None, describe(error))


def _cuda_answers() -> bool:
    """Whether this process can go on: after an illegal access every later CUDA call fails."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
