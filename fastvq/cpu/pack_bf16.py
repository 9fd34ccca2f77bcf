"""Packed codes and tokens once more in bfloat16, with the columns that carry the bound of such products.

**Bound.** In the terms of :mod:`fastvq.cpu.search`: tokens ``x'`` and codes ``e'_k`` are rounded to bfloat16. Their
residuals have norms ``r`` and ``r_k ≤ ρ b_k``, which are measured, and move a score by at most ``r b_k + (a + r)
r_k``. A product with float32 sums is then within ``p b_k + c h_k`` of ``S_k``, with ``p = r + ρ(a + r) + ca``. It
carries its bound: tokens have the columns ``(1, 1, p)``, codes ``-(1 - c)h_k`` in two parts and ``b_k``, each rounded
up. The three terms more than in float32 are covered by the six u of c that its maxima need. Processors take subnormal
operands and products for 0; the slack has room for that.

**Shift.** The sums are rounded to bfloat16 as well, which costs little near 0. So tokens have a column ``t`` more, and
codes have 1 there. With ``t ≥ -lower``, for a lower bound of the best score, the products of codes that can win are
small and not negative.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Relative error of one rounding to bfloat16, and a factor that makes up for two.
UNIT = 2.0**-8
_UP = 1 + 2.0**-6


class RoundedCodebook(NamedTuple):
    """Packed codes in bfloat16."""

    rows: Tensor  # [groups, G, D + 4]
    ratio: Tensor  # [] float32: ρ


class RoundedTokens(NamedTuple):
    """Packed tokens in bfloat16."""

    rows: Tensor  # [n, D + 4]
    to_lower: Tensor  # [3, n] float32: what the norms of a group are multiplied by, as of packed tokens
    lower: Tensor  # [n] float32: lower bounds of the best score as shifted; not negative


def empty_codebook(n_groups: int, group: int, dim: int, device: torch.device) -> RoundedCodebook:
    """For :func:`round_codes` to fill."""
    rows = torch.empty(n_groups, group, dim + 4, dtype=torch.bfloat16, device=device)
    return RoundedCodebook(rows, torch.zeros((), dtype=torch.float32, device=device))


def round_codes(rows: Tensor, first: int, out: RoundedCodebook) -> None:
    """Round packed codes ``[groups, G, D + 2]`` float32, which are those of the groups from ``first`` on."""
    dim = rows.shape[2] - 2
    rounded = out.rows[first : first + len(rows)]
    rounded[:, :, :dim] = rows[:, :, :dim]
    residuals = torch.linalg.vector_norm(rows[:, :, :dim] - rounded[:, :, :dim], dim=2)
    bias, b = rows[:, :, dim], rows[:, :, dim + 1]
    rounded[:, :, dim : dim + 2] = torch.stack(_two_parts(bias), 2)
    rounded[:, :, dim + 2] = b * _UP
    rounded[:, :, dim + 3] = 1
    torch.maximum(out.ratio, (residuals / b).amax() * _UP, out=out.ratio)


def round_tokens(rows: Tensor, to_lower: Tensor, lower: Tensor, ratio: Tensor, c: float) -> RoundedTokens:
    """Round packed tokens ``[n, D + 2]`` float32, of which ``lower [n]`` are lower bounds of the best score."""
    n, dim = rows.shape[0], rows.shape[1] - 2
    rounded = torch.empty(n, dim + 4, dtype=torch.bfloat16, device=rows.device)
    rounded[:, :dim] = rows[:, :dim]
    ca = rows[:, dim + 1]
    a, tiny = ca / c, 2.0**-61 * dim**0.5
    r = torch.linalg.vector_norm(rounded[:, :dim].float().sub_(rows[:, :dim]), dim=1) + tiny
    p = ((r + ratio * (a + r) + ca) * _UP).bfloat16()
    # Errors of the product that come from the shift, and subnormal numbers: operands, and squares of residuals.
    slack = 2 * c * lower.abs() - to_lower[2] * 2.0**23 + tiny * a
    t = _up(2 * slack - lower)
    rounded[:, dim : dim + 2] = 1
    rounded[:, dim + 2], rounded[:, dim + 3] = p, t
    to_lower = torch.stack([-2 * _UP * p.float(), torch.full_like(a, -2 * c - 2.0**-13), -slack])
    return RoundedTokens(rounded, to_lower, lower + t - slack)


def _up(values: Tensor) -> Tensor:
    """bfloat16 numbers that are at least the values, and larger by less than 2^-6 of them."""
    return (values + values.abs() * (2 * UNIT)).bfloat16()


def _two_parts(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 numbers that add up to at least the value, and to more by less than 2^-14 of it."""
    high = values.bfloat16()
    left = values - high
    left = torch.where(left.isfinite(), left, 0)
    return high, _up(left)
