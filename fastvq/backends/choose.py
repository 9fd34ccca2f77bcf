"""Which implementation runs, and why."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastvq import reference
from fastvq.backends.codebook_cache import KeptCodebook
from fastvq.common.precision import full_precision
from fastvq.cpu import search as cpu

BACKENDS = ("auto", "triton", "torch", "reference")
METRICS = ("euclidean", "cosine", "dot")
_AMD_CHIPS = ("gfx942", "gfx950")
# Asked once: looking through the import path takes half a millisecond. No functools.cache: torch.compile warns of it.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_backend(device: torch.device, backend: str = "auto") -> tuple[str, str]:
    """The backend that runs on ``device`` and the reason.

    Args:
        device: where the tensors are.
        backend: ``"auto"`` or a name, which is checked against the device.

    Returns:
        ``(name, reason)`` with name ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        ValueError: ``backend`` is unknown, or ``"triton"`` cannot run on ``device``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend in ("torch", "reference"):
        return backend, "asked for by name"
    if backend == "auto" and device.type == "cpu":
        return "torch", "the blocked PyTorch path is the fast one on a CPU"
    obstacle = _obstacle_to_triton(device)
    if backend == "triton":
        if obstacle:
            raise ValueError(f"backend 'triton' cannot run here: {obstacle}")
        return "triton", "asked for by name"
    if obstacle:
        return "torch", obstacle
    return "triton", f"tensors are on {device.type} and Triton {_triton_version()} is installed"


def _obstacle_to_triton(device: torch.device) -> str | None:
    if not _TRITON_INSTALLED:
        return "Triton is not installed"
    if device.type == "cpu" and not interpreting():
        return "tensors are on the CPU; set TRITON_INTERPRET=1 before Python starts to run the kernels interpreted"
    if device.type not in ("cpu", "cuda"):
        return f"Triton kernels run on CUDA and ROCm devices, tensors are on {device.type}"
    # A compiler traces the check of the arguments only; the operator asks again when it runs.
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return _obstacle_of_chip(device)
    return None


def _obstacle_of_chip(device: torch.device) -> str | None:
    """Older chips lack the shared memory, or flush the subnormal half-precision numbers that the error bounds count."""
    if torch.version.hip:
        chip = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return None if chip in _AMD_CHIPS else f"the kernels are made for {' and '.join(_AMD_CHIPS)}, this is {chip}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the kernels need compute capability 8.0, {device} has {major}.{minor}"


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def search(x: Tensor, codebook: Tensor, metric: str, backend: str, kept: KeptCodebook | None = None) -> Tensor:
    """``nearest_code`` of the chosen backend on ``[N, D]`` with ``[K, D]``, or ``[H, N, D]`` with ``[H, K, D]``.

    Neither may need a gradient. ``kept`` remembers the packed codebook of one head.
    """
    name = choose_backend(x.device, backend)[0]
    if name == "triton":
        from fastvq_kernels.search import pipeline as kernels
        from fastvq_kernels.search.pack_codes import pack_codebook

        with on_device_of(x):
            return kernels.nearest_code(x, codebook, metric, kept.keeping(pack_codebook) if kept else pack_codebook)
    with full_precision(x.device):
        if name == "torch" and kept:
            return cpu.nearest_code(x, codebook, metric, kept.keeping(cpu.prepare))
        nearest_code = cpu.nearest_code if name == "torch" else reference.nearest_code
        if x.dim() == 2:
            return nearest_code(x, codebook, metric)
        return torch.stack([nearest_code(tokens, codes, metric) for tokens, codes in zip(x, codebook, strict=True)])


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that holds ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
