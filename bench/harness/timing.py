"""Seconds of calls in turns: the CPU by its clock, warm; a GPU by events, from a cold L2 cache, with the host ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from bench.harness.outcome import failure
from fastvq.testing.measure import settle_down

# Read before every timed call. It displaces any L2 cache, with lines that need no writing back, and keeps the device
# busy for about a millisecond, in which the host queues the call: gaps between kernels are not measured.
_FLUSH_BYTES = 3 << 30
# On a GPU: of two seconds per contender the median of fewer calls is as good.
_SLOW = 0.05
_REPEATS_SLOW = 5
# On a CPU a call is repeated for so many seconds and timed the last time: after the wait for what the others have left
# running, threads sleep and caches are empty, and to wake a thread can take a tick of the system's scheduler, 4 ms.
_WARM_UP = 0.1


class Timing(NamedTuple):
    """Seconds on the device of repeated calls, and the median seconds the host needs to queue one."""

    seconds: list[float]
    host: float

    @property
    def median(self) -> float:
        """Median of the seconds on the device."""
        return float(np.median(self.seconds))


def seconds_row(timing: Timing) -> dict[str, float | int]:
    """Columns of a row of results, in seconds: median, 20th and 80th percentile; and the number of calls."""
    low, high = np.percentile(timing.seconds, [20, 80])
    return {
        "seconds": timing.median,
        "seconds_p20": float(low),
        "seconds_p80": float(high),
        "host_seconds": timing.host,
        "calls": len(timing.seconds),
    }


class Clock:
    """Times functions of the number of the call (0, 1, ...), which pick their input by it.

    Attributes:
        errors: by name, the columns ``status`` and ``note`` of functions that raised while they were timed last.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.errors: dict[str, dict[str, str]] = {}
        self._flush = torch.ones(_FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None

    def interleaved(
        self, functions: Mapping[str, Callable[[int], object]], repeats: int, deadline: float = float("inf")
    ) -> dict[str, Timing]:
        """Time functions in turns, so that a change of the clock's rate meets all alike.

        Args:
            functions: by name. One that needs more than 50 ms of a GPU is timed 5 times only; one that raises is left
                out.
            repeats: timed calls of the others.
            deadline: reading of ``time.monotonic()`` after which no further round begins, once there are three.
        """
        self.errors = {}
        rounds = {name: self._rounds(name, function, repeats) for name, function in functions.items()}
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
        for i in range(repeats):
            if i >= 3 and time.monotonic() > deadline:
                break
            for name, function in functions.items():
                if i < rounds[name] and name not in self.errors:
                    measured[name] += self._tried(name, function, i)
        return {
            name: Timing([seconds for seconds, _ in pairs], float(np.median([host for _, host in pairs])))
            for name, pairs in measured.items()
            if pairs and name not in self.errors
        }

    def _rounds(self, name: str, function: Callable[[int], object], repeats: int) -> int:
        """How often to call a function, after a few calls to warm up."""
        for i in range(3 if self._flush is not None else 1):
            last = [] if name in self.errors else self._tried(name, function, i)
        slow = self._flush is not None and bool(last) and last[0][0] > _SLOW
        return min(repeats, _REPEATS_SLOW) if slow else repeats

    def _tried(self, name: str, function: Callable[[int], object], i: int) -> list[tuple[float, float]]:
        try:
            return [self._timed(function, i)]
        except Exception as error:  # the others are still wanted
            self.errors[name] = failure(error)
            return []

    def _timed(self, function: Callable[[int], object], i: int) -> tuple[float, float]:
        """Seconds on the device and seconds of the host for call ``i``."""
        settle_down(self.device)
        if self._flush is None:
            seconds = spent = _seconds(function, i)
            while spent < _WARM_UP:
                seconds = _seconds(function, i)
                spent += seconds
            return seconds, seconds
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.sum()
        first.record()
        start = time.perf_counter()
        function(i)
        host = time.perf_counter() - start
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3, host


def _seconds(function: Callable[[int], object], i: int) -> float:
    start = time.perf_counter()
    function(i)
    return time.perf_counter() - start
