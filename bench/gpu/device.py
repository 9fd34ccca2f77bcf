"""What the GPU is, what its clocks do, and the two ceilings that everything else is compared with."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.problems import dtype_name
from bench.gpu.timing import Clock, seconds_row
from fastvq.info import device_name, versions

_ROOT = Path(__file__).parents[2]
_FACTS = "driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
_CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


def facts(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, date and state of the sources, for the head of a report."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "versions": versions() | {"cuda": torch.version.cuda or "none"},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "sources": _digest(),
        "interpreted": os.environ.get("TRITON_INTERPRET", "0") == "1",
        "driver": _query(_FACTS),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
        found["l2_bytes"] = getattr(properties, "L2_cache_size", None)
    return found


def _commit() -> str:
    """The commit of this checkout and whether files differ from it; "unknown" without git."""
    try:
        command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=12", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _digest() -> str:
    """SHA-256 of the package's sources, cut to 12 digits: names what was measured where there is no git."""
    digest = hashlib.sha256()
    for folder in ("fastvq", "kernels/fastvq_kernels"):
        for path in sorted((_ROOT / folder).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _query(fields: str) -> dict[str, str]:
    """Fields of `nvidia-smi --query-gpu` with their units; empty where the tool is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), (value.strip() for value in line.split(",")), strict=False))


def clocks(device: torch.device, load: Callable[[], object] | None = None, calls: int = 1) -> dict[str, str]:
    """Clocks, temperature and power of the GPU, read while ``calls`` queued calls of ``load`` run."""
    if device.type != "cuda":
        return {}
    if load is not None:
        for _ in range(calls):
            load()
    found = _query(_CLOCKS)
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
