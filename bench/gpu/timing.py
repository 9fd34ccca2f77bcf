"""Seconds of GPU work: calls in turns, from a cold L2 cache, with the host ahead of the device."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.workers import describe
from fastvq.measure import synchronize

# Read before every timed call. It displaces any L2 cache, with lines that need no writing back, and keeps the device
# busy for about a millisecond, in which the host queues the call: gaps between kernels are not measured.
_FLUSH_BYTES = 3 << 30
# Of two seconds per contender the median of fewer calls is as good.
_SLOW = 0.05
_REPEATS_SLOW = 5


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
        errors: by name, of the functions that raised while they were timed last.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.errors: dict[str, str] = {}
        self._flush = torch.ones(_FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None

    def interleaved(
        self, functions: Mapping[str, Callable[[int], object]], repeats: int, deadline: float = float("inf")
    ) -> dict[str, Timing]:
        """Time functions in turns, so that a change of the clock's rate meets all alike.

        Args:
            functions: by name. One that needs more than 50 ms is timed 5 times only; one that raises is left out.
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
        slow = bool(last) and last[0][0] > _SLOW
        return min(repeats, _REPEATS_SLOW) if slow else repeats

    def _tried(self, name: str, function: Callable[[int], object], i: int) -> list[tuple[float, float]]:
        try:
            return [self._timed(function, i)]
        except Exception as error:  # the others are still wanted
            self.errors[name] = describe(error)
            return []

    def _timed(self, function: Callable[[int], object], i: int) -> tuple[float, float]:
        """Seconds on the device and seconds of the host for call ``i``."""
        synchronize(self.device)
        if self._flush is None:
            start = time.perf_counter()
            function(i)
            seconds = time.perf_counter() - start
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


class Kernel(NamedTuple):
    """One kernel, copy or fill that ran on the device; start and duration in microseconds."""

    name: str
    start: float
    duration: float


def kernels_of(function: Callable[[], object], device: torch.device) -> list[Kernel]:
    """What ``function`` runs on the device, in the order of the start; on the CPU PyTorch's operators.

    Raises:
        RuntimeError: the profiler saw nothing.
    """
    cuda = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        function()
        synchronize(device)
    found = [
        Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in recorded.events()
        if str(event.device_type).endswith("CUDA" if cuda else "CPU")
    ]
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return sorted(found, key=lambda kernel: kernel.start)


def stage_seconds(function: Callable[[], object], calls: int, device: torch.device) -> dict[str, Any]:
    """Seconds per call on the device of each of fastvq's kernels, and of everything PyTorch runs around them.

    Returns:
        ``seconds`` by kernel name and under ``"torch"``, and ``launches`` per call.
    """

    def repeated() -> None:
        for _ in range(calls):
            function()

    found = kernels_of(repeated, device)
    seconds: dict[str, float] = {}
    for kernel in found:
        name = stage_name(kernel.name)
        seconds[name] = seconds.get(name, 0.0) + kernel.duration / 1e6 / calls
    return {"seconds": seconds, "launches": len(found) / calls}


def stage_name(kernel: str) -> str:
    """``scan`` of ``scan_kernel``; ``torch`` for kernels that are not fastvq's, whose names are C++."""
    name = kernel.split("(")[0].strip()
    return name.removesuffix("_kernel") if name.endswith("_kernel") and name.isidentifier() else "torch"


def compiled_versions(kernel: Any) -> list[Any]:
    """What this process has compiled or loaded of a Triton kernel, the oldest first; nothing when interpreted."""
    caches = getattr(kernel, "device_caches", {})
    return [compiled for entry in caches.values() for compiled in entry[0].values()]


def count_compiled() -> dict[str, int]:
    """Compiled versions of every kernel in ``fastvq_kernels``, by name; empty when interpreted."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("fastvq_kernels.")]
    kernels = {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    return {name: len(compiled_versions(value)) for name, value in kernels.items() if hasattr(value, "device_caches")}
