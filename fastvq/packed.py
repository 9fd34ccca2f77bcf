"""The codebook as the CPU search reads it: shifted, scaled, in groups, with the columns that carry the bound.

:mod:`fastvq.cpu` derives what the columns mean.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq import reference
from fastvq.threads import map_on_threads

# Codes are packed in pieces of this many values (8 MiB): with smaller ones threads mostly wait for the interpreter
# (1,024 codes of 1,024 dimensions took 4.4 ms in pieces of 1 MiB, 1.9 so). Cosine makes float64 copies of a piece.
_PIECE_VALUES = 1 << 21
_PIECE_VALUES_COSINE = 1 << 18
# Codes per group, the smaller where a code is long beside the number of codes: then scoring the codes of the winning
# group again costs more than more groups do.
_GROUP, _SMALL_GROUP = 64, 32
_CODES_PER_COLUMN = 128
# Largest scaled coordinate of a code: far from overflow, and codes 2^90 times smaller do not underflow.
_TOP_EXPONENT = 32


class PackedCodebook(NamedTuple):
    """Codes in groups of ``G``, padded with codes that cannot win; columns as in :mod:`fastvq.cpu`."""

    metric: str
    shift: Tensor  # [D] float64, exactly representable in float32: m
    scale: float  # a power of two: s
    rows: Tensor  # [groups, G, D + 2] float32
    norms: Tensor  # [groups, 2] float32: largest b_k and largest h_k of a group


def error_constant(dim: int) -> float:
    """``c = γ_(2D+16)``, the relative error of a score."""
    nu = (2 * dim + 16) * 2.0**-24
    return nu / (1 - nu)


def pack(codebook: Tensor, metric: str, top: float) -> PackedCodebook:
    """Pack finite codes ``[K, D]`` whose largest magnitude is ``top``."""
    n_codes, dim = codebook.shape
    shift = torch.zeros(dim, dtype=torch.float64, device=codebook.device)
    if metric == "euclidean":
        # The median of a sample is close to the data and, unlike the mean, not moved by an outlier.
        shift = codebook[:: -(-n_codes // 9)].double().median(0).values.float().double()
        shift.nan_to_num_(posinf=0.0, neginf=0.0)  # beyond float32
        top += float(shift.abs().max())
    elif metric == "cosine":
        top = 1.0
    scale = 2.0 ** (_TOP_EXPONENT - math.frexp(top)[1]) if top > 0 else 1.0

    group = _GROUP if n_codes >= _CODES_PER_COLUMN * dim else _SMALL_GROUP
    n_groups = -(-n_codes // group)
    rows = torch.empty(n_groups, group, dim + 2, device=codebook.device)
    norms = torch.empty(n_groups, 2, device=codebook.device)
    packed = PackedCodebook(metric, shift, scale, rows, norms)
    values = _PIECE_VALUES_COSINE if metric == "cosine" else _PIECE_VALUES
    step = max(1, values // (group * (dim + 2)))
    pieces = torch.arange(n_groups, device="cpu").split(step)
    map_on_threads(lambda groups: _pack_groups(codebook, packed, int(groups[0]), int(groups[-1]) + 1), pieces)
    return packed


def _pack_groups(codebook: Tensor, packed: PackedCodebook, g0: int, g1: int) -> None:
    """Fill groups ``g0`` to ``g1`` of the packed codebook."""
    _, group, width = packed.rows.shape
    dim = width - 2
    codes = codebook[g0 * group : g1 * group]
    rows = packed.rows[g0:g1].view(-1, width)
    if len(codes) < len(rows):
        rows[len(codes) :] = 0
        rows[len(codes) :, dim] = -torch.inf
    filled = rows[: len(codes)]
    if packed.metric == "cosine":
        codes = codes.double()
        norms = reference.code_norms(codes.t())[:, None]
        codes = torch.where(norms > 0, codes / norms, 0.0)
    _scale(codes, packed, out=filled[:, :dim])
    b = torch.linalg.vector_norm(rows[:, :dim], dim=1)
    h = 0.5 * b.square() if packed.metric == "euclidean" else torch.zeros_like(b)
    b += 2.0**-62 * dim**0.5
    filled[:, dim] = -(1 - error_constant(dim)) * h[: len(codes)]
    rows[:, dim + 1] = b
    packed.norms[g0:g1] = torch.stack([b, h], 1).view(-1, group, 2).amax(1)


def _scale(values: Tensor, packed: PackedCodebook, out: Tensor) -> None:
    """``s(v - m)`` with one rounding, or one to float64 before it where float32 does not hold the input or s."""
    in_float32 = values.dtype != torch.float64 and 2.0**-64 < packed.scale < 2.0**64
    dtype = torch.float32 if in_float32 else torch.float64
    torch.add((-packed.scale * packed.shift).to(dtype), values.to(dtype), alpha=packed.scale, out=out)


def scale_tokens(x: Tensor, packed: PackedCodebook, out: Tensor) -> None:
    """Write ``x'`` of tokens ``x [n, D]`` to ``out [n, D]`` float32."""
    if packed.metric == "euclidean":
        _scale(x, packed, out)
    else:
        exponents = torch.frexp(x.double().abs().amax(1, keepdim=True)).exponent
        out.copy_(torch.ldexp(x.double(), -exponents))
