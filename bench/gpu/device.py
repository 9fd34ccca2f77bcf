"""Clocks of the GPU, and the two ceilings that everything else is compared with."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.harness.machine import query_gpu
from bench.harness.outcome import seconds_row
from bench.harness.problems import dtype_name
from fastvq.testing.measure import Clock

_CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


def clocks(device: torch.device, load: Callable[[], object] = lambda: None, calls: int = 1) -> dict[str, str]:
    """Clocks, temperature and power of the GPU, read while ``calls`` queued calls of ``load`` run."""
    if device.type != "cuda":
        return {}
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
    copy = f"copy of {source.nbytes >> 20} MiB"
    functions: dict[str, Callable[[int], object]] = {copy: lambda _: target.copy_(source)}
    for dtype in (torch.float16, torch.bfloat16):
        functions[f"{n}×{n}×{n} {dtype_name(dtype)} product"] = _product(n, dtype, device)
    rows = []
    for name, timing in Clock(device).interleaved(functions, 2 if dry else 30).items():
        unit, work = ("tbps", 2 * source.nbytes) if name == copy else ("tflops", 2 * n**3)
        under_load = clocks(device, partial(functions[name], 0), 150)
        rows.append({"name": name, unit: work / 1e12 / timing.median, **seconds_row(timing), "clocks": under_load})
    return rows


def _product(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[int], object]:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out)
