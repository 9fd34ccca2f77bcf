"""Exact nearest-code search from plain PyTorch parts, without a ``[tokens, codes]`` matrix.

1. *Scan*: a float32 matrix product writes upper bounds of the scores of some tokens against some codes into a buffer
   of which every thread finds its part in its own cache, and only the largest bound of each group of codes is kept
   (:mod:`fastvq.cpu.scan_groups`). That names groups, nearly always one; up to 2,048 codes, seen as a table, the
   largest bounds of rows and columns name codes (:mod:`fastvq.cpu.scan_table`). Processors that multiply
   bfloat16 faster scan in it first (:mod:`fastvq.cpu.scan_bf16`), which names more groups.
2. *Rescore*, after groups: the product is made again, in float32, the codes of a group with all its tokens, and names
   codes.
3. *Settle* (:mod:`fastvq.cpu.decide`): where more than one code remains, the oracle's own float64 arithmetic decides; a
   token with very many candidates (duplicate codes, a collapsed codebook) is searched again among the distinct codes.

**Scores.** With a shift ``m`` and a power of two ``s``, tokens become ``x' = s(x - m)`` and codes
``e' = s(e - m)``. The nearest code has the largest ``S_k = x'·e'_k - h_k``, ``h_k = |e'_k|²/2``; ``|x'|²`` is the
same for all codes and never added. For the inner product and the cosine (codes of norm 1) ``m`` and ``h`` are 0
and every token is divided by its largest coordinate, because their order does not depend on the token's length.

**Bound.** Let ``u = 2⁻²⁴`` be the unit roundoff, ``a = |x'|`` and ``b_k = |e'_k|``. A float32 inner product of n
terms, in any order and with or without fused operations, errs by at most ``γ_n = nu/(1 - nu)`` times the sum of
magnitudes (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1). To first order the
rounding of ``x'`` and ``e'_k`` moves the score by ``2u·a·b_k``, the float32 norms move ``h_k`` by ``(D + 8)u·h_k``,
and the product of ``n = D + 2`` terms below errs by ``(D + 2)u(a·b_k + h_k)``. With ``c = γ_(2D+16)``, which leaves
six u for the arithmetic on maxima, the computed score is within ``c(a·b_k + h_k)`` of ``S_k``, up to underflow. The
bound rides in the product: tokens carry the extra columns ``(1, c·a)``, codes ``(-(1 - c)h_k, b_k)``, so that the
product *is* an upper bound of ``S_k``, and subtracting ``2c(a·b_k + h_k)`` gives a lower bound. From the largest
bound of a group of codes the largest norms of the group are subtracted, and the largest of these differences is below
the best score.

Few codes, or few tokens, are searched without packing (:mod:`fastvq.cpu.scan_scores`). There the computed score itself
is compared with the largest one less ``2c(a·b + h)``, a being the largest of many tokens, b and h of all codes.

**Slack.** The oracle rounds too. Its squared distances have a relative error of at most ``(D + 4)2⁻⁵³``, so that the
true score of its winner is below that of any other code by at most ``4(D + 4)2⁻⁵³(a² + b²)``, b being the larger of
both norms. The part in ``b²`` is covered by the c of the code it belongs to, as is the whole of it for the other two
metrics; the part in ``a²`` is subtracted from the lower bound. So is the effect of float32 underflow: ``2⁻¹⁵⁰`` per
rounded coordinate, times ``b < 2³³√D`` or ``a``, and per product. Norms get ``2⁻⁶²√D`` on top where they stand for a or
b, since squares of smaller coordinates vanish.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq import reference
from fastvq.cpu import scan_bf16 as coarse
from fastvq.cpu import scan_groups as groups
from fastvq.cpu import scan_scores as direct
from fastvq.cpu import scan_table as table
from fastvq.cpu.candidates import even_pieces
from fastvq.cpu.decide import settle
from fastvq.cpu.pack import Frame, PackedCodebook, frame_of, out_of_range, pack

# Codebooks are packed and searched in parts, so that memory does not grow with them: of so many codes, of more where
# they have fewer values than the second number (4 MiB), of fewer where they have more than the third (32 MiB), both in
# float32 alone.
_PART_CODES = 1 << 14
_LEAST_PART_VALUES = 1 << 20
_MOST_PART_VALUES = 1 << 23
# With more, errors might add up to the size of the scores.
_MOST_COLUMNS = 1 << 20
# Tokens are searched in blocks of so many, and so many values (8 MiB).
_TOKENS_PER_BLOCK = 8192
_VALUES_PER_BLOCK = 1 << 21
# glibc returns freed blocks to the system until a larger one has been freed: this untouched one, just under its limit
# of 32 MiB, raises that threshold. Fresh pages cost a fifth of each search.
torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


class Prepared(NamedTuple):
    """What is done with the codebook before a search, whatever the tokens."""

    metric: str
    codes: Tensor  # [K', D], as given: the finite ones
    numbers: Tensor | None  # [K'] int64, which they are, where some are not finite
    frame: Frame | None  # where there are codes, inside the range that may be scaled
    packed: PackedCodebook | None  # where it is to be kept


def prepare(codebook: Tensor, metric: str) -> Prepared:
    """Pack the finite codes of ``codebook [K, D]``, all of them at once."""
    prepared = _in_frame(codebook, metric)
    if prepared.frame is None:
        return prepared
    in_bfloat16 = coarse.pays(math.inf, prepared.codes)
    return prepared._replace(packed=pack(prepared.codes, prepared.frame, in_bfloat16))


def _in_frame(codebook: Tensor, metric: str) -> Prepared:
    codes, numbers, top = codebook, None, _largest(codebook)
    if top == math.inf:
        numbers = torch.isfinite(codebook).all(1).nonzero()[:, 0]
        codes = codebook[numbers]
        top = _largest(codes) if len(codes) else 0.0
    scalable = len(codes) > 0 and not (codes.dtype == torch.float64 and bool(out_of_range(codes).any()))
    return Prepared(metric, codes, numbers, frame_of(codes, metric, top) if scalable else None, None)


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    metric: str = "euclidean",
    prepare_once: Callable[[Tensor, str], Prepared] | None = None,
) -> Tensor:
    """Exactly :func:`fastvq.reference.nearest_code`, several times faster than materialising ``[N, K]``.

    Memory beyond a few numbers per token does not grow with N, nor with K unless the packed codebook is kept or a
    tensor is float64: a part of it, of 4 to 6 MiB from 4 to 64 dimensions (12 with one) and of at most 32, half as much
    again where it is scanned in bfloat16, some 10 MiB for a block of tokens, and 1 to 4 per thread.

    Args:
        x: tokens ``[N, D]``, any floating dtype.
        codebook: codes ``[K, D]``, any floating dtype.
        metric: ``"euclidean"``, ``"cosine"`` or ``"dot"``.
        prepare_once: what remembers the result of :func:`prepare`.

    Returns:
        int64 ``[N]``. A token with a NaN or an infinity gets -1; a code with one is never chosen.
    """
    if len(x) == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    if x.shape[1] > _MOST_COLUMNS:
        return reference.nearest_code(x, codebook, metric)
    prepare_once = prepare_once or _in_frame
    if not direct.fits(x, codebook) or coarse.pays(len(x), codebook):
        return search_packed(x, prepare_once(codebook, metric))
    indices, left = direct.search(x, codebook, metric)
    if len(left):
        indices[left] = search_packed(x[left], prepare_once(codebook, metric))
    return indices


def search_packed(x: Tensor, prepared: Prepared) -> Tensor:
    """:func:`nearest_code` of at least one token in a prepared codebook, in one part of it after the other."""
    metric, codes, numbers, frame, packed = prepared
    if len(codes) == 0:
        return x.new_full((len(x),), -1, dtype=torch.int64)
    if numbers is not None:
        indices = search_packed(x, prepared._replace(numbers=None))
        return torch.where(indices < 0, -1, numbers[indices])
    if frame is None:
        return reference.nearest_code(x, codes, metric)

    lower = torch.full((len(x),), -torch.inf, dtype=torch.float32, device=x.device)
    indices = torch.full((len(x),), -1, device=x.device)
    step = len(codes) if packed else _part_size(codes, x.dtype)
    for first in range(0, len(codes), step):
        part = codes[first : first + step]
        found = _search_part(x, part, packed or pack(part, frame, coarse.pays(len(x), part)), lower)
        if len(part) == len(codes):
            return found
        found[found >= 0] += first
        again = ((indices >= 0) & (found >= 0)).nonzero()[:, 0]
        pairs = again.repeat(2), torch.cat([indices[again], found[again]])
        indices = torch.where(found < 0, indices, found)
        if len(again):
            settle(x, codes, *pairs, metric, out=indices)
    return indices


def _part_size(codes: Tensor, dtype: torch.dtype) -> int:
    """Codes per part; all for float64, since products that overflow have no order there."""
    if torch.float64 in (codes.dtype, dtype):
        return len(codes)
    dim = codes.shape[1]
    return max(1, _LEAST_PART_VALUES // dim, min(_PART_CODES, _MOST_PART_VALUES // dim))


def _search_part(x: Tensor, codes: Tensor, packed: PackedCodebook, lower: Tensor) -> Tensor:
    """Winners among ``codes`` of tokens ``[N, D]``, -1 where none reaches ``lower [N]``, which it raises."""
    metric = packed.frame.metric
    n = even_pieces(len(x), min(_TOKENS_PER_BLOCK, _VALUES_PER_BLOCK // packed.rows.shape[2]))
    search = table.search if len(codes) <= table.MOST_CODES else groups.search
    if packed.rounded and coarse.pays(len(x), codes):
        search = partial(coarse.search, rounded=packed.rounded, fine=search)
    found = [search(some, packed, least) for some, least in zip(x.split(n), lower.split(n), strict=True)]
    indices = torch.cat([block.indices for block in found])
    owners = torch.cat([block.owners + i * n for i, block in enumerate(found)])
    if len(owners):
        settle(x, codes, owners, torch.cat([block.codes for block in found]), metric, out=indices)
    # Tokens out of float32's range have NaN as a bound, like those that are not finite.
    left = lower.isnan().nonzero()[:, 0]
    left = left[torch.isfinite(x[left]).all(1)]
    left = torch.cat([left, *(block.crowded + i * n for i, block in enumerate(found))])
    if len(left):
        indices[left] = _search_distinct(x[left], codes, packed.frame)
    return indices


def _largest(rows: Tensor) -> float:
    """Largest magnitude, infinite where there is a NaN: many times faster than ``isfinite``."""
    low, high = torch.aminmax(rows)
    top = float(torch.maximum(-low, high))
    return top if top < math.inf else math.inf


def _search_distinct(x: Tensor, codebook: Tensor, frame: Frame) -> Tensor:
    """For tokens with many candidates: codes that occur twice are searched once, else the oracle answers."""
    # Rows of different weighted sums differ, and many different sums save the sorting of rows, a third of the oracle's
    # time with few tokens and short codes.
    weights = torch.arange(1, codebook.shape[1] + 1, dtype=torch.float64, device=x.device).sqrt()
    if 2 * len(torch.unique((codebook * weights).sum(1))) > len(codebook):
        return reference.nearest_code(x, codebook, frame.metric)
    distinct, inverse = torch.unique(codebook, dim=0, return_inverse=True)
    if 2 * len(distinct) > len(codebook):
        return reference.nearest_code(x, codebook, frame.metric)
    first = torch.full((len(distinct),), len(codebook), device=x.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(codebook), device=x.device), "amin")
    first = first.sort().values
    return first[search_packed(x, Prepared(frame.metric, codebook[first], None, frame, None))]
