"""Tokens per code and their sums: the input of the EMA update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from fastvq.backends.choose import choose_backend, on_device_of


def statistics(x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None) -> tuple[Tensor, Tensor]:
    """Counts and sums of ``x [N, D]`` by ``indices [N]``; -1 is left out.

    ``deterministic`` fixes the order of the float32 additions, as the CPU always does; None leaves the order to what
    is faster for the sizes.
    """
    with torch.no_grad():
        if choose_backend(x.device)[0] == "torch":
            # The CPU adds in one order, and the switch is the process's.
            needs_switch = bool(deterministic) and x.device.type != "cpu"
            with _deterministic_algorithms() if needs_switch else nullcontext():
                return _scatter_add(x, indices, n_codes)
        from fastvq_kernels.update.accumulate import code_statistics

        with on_device_of(x):
            return code_statistics(x, indices, n_codes, deterministic)


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
    # A spare last row takes the tokens without a code and whatever they hold, so that x need not be copied.
    rows = torch.where(indices < 0, n_codes, indices)
    sums = torch.zeros(n_codes + 1, x.shape[1], dtype=torch.float32, device=x.device).index_add_(0, rows, x.float())
    # Integer counts: float32 stops counting at 2^24. Not bincount, which would wait for another device than the CPU.
    counts = torch.zeros(n_codes + 1, dtype=torch.int64, device=x.device).index_add_(0, rows, torch.ones_like(rows))
    return counts[:-1].float(), sums[:-1]
