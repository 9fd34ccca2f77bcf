"""Codes and tokens as the CPU search reads them: shifted, scaled, with the columns that carry the bound.

:mod:`fastvq.cpu.search` derives what the columns mean.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.cpu.pack_bf16 import RoundedCodebook, empty_codebook, round_codes

# Scores of larger tokens might leave float32's range.
LARGEST_NORM = 2.0**60
# Codes are packed in pieces of this many values, of which there may be copies in float64 (2 MiB each).
_PIECE_VALUES = 1 << 18
# Codes per group, from so many codes for each of their coordinates on. Where codes are long beside their number,
# scoring those of the winning group again costs more than more groups do.
_GROUPS = ((512, 128), (128, 64), (0, 32))
# Largest scaled coordinate of a code: far from overflow, and codes 2^90 times smaller do not underflow.
_TOP_EXPONENT = 32


def out_of_range(values: Tensor) -> Tensor:
    """Float64 values so large or small that scaling them, or the oracle itself, could leave the range."""
    magnitudes = values.abs()
    return (magnitudes > 2.0**400) | ((magnitudes < 2.0**-400) & (magnitudes > 0))


class Frame(NamedTuple):
    """The coordinates in which tokens and codes are compared."""

    metric: str
    shift: Tensor  # [D] float64, exactly representable in float32: m
    scale: float  # a power of two: s


class PackedCodebook(NamedTuple):
    """Codes in groups of ``G``, padded with codes that cannot win; columns as in :mod:`fastvq.cpu.search`."""

    frame: Frame
    n_codes: int
    rows: Tensor  # [groups, G, D + 2] float32
    norms: Tensor  # [groups, 3] float32: largest b_k and largest h_k of a group, 1
    rounded: RoundedCodebook | None


def error_constant(dim: int) -> float:
    """``c = γ_(2D+16)``, the relative error of a score."""
    nu = (2 * dim + 16) * 2.0**-24
    return nu / (1 - nu)


def norm_room(dim: int) -> float:
    """What a float32 norm gets on top: squares of small coordinates vanish."""
    return 2.0**-62 * dim**0.5


def frame_of(codebook: Tensor, metric: str, top: float) -> Frame:
    """The frame of finite codes ``[K, D]`` whose largest magnitude is ``top``."""
    n_codes, dim = codebook.shape
    shift = torch.zeros(dim, dtype=torch.float64, device=codebook.device)
    if metric == "euclidean":
        # The median of a sample is close to the data and, unlike the mean, not moved by an outlier.
        shift = codebook[:: -(-n_codes // 9)].double().median(0).values.float().double()
        shift.nan_to_num_(posinf=0.0, neginf=0.0)  # beyond float32
        top += float(shift.abs().max())
    elif metric == "cosine":
        top = 1.0
    return Frame(metric, shift, 2.0 ** (_TOP_EXPONENT - math.frexp(top)[1]) if top > 0 else 1.0)


def pack(codebook: Tensor, frame: Frame, in_bfloat16: bool = False) -> PackedCodebook:
    """Pack finite codes ``[K, D]``, ``in_bfloat16`` as well where that is asked for."""
    n_codes, dim = codebook.shape
    group = next(size for least, size in _GROUPS if n_codes >= least * dim)
    n_groups = -(-n_codes // group)
    rows = torch.empty(n_groups, group, dim + 2, dtype=torch.float32, device=codebook.device)
    norms = torch.ones(n_groups, 3, dtype=torch.float32, device=codebook.device)
    rounded = empty_codebook(n_groups, group, dim, codebook.device) if in_bfloat16 else None
    step = max(1, _PIECE_VALUES // (group * (dim + 2)))
    for i, codes in zip(range(0, n_groups, step), codebook.split(step * group), strict=True):
        some = slice(i, i + step)
        _pack_groups(codes, frame, rows[some], norms[some])
        if rounded:
            round_codes(rows[some], i, out=rounded)
    return PackedCodebook(frame, n_codes, rows, norms, rounded)


def _pack_groups(codes: Tensor, frame: Frame, out: Tensor, largest: Tensor) -> None:
    """Fill some groups of the packed codebook, ``out [groups, G, D + 2]`` and ``largest [groups, 3]``."""
    _, group, width = out.shape
    dim = width - 2
    rows = out.view(-1, width)
    if len(codes) < len(rows):
        rows[len(codes) :] = 0
        rows[len(codes) :, dim] = -torch.inf
    filled = rows[: len(codes)]
    if frame.metric == "cosine":
        codes = codes.double()
        norms = torch.linalg.vector_norm(codes, dim=1, keepdim=True)
        codes = torch.where(norms > 0, codes / norms, 0.0)
    _scale(codes, frame, out=filled[:, :dim])
    b = torch.linalg.vector_norm(rows[:, :dim], dim=1)
    h = 0.5 * b.square() if frame.metric == "euclidean" else torch.zeros_like(b)
    b += norm_room(dim)
    filled[:, dim] = -(1 - error_constant(dim)) * h[: len(codes)]
    rows[:, dim + 1] = b
    largest[:, :2] = torch.stack([b, h], 1).view(-1, group, 2).amax(1)


def _scale(values: Tensor, frame: Frame, out: Tensor) -> None:
    """``s(v - m)`` with one rounding, or one to float64 before it where float32 does not hold the input or s."""
    in_float32 = values.dtype != torch.float64 and 2.0**-64 < frame.scale < 2.0**64
    dtype = torch.float32 if in_float32 else torch.float64
    torch.add((-frame.scale * frame.shift).to(dtype), values.to(dtype), alpha=frame.scale, out=out)


def pack_tokens(x: Tensor, frame: Frame, out: Tensor) -> Tensor:
    """Write tokens ``x [n, D]`` with their columns to ``out [n, D + 2]`` float32; NaN where one may not be compared.

    Returns:
        ``[3, n]``: what :func:`raise_lower` multiplies by the norms of a group.
    """
    dim = x.shape[1]
    c = error_constant(dim)
    if frame.metric == "euclidean":
        _scale(x, frame, out=out[:, :dim])
    else:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        largest = x.abs().amax(1, keepdim=True)
        torch.div(x, largest.masked_fill_(largest == 0, 1.0), out=out[:, :dim])
    a = torch.linalg.vector_norm(out[:, :dim], dim=1).add_(norm_room(dim))
    # A bound of NaN reaches nothing, so that the token has no candidates.
    a.masked_fill_(~(a < LARGEST_NORM), torch.nan)
    if x.dtype == torch.float64 and frame.metric != "euclidean":
        # The oracle's products of such tokens may overflow or vanish; those of what is left of them here do not.
        a.masked_fill_(out_of_range(x).any(1), torch.nan)
    out[:, dim], out[:, dim + 1] = 1.0, c * a
    slack = (dim + 16) * (2.0**-112 + 2.0**-148 * a)
    if frame.metric == "euclidean":
        slack += 4 * (dim + 4) * 2.0**-53 * a.square()
    return torch.stack([-2 * c * a, torch.full_like(a, -2 * c), -slack])


def raise_lower(lower: Tensor, maxima: Tensor, packed: PackedCodebook, to_lower: Tensor) -> None:
    """Raise ``lower [n]``, lower bounds of what the best code scores, by the largest upper bounds of groups.

    Of ``maxima [groups, n]`` less ``2c(a·b + h)`` and the slack, with the largest norms of each group, the largest.
    """
    torch.maximum(lower, torch.addmm(maxima, packed.norms, to_lower).amax(0), out=lower)
