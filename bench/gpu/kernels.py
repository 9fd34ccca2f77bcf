"""The kernels of a call as PyTorch's profiler sees them, and their compiled versions."""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastvq.testing.measure import synchronize


def kernels_of(function: Callable[[], object], device: torch.device) -> list[tuple[str, float]]:
    """Names and microseconds of the kernels of a call, in order of their start; on the CPU PyTorch's operators."""
    kind = device.type.upper()
    synchronize(device)
    with profile(activities=[getattr(ProfilerActivity, kind)]) as recorded:
        function()
        synchronize(device)
    events = [event for event in recorded.events() if str(event.device_type).endswith(kind)]
    if not events:
        raise RuntimeError("the profiler saw no kernel")
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def stage_seconds(function: Callable[[], object], calls: int, device: torch.device) -> dict[str, Any]:
    """``seconds`` per call by name of fastvq's kernels, with PyTorch's under ``"torch"``, and ``launches`` per call."""
    found = kernels_of(lambda: [function() for _ in range(calls)], device)
    seconds: dict[str, float] = defaultdict(float)
    for name, duration in found:
        seconds[stage_name(name)] += duration / 1e6 / calls
    return {"seconds": dict(seconds), "launches": len(found) / calls}


def stage_name(kernel: str) -> str:
    """``scan`` for ``scan_kernel``; ``torch`` for PyTorch's kernels, whose names are C++."""
    name = kernel.split("(")[0].strip()
    return name.removesuffix("_kernel") if name.endswith("_kernel") and name.isidentifier() else "torch"


def compiled_versions(kernel: Any) -> list[Any]:
    """Versions of a Triton kernel that this process has compiled or loaded, oldest first; none when interpreted."""
    caches = getattr(kernel, "device_caches", {})
    return [compiled for entry in caches.values() for compiled in entry[0].values()]


def count_compiled() -> Counter[str]:
    """Number of compiled versions of every kernel in ``fastvq_kernels``; empty when interpreted."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("fastvq_kernels.")]
    kernels = {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    names = [name for name, kernel in kernels.items() if hasattr(kernel, "device_caches")]
    return Counter({name: len(compiled_versions(kernels[name])) for name in names})
