"""Tokens per code and their sums by PyTorch's own operators: the input of the moving averages."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from fastvq.common.token_sums import TokenSums
from fastvq.cpu import tuning


@torch.no_grad()
def code_statistics(x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None) -> tuple[Tensor, Tensor]:
    """Counts ``[K]`` int64 and sums ``[K, D]`` float64 of ``x [N, D]`` by ``indices [N]``; -1 is left out."""
    if x.device.type == "cpu":  # which always adds in ascending order
        late = TokenSums(x, indices, n_codes)
        return late.counts(), late.all()
    with _deterministic_algorithms() if deterministic else nullcontext():
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
    # A spare last row takes the tokens without a code, NaN included. bincount would wait for a GPU.
    rows = torch.where(indices < 0, n_codes, indices)
    counts = torch.zeros(n_codes + 1, dtype=torch.int64, device=x.device).index_add_(0, rows, torch.ones_like(rows))
    sums = torch.zeros(n_codes + 1, x.shape[1], dtype=torch.float64, device=x.device)
    size = max(1, tuning.STATISTICS_VALUES // x.shape[1])
    for tokens, block in zip(x.split(size), rows.split(size), strict=True):
        sums.index_add_(0, block, tokens.double())
    return counts[:-1], sums[:-1]
