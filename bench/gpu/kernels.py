"""Kernels of a call as PyTorch's profiler sees them, and what has been compiled for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from fastvq.testing.measure import synchronize


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
