"""Work on pieces of a tensor side by side, each thread on its own."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


def map_on_threads(function: Callable[[Tensor], _T], pieces: Sequence[Tensor]) -> list[_T]:
    """``function`` of every piece. Threads that share every small operation would wait for each other each time."""
    threads = torch.get_num_threads()
    if threads == 1 or len(pieces) == 1 or pieces[0].device.type != "cpu":
        return [function(piece) for piece in pieces]

    def without_gradient(piece: Tensor) -> _T:  # a setting of each thread
        with torch.no_grad():
            return function(piece)

    return list(_workers(os.getpid(), threads).map(without_gradient, pieces))


@functools.lru_cache(maxsize=1)
def _workers(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads whose PyTorch operations use one thread each; a fork of the process needs its own."""
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the number over when it first uses it
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="fastvq")
    for _ in range(threads):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(threads)  # the number for this thread and for those to come
    return pool
