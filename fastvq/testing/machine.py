"""The machine that runs this: its device, its processor, and the versions of its software."""

import importlib.metadata
import platform
from contextlib import suppress
from pathlib import Path

import torch

import fastvq
from fastvq.cpu.matmul import bfloat16_units


def pick_device(name: str) -> torch.device:
    """The device named ``"cpu"`` or ``"cuda"``; ``"auto"`` takes a GPU if there is one.

    Raises:
        ValueError: the name is unknown, or there is no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be one of auto, cpu, cuda, got {name!r}")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("device cuda was asked for, but PyTorch finds no GPU here")
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def device_name(device: torch.device) -> str:
    """The model of a GPU; for a CPU its model if known, its vector units, and PyTorch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    units = bfloat16_units() or torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_model()} ({units}), {n} thread{'s' if n > 1 else ''}"


def _cpu_model() -> str:
    with suppress(OSError):  # only Linux has this file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = map(str.strip, line.partition(":"))
            if key == "model name" and value not in ("", "unknown"):
                return value
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of fastvq, PyTorch, Triton, NumPy and Python; ``"not installed"`` for a missing package."""
    # PyTorch's own version names the build; the version of its distribution may lack it.
    found = {"fastvq": fastvq.__version__, "torch": str(torch.__version__)}
    for distribution in ("triton", "numpy"):
        found[distribution] = "not installed"
        with suppress(importlib.metadata.PackageNotFoundError):
            found[distribution] = importlib.metadata.version(distribution)
    return {**found, "python": platform.python_version()}
