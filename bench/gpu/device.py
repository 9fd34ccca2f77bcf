"""What the clocks of the GPU do, and the two ceilings that everything else is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.harness.machine import query_gpu
from bench.harness.outcome import seconds_row
from bench.harness.problems import dtype_name
from fastvq.testing.measure import Clock

_CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


def clocks(device: torch.device, load: Callable[[], object] | None = None, calls: int = 1) -> dict[str, str]:
    """Clocks, temperature and power of the GPU, read while ``calls`` queued calls of ``load`` run."""
    if device.type != "cuda":
        return {}
    if load is not None:
        for _ in range(calls):
            load()
    found = query_gpu(_CLOCKS)
    torch.cuda.synchronize(device)
    return found


def ceilings(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Matrix products in TFLOP/s and a copy in TB/s (bytes read plus bytes written), on random data."""
    n, elements = (64, 1 << 12) if dry else (8192, 1 << 30)  # the copy is of 4 GiB
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    functions: dict[str, Callable[[int], object]] = {
        f"copy of {source.nbytes >> 20} MiB": lambda _: target.copy_(source)
    }
    rates = {f"copy of {source.nbytes >> 20} MiB": ("tbps", 2 * source.nbytes / 1e12)}
    for dtype in (torch.float16, torch.bfloat16):
        name = f"{n}×{n}×{n} {dtype_name(dtype)} product"
        functions[name] = _product(n, dtype, device)
        rates[name] = ("tflops", 2 * n**3 / 1e12)
    timings = Clock(device).interleaved(functions, 2 if dry else 30)
    rows = []
    for name, timing in timings.items():
        unit, work = rates[name]
        under_load = clocks(device, lambda load=functions[name]: load(0), 150)  # type: ignore[misc]
        rows.append({"name": name, unit: work / timing.median, **seconds_row(timing), "clocks": under_load})
    return rows


def _product(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[int], object]:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out)
