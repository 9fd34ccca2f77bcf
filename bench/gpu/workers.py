"""Tasks side by side in processes: one that dies, hangs or breaks its CUDA context is replaced, the others go on."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
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
        self._busy: list[Child] = []

    def run(self, tasks: Mapping[Any, Callable[[], Any]], deadline: float) -> Iterator[Outcome]:
        """Call every task and yield the outcomes as they come.

        Args:
            tasks: picklable calls by name; they start in this order.
            deadline: reading of ``time.monotonic()``; tasks not done by then have an error that begins with "cut".
        """
        if not self.count:
            for key, task in tasks.items():
                yield Outcome(key, *(_attempt(task) if time.monotonic() < deadline else (None, _CUT)))
            return
        threads = ThreadPoolExecutor(self.count)
        try:
            for done in as_completed([threads.submit(self._run, key, task, deadline) for key, task in tasks.items()]):
                yield done.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in list(self._busy):  # after an interrupt
                worker.process.kill()

    def _run(self, key: Any, task: Callable[[], Any], deadline: float) -> Outcome:
        """Run one task in an idle process or a new one."""
        start = time.monotonic()
        if start >= deadline:
            return Outcome(key, None, _CUT)
        try:
            worker = self._idle.pop()
        except IndexError:  # asking before would race with the other threads
            worker = Child(_serve)
        self._busy.append(worker)
        try:
            worker.connection.send(task)
            result, error, usable = worker.receive(min(deadline - start, _TASK_SECONDS))
        except OSError as failed:  # it has died, or is out of time
            late = isinstance(failed, TimeoutError) and time.monotonic() >= deadline
            result, error, usable = None, _CUT if late else str(failed), False
        self._busy.remove(worker)
        if usable:
            self._idle.append(worker)
        else:
            worker.end()
        return Outcome(key, result, error)

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
        # After an illegal access every later CUDA call fails.
        usable = not error or not _attempt(lambda: None)[1]
        connection.send((result, error, usable))


def _attempt(task: Callable[[], Any]) -> tuple[Any, str]:
    """Result and error of a task; unused memory of the device goes back to other processes."""
    try:
        result = task()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as error:  # any error is a finding about this task
        return None, describe(error)
    return result, ""
