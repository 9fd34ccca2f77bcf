"""What was measured, and where: machine, versions, date and sources, for the head of every result."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastvq.testing.machine import device_name, versions

_ROOT = Path(__file__).parents[2]
# Share of the available memory that this process may take.
_USABLE = 0.9
# Distributions that contenders call.
_RIVALS = ("faiss-cpu", "faiss-gpu", "scikit-learn", "vector-quantize-pytorch", "pykeops", "flash-kmeans")


def facts(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, date and state of the sources, for the head of a report."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host_memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "versions": versions() | {"cuda": torch.version.cuda or "none"} | _rivals(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(_ROOT), "describe", "--always", "--abbrev=12", "--dirty") or "unknown",
        "sources": _digest(),
        "interpreted": os.environ.get("TRITON_INTERPRET", "0") == "1",
        "driver": query_gpu("driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
        found["l2_bytes"] = getattr(properties, "L2_cache_size", None)
    return found


def identity(head: dict[str, Any]) -> str:
    """Twelve digits that change with the machine, a version, the commit or a source file, but not with the date."""
    lasting = {name: value for name, value in head.items() if name != "date"}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()[:12]


def memory_field(path: str, name: str) -> int:
    """Bytes of a field of ``/proc/meminfo`` or ``/proc/self/status``; raises OSError or StopIteration without it."""
    lines = Path(path).read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def available_memory() -> int:
    """Bytes that processes can still take without swapping, as Linux estimates them; elsewhere the free ones."""
    try:
        return memory_field("/proc/meminfo", "MemAvailable")
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def limit_memory() -> None:
    """From here on an allocation beyond the available memory fails instead of ending this process."""
    with contextlib.suppress(ImportError, OSError, StopIteration, ValueError):  # not Linux
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = memory_field("/proc/self/status", "VmData") + int(_USABLE * available_memory())
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _rivals() -> dict[str, str]:
    found = {}
    for distribution in _RIVALS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[distribution] = importlib.metadata.version(distribution)
    return found


def _digest() -> str:
    """SHA-256 of the package's sources, cut to 12 digits: names what was measured where there is no git."""
    digest = hashlib.sha256()
    for folder in ("fastvq", "kernels/fastvq_kernels"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def query_gpu(fields: str) -> dict[str, str]:
    """Fields of `nvidia-smi --query-gpu` with their units; empty if the tool is missing or fails."""
    line = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
    return dict(zip(fields.split(","), map(str.strip, line.split(",")), strict=False)) if line else {}


def _output(*command: str) -> str:
    """What a command prints; empty if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
