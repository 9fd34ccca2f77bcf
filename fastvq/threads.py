"""Work on pieces of a tensor side by side, each thread on its own."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


class _Team(NamedTuple):
    """Threads whose own operations use one thread each: one that leads, and those that work on pieces."""

    leader: ThreadPoolExecutor
    workers: ThreadPoolExecutor
    size: int


# In the leader, the team that it leads.
_leading = threading.local()


def lead(function: Callable[[], _T]) -> _T:
    """``function()`` on a thread of its own, where operations use one thread and :func:`map_on_threads` uses all.

    The threads of PyTorch's own parallel operations go on spinning for a while after each, in the way of the pieces.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return function()
    team = _team(os.getpid(), threads)

    def run() -> _T:
        _leading.team = team
        return _without_gradient(function)

    return team.leader.submit(run).result()


def team_size() -> int:
    """How many pieces :func:`map_on_threads` works on at a time."""
    team: _Team | None = getattr(_leading, "team", None)
    return team.size if team else 1


def map_on_threads(function: Callable[[Tensor], _T], pieces: Sequence[Tensor]) -> list[_T]:
    """``function`` of every piece. Threads that share every small operation would wait for each other each time."""
    if team_size() == 1 or len(pieces) == 1 or pieces[0].device.type != "cpu":
        return [function(piece) for piece in pieces]
    return list(_leading.team.workers.map(lambda piece: _without_gradient(lambda: function(piece)), pieces))


def _without_gradient(function: Callable[[], _T]) -> _T:
    with torch.no_grad():  # a setting of each thread
        return function()


@functools.lru_cache(maxsize=1)
def _team(process: int, threads: int) -> _Team:
    """The team of this process; a fork of the process needs its own."""
    started = threading.Barrier(threads + 2)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the number over when it first uses it
        started.wait()

    leader = ThreadPoolExecutor(1, thread_name_prefix="fastvq")
    workers = ThreadPoolExecutor(threads, thread_name_prefix="fastvq")
    leader.submit(start)
    for _ in range(threads):
        workers.submit(start)
    started.wait()
    torch.set_num_threads(threads)  # the number for this thread and for those to come
    return _Team(leader, workers, threads)
