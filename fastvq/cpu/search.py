"""Exact nearest-code search from plain PyTorch parts, without a ``[tokens, codes]`` matrix.

1. *Scan*: a matrix product writes upper bounds of the scores of a block of tokens and codes into a buffer sized so that
   each thread's slice stays in its cache. Only the largest bound of each group of codes is kept, which names groups,
   nearly always one (:mod:`scan_groups`). Up to 2,048 codes, seen as a table, the largest bounds of rows and columns
   name codes (:mod:`scan_table`). Processors that multiply bfloat16 faster scan in it first (:mod:`scan_bf16`). Few
   codes, or few tokens, are scanned without packing (:mod:`scan_scores`).
2. *Refine*, after groups: a float32 product of the codes of a group with all its tokens names codes.
3. *Decide* (:mod:`decide`): the oracle's own float64 arithmetic chooses among several candidates.
4. *Exhaustive*: a token with very many candidates (equal codes, a collapsed codebook) is searched again among the
   distinct codes, or by the oracle.

:mod:`bounds` derives why this is exact; :mod:`tuning` has the sizes.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq import reference
from fastvq.cpu import bounds, matmul, scan_bf16, scan_groups, scan_scores, scan_table, tuning
from fastvq.cpu.candidates import even_blocks
from fastvq.cpu.decide import decide
from fastvq.cpu.pack import Frame, PackedCodebook, frame_of, pack


class Prepared(NamedTuple):
    """The codebook as the search wants it, whatever the tokens."""

    metric: str
    codes: Tensor  # [K', D], as given: the finite codes
    numbers: Tensor | None  # [K'] int64: their indices, where other codes are not finite
    frame: Frame | None  # None without codes, and where float64 codes leave the range that may be scaled
    packed: PackedCodebook | None  # where it is to be cached


Prepare = Callable[[Tensor, str], Prepared]


def prepare(codebook: Tensor, metric: str) -> Prepared:
    """Pack the finite codes of ``codebook [K, D]``, all at once."""
    prepared = _in_frame(codebook, metric)
    if prepared.frame is None:
        return prepared
    in_bfloat16 = matmul.bf16_pays(math.inf, prepared.codes)
    return prepared._replace(packed=pack(prepared.codes, prepared.frame, in_bfloat16))


def _in_frame(codebook: Tensor, metric: str) -> Prepared:
    codes, numbers, top = codebook, None, _largest(codebook)
    if top == math.inf:
        numbers = torch.isfinite(codebook).all(1).nonzero()[:, 0]
        codes = codebook[numbers]
        top = _largest(codes) if len(codes) else 0.0
    scalable = len(codes) > 0 and not (codes.dtype == torch.float64 and bool(bounds.out_of_range(codes).any()))
    return Prepared(metric, codes, numbers, frame_of(codes, metric, top) if scalable else None, None)


def nearest_code(x: Tensor, codebook: Tensor, metric: str = "euclidean", prepare_once: Prepare | None = None) -> Tensor:
    """Exactly :func:`fastvq.reference.nearest_code`, several times faster than materialising ``[N, K]``.

    Beyond a few numbers per token, memory does not grow with N, nor with K unless the packed codebook is cached
    (``prepare_once`` is :func:`prepare` with a cache) or a tensor is float64: it takes one packed block of codes (4 to
    6 MiB from 4 to 64 dimensions, 12 with one, at most 32, half as much again in bfloat16), about 10 MiB for a block of
    tokens, and 1 to 4 MiB per thread.
    """
    if len(x) == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    if x.shape[1] > bounds.MOST_COLUMNS:
        return reference.nearest_code(x, codebook, metric)
    _keep_freed_blocks()
    prepare_once = prepare_once or _in_frame
    if not _stays_unpacked(x, codebook) or matmul.bf16_pays(len(x), codebook):
        return search_packed(x, prepare_once(codebook, metric))
    indices, undefined = scan_scores.search(x, codebook, metric)
    if len(undefined):
        indices[undefined] = search_packed(x[undefined], prepare_once(codebook, metric))
    return indices


def _stays_unpacked(x: Tensor, codebook: Tensor) -> bool:
    """Whether so few codes, or tokens, are scanned without packing."""
    n, n_codes = len(x), len(codebook)
    few = n_codes <= tuning.MOST_TABLE_CODES or n * n_codes <= tuning.FEW_SCORES
    few = few or (n <= tuning.FEW_TOKENS and n_codes <= scan_table.ONE)
    return few and torch.float64 not in (x.dtype, codebook.dtype)


@cache
def _keep_freed_blocks() -> None:
    """Let glibc keep the blocks that a search frees.

    It returns them to the system until a larger block has been freed: this one, untouched and just under its limit of
    32 MiB. Fresh pages cost a fifth of each search.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def search_packed(x: Tensor, prepared: Prepared) -> Tensor:
    """:func:`nearest_code` of at least one token in a prepared codebook, one block of codes after the other."""
    metric, codes, numbers, frame, packed = prepared
    if len(codes) == 0:
        return x.new_full((len(x),), -1, dtype=torch.int64)
    if numbers is not None:
        indices = search_packed(x, prepared._replace(numbers=None))
        return torch.where(indices < 0, -1, numbers[indices])
    if frame is None:
        return reference.nearest_code(x, codes, metric)

    threshold = torch.full((len(x),), -torch.inf, dtype=torch.float32, device=x.device)
    indices = torch.full((len(x),), -1, device=x.device)
    step = len(codes) if packed else _codes_per_block(codes, x.dtype)
    for first in range(0, len(codes), step):
        block = codes[first : first + step]
        found = _search_block(x, block, packed or pack(block, frame, matmul.bf16_pays(len(x), block)), threshold)
        if len(block) == len(codes):
            return found
        found[found >= 0] += first
        both = ((indices >= 0) & (found >= 0)).nonzero()[:, 0]
        candidates = both.repeat(2), torch.cat([indices[both], found[both]])
        indices = torch.where(found < 0, indices, found)
        if len(both):
            decide(x, codes, *candidates, metric, out=indices)
    return indices


def _codes_per_block(codes: Tensor, dtype: torch.dtype) -> int:
    """Codes per block of ``codes [K, D]``; all for float64, whose products may overflow and lose their order."""
    if torch.float64 in (codes.dtype, dtype):
        return len(codes)
    dim = codes.shape[1]
    return max(1, tuning.LEAST_CODE_VALUES // dim, min(tuning.CODES_PER_BLOCK, tuning.MOST_CODE_VALUES // dim))


def _search_block(x: Tensor, codes: Tensor, packed: PackedCodebook, threshold: Tensor) -> Tensor:
    """Winners among ``codes`` of tokens ``[N, D]``, -1 where none reaches ``threshold [N]``, which it raises."""
    n = even_blocks(len(x), min(tuning.TOKENS_PER_BLOCK, tuning.TOKEN_VALUES // packed.rows.shape[2]))
    search = scan_table.search if len(codes) <= tuning.MOST_TABLE_CODES else scan_groups.search
    if packed.rounded and matmul.bf16_pays(len(x), codes):
        search = partial(scan_bf16.search, rounded=packed.rounded, fine=search)
    found = [search(tokens, packed, known) for tokens, known in zip(x.split(n), threshold.split(n), strict=True)]
    indices = torch.cat([block.indices for block in found])
    owners = torch.cat([block.owners + i * n for i, block in enumerate(found)])
    if len(owners):
        decide(x, codes, owners, torch.cat([block.codes for block in found]), packed.frame.metric, out=indices)
    # Finite tokens with NaN as a threshold are out of float32's range.
    beyond = threshold.isnan().nonzero()[:, 0]
    beyond = beyond[torch.isfinite(x[beyond]).all(1)]
    exhaustive = torch.cat([beyond, *(block.exhaustive + i * n for i, block in enumerate(found))])
    if len(exhaustive):
        indices[exhaustive] = _search_exhaustively(x[exhaustive], codes, packed.frame)
    return indices


def _largest(rows: Tensor) -> float:
    """Largest magnitude, infinite where there is a NaN: many times faster than ``isfinite``."""
    low, high = torch.aminmax(rows)
    top = float(torch.maximum(-low, high))
    return top if top < math.inf else math.inf


def _search_exhaustively(x: Tensor, codebook: Tensor, frame: Frame) -> Tensor:
    """Among the distinct codes, if most codes occur twice; else by the oracle."""
    # Rows of different weighted sums differ. Many different sums save the sorting of rows, a third of the oracle's time
    # with few tokens and short codes.
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
