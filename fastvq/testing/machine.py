"""This machine: its device, the name of its processor, and the versions of the software."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

import fastvq
from fastvq.cpu.matmul import bfloat16_units

DEVICES = ("auto", "cpu", "cuda")


def pick_device(name: str) -> torch.device:
    """The device of an option ``--device``: ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU where there is one.

    Raises:
        ValueError: the name is unknown, or there is no GPU.
    """
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("device cuda was asked for, but PyTorch finds no GPU here")
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def device_name(device: torch.device) -> str:
    """The model of a GPU; of the CPU the model, if the system tells it, vector units, and the threads PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    units = bfloat16_units() or torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_model()} ({units}), {n} thread{'s' if n > 1 else ''}"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip() not in ("", "unknown"):
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of fastvq, of what it stands on, and of Python; ``"not installed"`` where something is missing."""
    found = {"fastvq": fastvq.__version__}
    for distribution in ("torch", "triton", "numpy"):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = "not installed"
    found["torch"] = str(torch.__version__)  # with the build, which the distribution's version may lack
    return {**found, "python": platform.python_version()}
