"""Exact nearest-code search from plain PyTorch parts, without a ``[tokens, codes]`` matrix.

Scan, refine, settle, each thread on a block of tokens of its own:

1. *Scan*: a float32 matrix product writes upper bounds of the scores of one block of tokens against one
   block of codes into a buffer that stays in the cache; only the maximum of each group of codes is kept.
2. *Refine*: the groups that can still hold the winner are recomputed code by code.
3. *Settle*: where more than one code remains, the oracle's own float64 arithmetic decides; a token with
   very many candidates (duplicate codes, a collapsed codebook) is searched again among the distinct codes.

**Scores.** With a shift ``m`` and a power of two ``s``, tokens become ``x' = s(x - m)`` and codes
``e' = s(e - m)``. The nearest code has the largest ``S_k = x'·e'_k - h_k``, ``h_k = |e'_k|²/2``; ``|x'|²`` is the
same for all codes and never added. For the inner product and the cosine (codes of norm 1) ``m`` and ``h`` are 0
and every token has a power of two of its own, because their order does not depend on the token's length.

**Bound.** Let ``u = 2⁻²⁴`` be the unit roundoff, ``a = |x'|`` and ``b_k = |e'_k|``. A float32 inner product of n
terms, in any order and with or without fused operations, errs by at most ``γ_n = nu/(1 - nu)`` times the sum of
magnitudes (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1). To first order the
rounding of ``x'`` and ``e'_k`` moves the score by ``2u·a·b_k``, the float32 norms move ``h_k`` by ``(D + 8)u·h_k``,
and the product of ``n = D + 2`` terms below errs by ``(D + 2)u(a·b_k + h_k)``. With ``c = γ_(2D+16)``, which leaves
six u for the arithmetic on group maxima, the computed score is within ``c(a·b_k + h_k)`` of ``S_k``, up to
underflow. The bound rides in the product: tokens carry the extra columns ``(1, c·a)``, codes
``(-(1 - c)h_k, b_k)``, so that the product *is* an upper bound of ``S_k``, and subtracting ``2c(a·b_k + h_k)`` gives
a lower bound. From the largest bound of a group the largest norms of the group are subtracted.

**Slack.** The oracle rounds too. Its squared distances have a relative error of at most ``(D + 4)2⁻⁵³``, so that
the true score of its winner is below the true best by at most ``4(D + 4)2⁻⁵³(a² + b²)``. The part in ``b²`` is
covered by c, as is the whole of it for the other two metrics; the part in ``a²`` is subtracted from the lower
bound. So is the effect of float32 underflow: ``2⁻¹⁵⁰`` per rounded coordinate, times ``b < 2³³√D`` or ``a``, and
per product. Norms get ``2⁻⁶²√D`` on top where they stand for a or b, since squares of smaller coordinates vanish.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvq import reference
from fastvq.packed import PackedCodebook, error_constant, pack, scale_tokens
from fastvq.threads import map_on_threads

# A product of 512 x 512 float32 values (1 MiB) stays in the level-2 cache of one core (2 MiB: half the speed).
_TOKENS_PER_PRODUCT = 512
_CODES_PER_PRODUCT = 512
# Tokens are searched in blocks, as many as keep the maxima of all groups within this many values (2 MiB).
_MAXIMA_PER_BLOCK = 1 << 19
_TOKENS_PER_BLOCK = 4096
# Groups are gathered and refined in pieces of this many values (512 KiB), which stay in the cache too.
_GATHER_VALUES = 1 << 17
# Pairs are settled in pieces of this many float64 values (8 MiB).
_SETTLE_VALUES = 1 << 20
# A token whose candidate groups hold more codes than this is cheaper among distinct codes, or in the oracle (measured
# on patches of photographs, where many codes of a clear sky are nearly alike).
_MAX_REFINED_CODES = 768
# And so is one that keeps more codes than this after refinement; it bounds the memory of what is settled.
_MAX_SETTLED_CODES = 64
# Packing the codebook costs as much as the distances of this many tokens, computed one by one.
_FEW_TOKENS = 4


def nearest_code(x: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """Exactly :func:`fastvq.reference.nearest_code`, several times faster than materialising ``[N, K]``.

    Memory beyond the inputs does not depend on ``N·K``: two packed copies of the codebook and a few MiB per thread.

    Args:
        x: tokens ``[N, D]``, any floating dtype.
        codebook: codes ``[K, D]``, any floating dtype.
        metric: ``"euclidean"``, ``"cosine"`` or ``"dot"``.

    Returns:
        int64 ``[N]``. A token with a NaN or an infinity gets -1; a code with one is never chosen.
    """
    if len(x) == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    if len(x) <= _FEW_TOKENS and metric == "euclidean" and torch.float64 not in (x.dtype, codebook.dtype):
        indices = _search_few(x, codebook)
        if indices is not None:
            return indices
    if _largest(x) == math.inf:
        finite = torch.isfinite(x).all(1)
        indices = x.new_full((len(x),), -1, dtype=torch.int64)
        indices[finite] = nearest_code(x[finite], codebook, metric)
        return indices
    top = _largest(codebook)
    if top == math.inf:
        kept = torch.isfinite(codebook).all(1).nonzero()[:, 0]
        if len(kept) == 0:
            return x.new_full((len(x),), -1, dtype=torch.int64)
        return kept[nearest_code(x, codebook[kept], metric)]
    if _outside_scaled_range(codebook):
        return reference.nearest_code(x, codebook, metric)

    packed = pack(codebook, metric, top)
    n = _block_size(len(x), len(packed.norms))
    blocks = map_on_threads(lambda some: _search_block(some, packed), x.split(n))
    owners = torch.cat([block[0] + i * n for i, block in enumerate(blocks)])
    indices = _settle(x, codebook, owners, torch.cat([block[1] for block in blocks]), metric)
    is_open = torch.cat([block[2] for block in blocks])
    if is_open.any():
        indices[is_open] = _search_distinct(x[is_open], codebook, metric)
    return indices


def _largest(rows: Tensor) -> float:
    """Largest magnitude, infinite where there is a NaN: many times faster than ``isfinite``."""
    low, high = torch.aminmax(rows)
    top = float(torch.maximum(-low, high))
    return top if top < math.inf else math.inf


def _search_few(x: Tensor, codebook: Tensor) -> Tensor | None:
    """Without packing: a float32 distance from differences has a relative error below ``γ_(2D+16)``.

    None where a token, a code or a square may leave float32's range. Squares that vanish change a distance by less
    than ``2⁻⁷⁰√D``.
    """
    dim = x.shape[1]
    distances = torch.cdist(x.float(), codebook.float(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.amin(1, keepdim=True)
    if not (nearest < 2.0**60).all():
        return None
    limit = nearest * (1 + 4 * error_constant(dim)) + 2.0**-70 * dim**0.5
    owners, candidates = (distances <= limit).nonzero().unbind(1)
    return _settle(x, codebook, owners, candidates, "euclidean")


def _search_distinct(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """For tokens with many candidates: codes that occur twice are searched once, else the oracle answers."""
    distinct, inverse = torch.unique(codebook, dim=0, return_inverse=True)
    if 2 * len(distinct) > len(codebook):
        return torch.cat(map_on_threads(lambda some: reference.nearest_code(some, codebook, metric), x.split(256)))
    first = torch.full((len(distinct),), len(codebook), device=x.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(codebook), device=x.device), "amin")
    first = first.sort().values
    return first[nearest_code(x, codebook[first], metric)]


def _block_size(n_tokens: int, n_groups: int) -> int:
    """Tokens per block: even blocks, as many as there are threads or a multiple of it."""
    most = max(_TOKENS_PER_PRODUCT, min(_TOKENS_PER_BLOCK, _MAXIMA_PER_BLOCK // n_groups))
    threads = torch.get_num_threads()
    blocks = -(-n_tokens // most)
    if n_tokens > _TOKENS_PER_PRODUCT:
        blocks = -(-blocks // threads) * threads
    return -(-n_tokens // blocks)


def _outside_scaled_range(codebook: Tensor) -> bool:
    """Whether float64 codes are so large or small that scaling them, or the oracle itself, could leave the range."""
    if codebook.dtype != torch.float64:
        return False
    magnitudes = codebook.abs()
    smallest = magnitudes.masked_fill(magnitudes == 0, 1.0).min()
    return bool((smallest < 2.0**-400) | (magnitudes.max() > 2.0**400))


def _search_block(x: Tensor, packed: PackedCodebook) -> tuple[Tensor, Tensor, Tensor]:
    """Scan and refine one block of finite tokens ``[n, D]``.

    Returns the pairs that can win, as rows of ``x`` and codes, and which tokens ``[n]`` are left open.
    """
    n, dim = x.shape
    c = error_constant(dim)
    tokens = torch.empty(n, dim + 2, device=x.device)
    scale_tokens(x, packed, out=tokens[:, :dim])
    a = torch.linalg.vector_norm(tokens[:, :dim], dim=1) + 2.0**-62 * dim**0.5
    tokens[:, dim], tokens[:, dim + 1] = 1.0, c * a
    slack = (dim + 16) * (2.0**-112 + 2.0**-148 * a)
    if packed.metric == "euclidean":
        slack += 4 * (dim + 4) * 2.0**-53 * a.square()

    maxima = _scan(tokens.t(), packed)  # [groups, n]
    to_lower = torch.stack([-2 * c * a, torch.full_like(a, -2 * c)])  # [2, n], multiplies (b, h)
    lower = torch.addmm(maxima, packed.norms, to_lower).amax(0) - slack
    groups, owners = (maxima >= lower).nonzero().unbind(1)
    # Out of float32's range, or crowded because many codes are alike.
    most = _MAX_REFINED_CODES // packed.columns.shape[2]
    is_open = ~torch.isfinite(lower) | (torch.bincount(owners, minlength=n) > most)
    if is_open.any():
        certain = ~is_open[owners]
        groups, owners = groups[certain], owners[certain]

    upper = _refine(tokens, groups, owners, packed)  # [pairs, G]
    to_lower = packed.norms.index_select(0, groups) * to_lower.index_select(1, owners).t()
    best = upper.amax(1) + to_lower.sum(1)
    lower = torch.full_like(a, -torch.inf).scatter_reduce_(0, owners, best, "amax") - slack
    reaches = upper >= lower.index_select(0, owners)[:, None]
    n_codes = torch.zeros(n, dtype=torch.int64, device=x.device).index_add_(0, owners, reaches.sum(1))
    is_open |= n_codes > _MAX_SETTLED_CODES
    reaches &= ~is_open.index_select(0, owners)[:, None]
    pairs, members = reaches.nonzero().unbind(1)
    candidates = groups.index_select(0, pairs) * upper.shape[1] + members
    return owners.index_select(0, pairs), candidates, is_open


def _scan(tokens: Tensor, packed: PackedCodebook) -> Tensor:
    """Largest upper bound of every group for every token ``[D + 2, n]``: ``[groups, n]``."""
    n_groups, group, width = packed.rows.shape
    maxima = torch.empty(n_groups, tokens.shape[1], device=tokens.device)
    n = min(_TOKENS_PER_PRODUCT, tokens.shape[1])
    step = max(1, _CODES_PER_PRODUCT * _TOKENS_PER_PRODUCT // (group * n))  # groups per product
    buffer = torch.empty(step * group * n, device=tokens.device)
    for some, target in zip(tokens.split(n, 1), maxima.split(n, 1), strict=True):
        for g0 in range(0, n_groups, step):
            codes = packed.rows[g0 : g0 + step].view(-1, width)
            bounds = buffer[: len(codes) * some.shape[1]].view(len(codes), -1)
            torch.mm(codes, some, out=bounds)
            torch.amax(bounds.view(-1, group, some.shape[1]), 1, out=target[g0 : g0 + step])
    return maxima


def _refine(tokens: Tensor, groups: Tensor, owners: Tensor, packed: PackedCodebook) -> Tensor:
    """Upper bounds of all codes of the given groups for their tokens, ``[pairs, G]``."""
    _, width, group = packed.columns.shape
    upper = torch.empty(len(groups), group, device=tokens.device)
    step = max(1, _GATHER_VALUES // (width * group))
    # Reused, because memory fresh from the system costs more than the copy.
    buffer = torch.empty(min(step, len(groups)), width, group, device=tokens.device)
    for g, o, target in zip(groups.split(step), owners.split(step), upper.split(step), strict=True):
        codes = torch.index_select(packed.columns, 0, g, out=buffer[: len(g)])
        torch.bmm(tokens.index_select(0, o)[:, None], codes, out=target[:, None])
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
    """:func:`fastvq.reference.pair_score` of rows. A running sum adds in ascending order, in one call on the CPU."""
    tokens, codes = tokens.double(), codes.double()
    if tokens.device.type != "cpu":
        return reference.pair_score(tokens.t().contiguous(), codes.t().contiguous(), metric)
    terms = (tokens - codes).square_() if metric == "euclidean" else tokens * codes
    score = terms.cumsum(1)[:, -1]
    if metric == "cosine":
        norm = codes.square().cumsum(1)[:, -1].sqrt()
        return torch.where(norm > 0, score / norm, 0.0)
    return -score if metric == "euclidean" else score
