"""Tokens per code and their sums by PyTorch's own operators: the input of the moving averages."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor


@torch.no_grad()
def code_statistics(x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None) -> tuple[Tensor, Tensor]:
    """Counts ``[K]`` and sums ``[K, D]``, float32, of ``x [N, D]`` by ``indices [N]``; -1 is left out."""
    # A CPU always adds in ascending order and needs no switch of the process.
    needs_switch = bool(deterministic) and x.device.type != "cpu"
    with _deterministic_algorithms() if needs_switch else nullcontext():
        return _scatter_add(x, indices, n_codes)


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=before[1])
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _scatter_add(x: Tensor, indices: Tensor, n_codes: int) -> tuple[Tensor, Tensor]:
    if x.device.type == "cpu" and (not len(indices) or indices.amin() >= 0):
        sums = torch.zeros(n_codes, x.shape[1], dtype=torch.float32, device=x.device).index_add_(0, indices, x.float())
        return torch.bincount(indices, minlength=n_codes).float(), sums
    # A spare last row takes the tokens without a code, NaN included, so that x need not be copied.
    rows = torch.where(indices < 0, n_codes, indices)
    sums = torch.zeros(n_codes + 1, x.shape[1], dtype=torch.float32, device=x.device).index_add_(0, rows, x.float())
    # Integer counts: float32 stops counting at 2^24. bincount would wait for a GPU.
    counts = torch.zeros(n_codes + 1, dtype=torch.int64, device=x.device).index_add_(0, rows, torch.ones_like(rows))
    return counts[:-1].float(), sums[:-1]
