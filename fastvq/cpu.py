"""Exact nearest-code search from plain PyTorch parts, without a ``[tokens, codes]`` matrix.

Scan, refine, settle:

1. *Scan*: a float32 matrix product writes upper bounds of the scores of one block of tokens against one
   block of codes into a buffer that stays in the cache; only the maximum of each group of codes is kept.
2. *Refine*: the groups that can still hold the winner are recomputed code by code.
3. *Settle*: where more than one code remains, the oracle's own float64 arithmetic decides; a token with
   very many candidates (duplicate codes, a collapsed codebook) goes to the oracle itself.

**Scores.** With a shift ``m`` and a power of two ``s``, tokens become ``x' = s(x - m)`` and codes
``e' = s(e - m)``. The nearest code has the largest ``S_k = x'·e'_k - h_k``, ``h_k = |e'_k|²/2``; ``|x'|²`` is the
same for all codes and never added. For the inner product and the cosine (codes of norm 1) ``m`` and ``h`` are 0
and every token has a power of two of its own, because their order does not depend on the token's length.

**Bound.** Let ``u = 2⁻²⁴`` be the unit roundoff, ``a = |x'|`` and ``b_k = |e'_k|``. Rounding ``x'``, ``e'_k``
and ``h_k`` to float32 moves the score by at most ``2u·a·b_k + u·h_k`` (first order). A float32 inner
product of n terms, in any order and with or without fused operations, errs by at most ``γ_n = nu/(1 - nu)``
times the sum of magnitudes (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1).
With ``n = D + 2`` terms and ``c = γ_(D+16)``, which leaves eleven u for the rounded norms, the two columns
below and the arithmetic on group maxima, the computed score is within ``c(a·b_k + h_k)`` of ``S_k``, up to
underflow. The bound rides in the product: tokens carry the extra columns ``(1, c·a)``, codes
``(-(1 - c)h_k, b_k)``, so that the product *is* an upper bound of ``S_k``, and subtracting
``2c(a·b_k + h_k)`` gives a lower bound.

**Slack.** The oracle rounds too. Its squared distances have a relative error of at most ``(D + 4)2⁻⁵³``, so that
the true score of its winner is below the true best by at most ``4(D + 4)2⁻⁵³(a² + b²)``. The part in ``b²`` is
covered by c, as is the whole of it for the other two metrics; the part in ``a²`` is subtracted from the lower
bound. So is the effect of float32 underflow: ``2⁻¹⁵⁰`` per rounded coordinate, times ``b < 2³³√D`` or ``a``, and
per product. Norms of tokens get ``2⁻⁶²√D`` on top, since squares of smaller coordinates vanish.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq import reference

# A 1024 x 512 float32 product (2 MiB) stays in the level-2 cache of current cores.
_TOKENS_PER_PRODUCT = 512
_CODES_PER_PRODUCT = 1024
# Tokens are refined in blocks, as many as keep the maxima of all groups within this many values (4 MiB).
_MAXIMA_PER_BLOCK = 1 << 20
_TOKENS_PER_BLOCK = 4096
# Groups are gathered and refined in pieces of this many float32 values (512 KiB), which stay in the cache too.
_GATHER_VALUES = 1 << 17
# Pairs are settled in pieces of this many float64 values (8 MiB).
_SETTLE_VALUES = 1 << 20
# A token with more candidate groups than this is cheaper in the oracle.
_MAX_GROUPS_PER_TOKEN = 8
# Largest scaled coordinate of a code: far from overflow, and codes 2^90 times smaller do not underflow.
_TOP_EXPONENT = 32


class _PackedCodebook(NamedTuple):
    """Codes in groups of ``G``, padded with codes that cannot win; columns as in the module's docstring."""

    metric: str
    shift: Tensor  # [D] float64, exactly representable in float32: m
    scale: float  # a power of two: s
    rows: Tensor  # [groups * G, D + 2] float32
    grouped: Tensor  # [groups, (D + 2) * G] float32: the same, coordinates first within a group
    norms: Tensor  # [groups, G, 2] float32: (b_k, h_k)


def nearest_code(x: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """Exactly :func:`fastvq.reference.nearest_code`, several times faster than materialising ``[N, K]``.

    Memory beyond the inputs does not depend on ``N·K``: a packed copy of the codebook and blocks of a few MiB.

    Args:
        x: tokens ``[N, D]``, any floating dtype.
        codebook: codes ``[K, D]``, any floating dtype.
        metric: ``"euclidean"``, ``"cosine"`` or ``"dot"``.

    Returns:
        int64 ``[N]``. A token with a NaN or an infinity gets -1; a code with one is never chosen.
    """
    finite = torch.isfinite(x).all(1)
    if not finite.all():
        indices = x.new_full((len(x),), -1, dtype=torch.int64)
        indices[finite] = nearest_code(x[finite], codebook, metric)
        return indices
    finite = torch.isfinite(codebook).all(1)
    if not finite.all():
        kept = finite.nonzero()[:, 0]
        if len(kept) == 0:
            return x.new_full((len(x),), -1, dtype=torch.int64)
        return kept[nearest_code(x, codebook[kept], metric)]
    if _outside_scaled_range(codebook):
        return reference.nearest_code(x, codebook, metric)

    packed = _pack(codebook, metric)
    if len(x) == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    n = max(_TOKENS_PER_PRODUCT, min(_TOKENS_PER_BLOCK, _MAXIMA_PER_BLOCK // len(packed.norms)))
    blocks = [_search_block(block, codebook, packed) for block in x.split(n)]
    return torch.cat(blocks)


def _outside_scaled_range(codebook: Tensor) -> bool:
    """Whether float64 codes are so large or small that scaling them, or the oracle itself, could leave the range."""
    if codebook.dtype != torch.float64:
        return False
    magnitudes = codebook.abs()
    smallest = magnitudes.masked_fill(magnitudes == 0, 1.0).min()
    return bool((smallest < 2.0**-400) | (magnitudes.max() > 2.0**400))


def _group_size(n_codes: int, dim: int) -> int:
    """Codes per group: small groups cost passes over the maxima, large ones cost refinement (measured)."""
    return min(64, max(8, 2 ** round(math.log2(max(1, 4 * n_codes / dim)) / 2)))


def _error_constant(dim: int) -> float:
    """``c = γ_(D+16)`` of the module's docstring."""
    nu = (dim + 16) * 2.0**-24
    return nu / (1 - nu)


def _pack(codebook: Tensor, metric: str) -> _PackedCodebook:
    n_codes, dim = codebook.shape
    codes, shift = codebook.double(), torch.zeros(dim, dtype=torch.float64, device=codebook.device)
    if metric == "euclidean":
        # The median of a sample is close to the data and, unlike the mean, not moved by an outlier.
        shift = codes[:: -(-n_codes // 512)].median(0).values.float().double()
        shift.nan_to_num_(posinf=0.0, neginf=0.0)  # beyond float32
        codes = codes - shift
    elif metric == "cosine":
        norms = reference.code_norms(codes.t())[:, None]
        codes = torch.where(norms > 0, codes / norms, 0.0)
    top = float(codes.abs().max())
    scale = 2.0 ** (_TOP_EXPONENT - math.frexp(top)[1]) if top > 0 else 1.0
    codes = codes * scale
    squares = codes.square().sum(1)
    halves = 0.5 * squares if metric == "euclidean" else torch.zeros_like(squares)

    group = _group_size(n_codes, dim)
    n_groups = -(-n_codes // group)
    rows = torch.zeros(n_groups * group, dim + 2, device=codes.device)
    rows[:n_codes, :dim] = codes
    rows[:n_codes, dim] = -(1 - _error_constant(dim)) * halves
    rows[n_codes:, dim] = -torch.inf
    rows[:n_codes, dim + 1] = squares.sqrt()
    norms = torch.zeros(n_groups * group, 2, device=codes.device)
    norms[:n_codes] = torch.stack([squares.sqrt(), halves], 1)
    grouped = rows.view(n_groups, group, dim + 2).transpose(1, 2).reshape(n_groups, -1)
    return _PackedCodebook(metric, shift, scale, rows, grouped, norms.view(n_groups, group, 2))


def _scaled_tokens(x: Tensor, packed: _PackedCodebook) -> Tensor:
    """``x'`` of the module's docstring, ``[n, D]``."""
    if packed.metric != "euclidean":
        exponents = torch.frexp(x.double().abs().amax(1, keepdim=True)).exponent
        return torch.ldexp(x.double(), -exponents)
    # One rounding either way; float32 is faster where it can hold the scale and its products.
    in_float32 = x.dtype != torch.float64 and 2.0**-64 < packed.scale < 2.0**64
    dtype = torch.float32 if in_float32 else torch.float64
    return (x.to(dtype) - packed.shift.to(dtype)) * packed.scale


def _search_block(x: Tensor, codebook: Tensor, packed: _PackedCodebook) -> Tensor:
    """Indices of one block of finite tokens ``[n, D]``."""
    dim = x.shape[1]
    c = _error_constant(dim)
    tokens = torch.ones(len(x), dim + 2, device=x.device)  # [n, D + 2]
    tokens[:, :dim] = _scaled_tokens(x, packed)
    a = torch.linalg.vector_norm(tokens[:, :dim], dim=1) + 2.0**-62 * dim**0.5
    tokens[:, dim + 1] = c * a
    slack = (dim + 16) * (2.0**-112 + 2.0**-148 * a)
    if packed.metric == "euclidean":
        slack += 4 * (dim + 4) * 2.0**-53 * a.square()
    to_lower = torch.stack([-2 * c * a, torch.full_like(a, -2 * c)], 1)  # [n, 2], multiplies (b, h)

    maxima = _scan(tokens, packed)  # [groups, n]
    lower = torch.addmm(maxima, packed.norms.amax(1), to_lower.t()).amax(0) - slack
    groups, owners = (maxima >= lower).nonzero().unbind(1)
    # Out of float32's range, or crowded because many codes are alike: the oracle settles these.
    n_groups = torch.bincount(owners, minlength=len(x))
    open_tokens = ~torch.isfinite(lower) | (n_groups > _MAX_GROUPS_PER_TOKEN)
    if open_tokens.any():
        certain = ~open_tokens[owners]
        groups, owners = groups[certain], owners[certain]

    upper = _refine(tokens, groups, owners, packed)  # [pairs, G]
    norms, factors = packed.norms.index_select(0, groups), to_lower.index_select(0, owners)
    best_lower = torch.baddbmm(upper[..., None], norms, factors[..., None]).amax((1, 2))
    lower = torch.full_like(a, -torch.inf).scatter_reduce_(0, owners, best_lower, "amax") - slack
    pairs, members = (upper >= lower.index_select(0, owners)[:, None]).nonzero().unbind(1)
    owners, candidates = owners.index_select(0, pairs), groups.index_select(0, pairs) * upper.shape[1] + members

    indices = _settle(x, codebook, owners, candidates, packed.metric)
    if open_tokens.any():
        indices[open_tokens] = reference.nearest_code(x[open_tokens], codebook, packed.metric)
    return indices


def _scan(tokens: Tensor, packed: _PackedCodebook) -> Tensor:
    """Largest upper bound of every group for every token, ``[groups, n]``."""
    n_groups, group = packed.norms.shape[:2]
    maxima = torch.empty(n_groups, len(tokens), device=tokens.device)
    buffer = torch.empty(_CODES_PER_PRODUCT * _TOKENS_PER_PRODUCT, device=tokens.device)
    step = _CODES_PER_PRODUCT // group
    for some, target in zip(tokens.split(_TOKENS_PER_PRODUCT), maxima.split(_TOKENS_PER_PRODUCT, 1), strict=True):
        for g0 in range(0, n_groups, step):
            codes = packed.rows[g0 * group : (g0 + step) * group]
            bounds = buffer[: len(codes) * len(some)].view(len(codes), len(some))
            torch.mm(codes, some.t(), out=bounds)
            torch.amax(bounds.view(-1, group, len(some)), 1, out=target[g0 : g0 + step])
    return maxima


def _refine(tokens: Tensor, groups: Tensor, owners: Tensor, packed: _PackedCodebook) -> Tensor:
    """Upper bounds of all codes of the given groups for their tokens, ``[pairs, G]``."""
    width, group = tokens.shape[1], packed.norms.shape[1]
    upper = torch.empty(len(groups), group, device=tokens.device)
    step = max(1, _GATHER_VALUES // (width * group))
    for p0 in range(0, len(groups), step):
        some = slice(p0, p0 + step)
        codes = packed.grouped.index_select(0, groups[some]).view(-1, width, group)
        torch.bmm(tokens.index_select(0, owners[some])[:, None], codes, out=upper[some, None])
    return upper


def _settle(x: Tensor, codebook: Tensor, owners: Tensor, candidates: Tensor, metric: str) -> Tensor:
    """The winner among each token's candidates, by the oracle's arithmetic where there are several."""
    indices = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    indices.scatter_(0, owners, candidates)
    several = torch.bincount(owners, minlength=len(x)).index_select(0, owners) > 1
    if several.any():
        owners, candidates = owners[several], candidates[several]
        step = max(1, _SETTLE_VALUES // x.shape[1])
        pieces = zip(owners.split(step), candidates.split(step), strict=True)
        score = torch.cat([_pair_score(x[tokens], codebook[codes], metric) for tokens, codes in pieces])
        best = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        best.scatter_reduce_(0, owners, score, "amax")
        winners = score == best[owners]
        owners, candidates = owners[winners], candidates[winners]
        indices.scatter_reduce_(0, owners, candidates, "amin", include_self=False)
    return indices


def _pair_score(tokens: Tensor, codes: Tensor, metric: str) -> Tensor:
    return reference.pair_score(reference.coordinates_first(tokens), reference.coordinates_first(codes), metric)
