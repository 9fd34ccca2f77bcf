"""Which backend runs: one decision per call, for search, statistics and moving averages together."""

import torch

from fastvq.backends.base import Backend
from fastvq.backends.reference import REFERENCE
from fastvq.backends.torch import TORCH
from fastvq.backends.triton import TRITON
from fastvq.backends.without_float64 import on_cpu
from fastvq.common.checks import check_choice
from fastvq.common.devices import has_float64

BACKENDS = {backend.name: backend for backend in (TRITON, TORCH, REFERENCE)}


def choose(device: torch.device, name: str = "auto") -> Backend:
    """The backend called ``name`` for tensors on ``device``; ``"auto"`` takes the fastest that can run there.

    Where the device has no float64, the CPU does the work.

    Raises:
        ValueError: ``name`` is unknown, or that backend cannot run on ``device``.
    """
    if name == "auto":
        backend = TORCH if why_not_triton(device) else TRITON
    else:
        check_backend(name)
        backend = BACKENDS[name]
        if obstacle := backend.obstacle(device):
            raise ValueError(f"backend {name!r} cannot run here: {obstacle}")
    return backend if has_float64(device) else on_cpu(backend)


def why_not_triton(device: torch.device) -> str | None:
    """Why ``"auto"`` does not take the Triton kernels; None where it does."""
    if device.type == "cpu":
        return "the blocked PyTorch path is the fast one on a CPU"
    return TRITON.obstacle(device)


def check_backend(name: str) -> None:
    """Raises ValueError where there is no backend called ``name``."""
    check_choice("backend", name, ("auto", *BACKENDS))
