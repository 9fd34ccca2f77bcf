"""Codes and tokens as the scans read them: shifted, scaled, with the columns that carry the bound (:mod:`bounds`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.cpu import bounds, tuning
from fastvq.cpu.pack_bf16 import CodesBF16, empty_codes, round_codes


class Frame(NamedTuple):
    """The shift and the scale in which tokens and codes are compared."""

    metric: str
    shift: Tensor  # [D] float64, exactly representable in float32: m
    scale: float  # a power of two: s


class PackedCodebook(NamedTuple):
    """Codes in groups of ``G``, padded with codes that cannot win."""

    frame: Frame
    n_codes: int
    rows: Tensor  # [groups, G, D + 2] float32
    norms: Tensor  # [groups, 3] float32: largest b_k and largest h_k of a group, 1
    rounded: CodesBF16 | None


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
    return Frame(metric, shift, 2.0 ** (bounds.TOP_EXPONENT - math.frexp(top)[1]) if top > 0 else 1.0)


def pack(codebook: Tensor, frame: Frame, in_bfloat16: bool = False) -> PackedCodebook:
    """Pack finite codes ``[K, D]``, ``in_bfloat16`` as well where asked."""
    n_codes, dim = codebook.shape
    group = next(size for least, size in tuning.GROUPS if n_codes >= least * dim)
    n_groups = -(-n_codes // group)
    rows = torch.empty(n_groups, group, dim + 2, dtype=torch.float32, device=codebook.device)
    norms = torch.ones(n_groups, 3, dtype=torch.float32, device=codebook.device)
    rounded = empty_codes(n_groups, group, dim, codebook.device) if in_bfloat16 else None
    step = max(1, tuning.PACK_VALUES // (group * (dim + 2)))
    for i, codes in zip(range(0, n_groups, step), codebook.split(step * group), strict=True):
        block = slice(i, i + step)
        _pack_groups(codes, frame, rows[block], norms[block])
        if rounded:
            round_codes(rows[block], i, out=rounded)
    return PackedCodebook(frame, n_codes, rows, norms, rounded)


def _pack_groups(codes: Tensor, frame: Frame, out: Tensor, largest: Tensor) -> None:
    """Fill groups of the packed codebook, ``out [groups, G, D + 2]`` and ``largest [groups, 3]``."""
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
    b += bounds.norm_room(dim)
    filled[:, dim] = -(1 - bounds.error_constant(dim)) * h[: len(codes)]
    rows[:, dim + 1] = b
    largest[:, :2] = torch.stack([b, h], 1).view(-1, group, 2).amax(1)


def _scale(values: Tensor, frame: Frame, out: Tensor) -> None:
    """``s(v - m)`` with one rounding, or with two where float32 does not hold the input or s."""
    in_float32 = values.dtype != torch.float64 and 2.0**-64 < frame.scale < 2.0**64
    dtype = torch.float32 if in_float32 else torch.float64
    torch.add((-frame.scale * frame.shift).to(dtype), values.to(dtype), alpha=frame.scale, out=out)


def pack_tokens(x: Tensor, frame: Frame, out: Tensor) -> Tensor:
    """Write tokens ``x [n, D]`` with their columns to ``out [n, D + 2]`` float32; NaN where scores might overflow.

    Returns:
        ``[3, n]``: the factors by which :func:`raise_threshold` multiplies the norms of a group.
    """
    dim = x.shape[1]
    c = bounds.error_constant(dim)
    if frame.metric == "euclidean":
        _scale(x, frame, out=out[:, :dim])
    else:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        largest = x.abs().amax(1, keepdim=True)
        torch.div(x, largest.masked_fill_(largest == 0, 1.0), out=out[:, :dim])
    a = torch.linalg.vector_norm(out[:, :dim], dim=1).add_(bounds.norm_room(dim))
    # A bound of NaN reaches nothing, so that the token has no candidates.
    a.masked_fill_(~(a < bounds.LARGEST_NORM), torch.nan)
    if x.dtype == torch.float64 and frame.metric != "euclidean":
        # The oracle's products of such tokens may overflow or vanish where the divided token's do not.
        a.masked_fill_(bounds.out_of_range(x).any(1), torch.nan)
    out[:, dim], out[:, dim + 1] = 1.0, c * a
    return torch.stack([-2 * c * a, torch.full_like(a, -2 * c), -bounds.slack(a, dim, frame.metric)])


def raise_threshold(threshold: Tensor, maxima: Tensor, packed: PackedCodebook, factors: Tensor) -> None:
    """Raise ``threshold [n]``, lower bounds of the best score, by the largest upper bounds of groups.

    The largest of ``maxima [groups, n]`` less ``2c(a·b + h)`` and the slack, with the largest norms of each group.
    """
    torch.maximum(threshold, torch.addmm(maxima, packed.norms, factors).amax(0), out=threshold)
