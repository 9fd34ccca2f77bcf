"""Codes and tokens as the scans read them: shifted, scaled, with the columns that carry the bound (:mod:`bounds`).

Both are packed in float32, or in float64 for what float32 leaves open; for a first scan in bfloat16 the packed rows are
rounded once more.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.cpu import bounds, tuning
from fastvq.cpu.bounds import UP_BF16


class Frame(NamedTuple):
    """The shift and the scale in which tokens and codes are compared."""

    metric: str
    shift: Tensor  # [D] float64, exactly representable in float32: m
    scale: float  # a power of two: s


class CodesBF16(NamedTuple):
    """Packed codes in bfloat16."""

    rows: Tensor  # [groups, G, D + 4]
    ratio: Tensor  # [] float32: ρ


class PackedCodebook(NamedTuple):
    """Codes in groups of ``G``, padded with codes that cannot win."""

    frame: Frame
    n_codes: int
    rows: Tensor  # [groups, G, D + 2] float32 or float64
    norms: Tensor  # [groups, 3]: largest b_k and largest h_k of a group, 1
    numbers: Tensor | None  # [K] int64: of the codes where they are sorted by length
    rounded: CodesBF16 | None


def frame_of(codebook: Tensor, metric: str, top: float) -> Frame:
    """The frame of finite codes ``[K, D]`` whose largest magnitude is ``top``."""
    n_codes, dim = codebook.shape
    shift = torch.zeros(dim, dtype=torch.float64, device=codebook.device)
    if metric == "euclidean":
        # The median of short codes is close to the data and, unlike the mean, not moved by long or zero codes.
        sample = codebook[:: -(-n_codes // tuning.SHIFT_SAMPLE)].double()
        norms = torch.linalg.vector_norm(sample, dim=1)
        norms.masked_fill_(norms == 0, torch.inf)
        shortest = norms.topk(min(9, len(sample)), largest=False).indices
        shift = sample[shortest].median(0).values.float().double()
        shift.nan_to_num_(posinf=0.0, neginf=0.0)  # beyond float32
        top += float(shift.abs().max())
    elif metric == "cosine":
        top = 1.0
    return Frame(metric, shift, 2.0 ** (bounds.TOP_EXPONENT - math.frexp(top)[1]) if top > 0 else 1.0)


def pack(
    codebook: Tensor, frame: Frame, dtype: torch.dtype = torch.float32, in_bfloat16: bool = False
) -> PackedCodebook:
    """Pack finite codes ``[K, D]`` in ``dtype``, float32 or float64; ``in_bfloat16`` as well where asked."""
    n_codes, dim = codebook.shape
    group = next(size for least, size in tuning.GROUPS if n_codes >= least * dim)
    n_groups = -(-n_codes // group)
    rows = torch.empty(n_groups * group, dim + 2, dtype=dtype, device=codebook.device)
    size = max(1, tuning.PACK_VALUES // (dim + 2))
    for codes, out in zip(codebook.split(size), rows[:n_codes].split(size), strict=True):
        _pack_codes(codes, frame, out)
    lengths, numbers = rows[:n_codes, dim + 1], None
    if lengths.amax() > tuning.LONG_CODE * lengths.kthvalue(-(-n_codes // tuning.SHORT_CODES)).values:
        # A long code loosens the bound of its group: long codes get groups of their own.
        numbers = lengths.argsort()
        rows[:n_codes] = rows[numbers]
    rows[n_codes:] = 0
    rows[n_codes:, dim] = -torch.inf
    rows[n_codes:, dim + 1] = bounds.norm_room(dim)
    largest = rows[:, dim + 1].view(-1, group).amax(1)
    h = 0.5 * largest.square() if frame.metric == "euclidean" else torch.zeros_like(largest)
    norms = torch.stack([largest, h, torch.ones_like(h)], 1)
    rows = rows.view(n_groups, group, dim + 2)
    return PackedCodebook(frame, n_codes, rows, norms, numbers, round_codes(rows) if in_bfloat16 else None)


def _pack_codes(codes: Tensor, frame: Frame, out: Tensor) -> None:
    """Write ``codes [n, D]`` with their columns to ``out [n, D + 2]``."""
    dim = codes.shape[1]
    if frame.metric == "cosine":
        codes = codes.double()
        norms = torch.linalg.vector_norm(codes, dim=1, keepdim=True)
        codes = torch.where(norms > 0, codes / norms, 0.0)
    _scale(codes, frame, out=out[:, :dim])
    b = torch.linalg.vector_norm(out[:, :dim], dim=1)
    c = bounds.error_constant(dim, out.dtype)
    out[:, dim] = b.square().mul_((c - 1) / 2) if frame.metric == "euclidean" else 0
    out[:, dim + 1] = b + bounds.norm_room(dim)


def _scale(values: Tensor, frame: Frame, out: Tensor) -> None:
    """``s(v - m)`` with one rounding, or with two where float32 does not hold the input or s."""
    in_float32 = values.dtype != torch.float64 and out.dtype == torch.float32 and 2.0**-64 < frame.scale < 2.0**64
    dtype = torch.float32 if in_float32 else torch.float64
    torch.add((-frame.scale * frame.shift).to(dtype), values.to(dtype), alpha=frame.scale, out=out)


def pack_tokens(x: Tensor, frame: Frame, out: Tensor) -> Tensor:
    """Write tokens ``x [n, D]`` with their columns to ``out [n, D + 2]``; NaN where scores might overflow.

    Returns:
        ``[3, n]``: the factors by which :func:`raise_threshold` multiplies the norms of a group.
    """
    dim = x.shape[1]
    c = bounds.error_constant(dim, out.dtype)
    if frame.metric == "euclidean":
        _scale(x, frame, out=out[:, :dim])
    else:
        x = x.to(torch.promote_types(x.dtype, out.dtype))
        largest = x.abs().amax(1, keepdim=True)
        torch.div(x, largest.masked_fill_(largest == 0, 1.0), out=out[:, :dim])
    a = torch.linalg.vector_norm(out[:, :dim], dim=1).add_(bounds.norm_room(dim))
    # A bound of NaN reaches nothing, so that the token has no candidates.
    a.masked_fill_(~(a < bounds.LARGEST_NORM[out.dtype]), torch.nan)
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


class TokensBF16(NamedTuple):
    """Packed tokens in bfloat16."""

    rows: Tensor  # [n, D + 4]
    factors: Tensor  # [3, n] float32: factors of the norms of a group, as of packed tokens
    threshold: Tensor  # [n] float32: lower bounds of the best score as shifted; not negative


def round_codes(rows: Tensor) -> CodesBF16:
    """Round packed codes ``[groups, G, D + 2]`` float32."""
    dim = rows.shape[2] - 2
    rounded = rows.new_empty(*rows.shape[:2], dim + 4, dtype=torch.bfloat16)
    ratio = rows.new_zeros(())
    size = max(1, tuning.PACK_VALUES // (rows.shape[1] * (dim + 2)))
    for codes, out in zip(rows.split(size), rounded.split(size), strict=True):
        out[:, :, :dim] = codes[:, :, :dim]
        residuals = torch.linalg.vector_norm(codes[:, :, :dim] - out[:, :, :dim], dim=2)
        bias, b = codes[:, :, dim], codes[:, :, dim + 1]
        out[:, :, dim : dim + 2] = torch.stack(_two_terms(bias), 2)
        out[:, :, dim + 2] = b * UP_BF16
        out[:, :, dim + 3] = 1
        ratio = torch.maximum(ratio, (residuals / b).amax() * UP_BF16)
    return CodesBF16(rounded, ratio)


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
