"""Packed codes and tokens once more in bfloat16, with the columns that carry the bound (:mod:`bounds`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.cpu import bounds
from fastvq.cpu.bounds import UP_BF16


class CodesBF16(NamedTuple):
    """Packed codes in bfloat16."""

    rows: Tensor  # [groups, G, D + 4]
    ratio: Tensor  # [] float32: ρ


class TokensBF16(NamedTuple):
    """Packed tokens in bfloat16."""

    rows: Tensor  # [n, D + 4]
    factors: Tensor  # [3, n] float32: factors of the norms of a group, as of packed tokens
    threshold: Tensor  # [n] float32: lower bounds of the best score as shifted; not negative


def empty_codes(n_groups: int, group: int, dim: int, device: torch.device) -> CodesBF16:
    """For :func:`round_codes` to fill."""
    rows = torch.empty(n_groups, group, dim + 4, dtype=torch.bfloat16, device=device)
    return CodesBF16(rows, torch.zeros((), dtype=torch.float32, device=device))


def round_codes(rows: Tensor, first: int, out: CodesBF16) -> None:
    """Round packed codes ``[groups, G, D + 2]`` float32, the groups from ``first`` on."""
    dim = rows.shape[2] - 2
    rounded = out.rows[first : first + len(rows)]
    rounded[:, :, :dim] = rows[:, :, :dim]
    residuals = torch.linalg.vector_norm(rows[:, :, :dim] - rounded[:, :, :dim], dim=2)
    bias, b = rows[:, :, dim], rows[:, :, dim + 1]
    rounded[:, :, dim : dim + 2] = torch.stack(_two_terms(bias), 2)
    rounded[:, :, dim + 2] = b * UP_BF16
    rounded[:, :, dim + 3] = 1
    torch.maximum(out.ratio, (residuals / b).amax() * UP_BF16, out=out.ratio)


def round_tokens(rows: Tensor, factors: Tensor, threshold: Tensor, ratio: Tensor) -> TokensBF16:
    """Round packed tokens ``[n, D + 2]`` float32 with their ``factors [3, n]`` and ``threshold [n]``."""
    n, dim = rows.shape[0], rows.shape[1] - 2
    c = bounds.error_constant(dim)
    rounded = torch.empty(n, dim + 4, dtype=torch.bfloat16, device=rows.device)
    rounded[:, :dim] = rows[:, :dim]
    ca = rows[:, dim + 1]
    a = ca / c
    r = torch.linalg.vector_norm(rounded[:, :dim].float().sub_(rows[:, :dim]), dim=1) + 2 * bounds.norm_room(dim)
    p = ((r + ratio * (a + r) + ca) * UP_BF16).bfloat16()
    slack = bounds.slack_bf16(-factors[2], a, threshold, dim)
    t = _up(2 * slack - threshold)
    rounded[:, dim : dim + 2] = 1
    rounded[:, dim + 2], rounded[:, dim + 3] = p, t
    factors = torch.stack([-2 * UP_BF16 * p.float(), torch.full_like(a, -2 * c - bounds.TWO_TERMS), -slack])
    return TokensBF16(rounded, factors, threshold + t - slack)


def _up(values: Tensor) -> Tensor:
    """bfloat16 numbers that are at least the values, and larger by less than 2^-6 of them."""
    return (values + values.abs() * (2 * bounds.UNIT_BF16)).bfloat16()


def _two_terms(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 numbers whose sum is at least the value, and larger by less than 2^-14 of it."""
    high = values.bfloat16()
    rest = values - high
    return high, _up(torch.where(rest.isfinite(), rest, 0))
