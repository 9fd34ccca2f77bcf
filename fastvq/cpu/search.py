"""Exact nearest-code search from plain PyTorch parts, without a ``[tokens, codes]`` matrix.

1. *Scan*: few codes, or few tokens, as they are: every score of a block of tokens (:mod:`scan_scores`). Else a matrix
   product writes upper bounds of the scores of a block of tokens and codes into a buffer sized so that each thread's
   slice stays in its cache. Only the largest bound of each group of codes is kept, which names groups, nearly always
   one (:mod:`scan_groups`). Processors that multiply bfloat16 faster scan in it first (:mod:`scan_bf16`).
2. *Refine*, after groups: a product of the codes of a group with all its tokens names codes.
3. *Decide* (:mod:`decide`): the oracle's own float64 arithmetic chooses among a few candidates.
4. *Search again*: crowded tokens, those with many candidates, are searched among the distinct codes that one of them
   may win: in float32 where these are few (equal codes are one, long ones are gone) or close to each other; else in
   float64, at twice the price. What float64 leaves open is searched by the oracle, equal tokens once.

:mod:`bounds` derives why this is exact; :mod:`tuning` has the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, cached_property, partial

import torch
from torch import Tensor

from fastvq import reference
from fastvq.cpu import bounds, matmul, scan_bf16, scan_groups, scan_scores, tuning
from fastvq.cpu.candidates import Candidates, even_blocks, first_of_equal, joined
from fastvq.cpu.decide import decide
from fastvq.cpu.pack import Frame, PackedCodebook, frame_of, pack
from fastvq.cpu.scan_scores import PlainCodes, plain_codes


class Prepared:
    """The codebook as the searches want it, whatever the tokens: each form is made when it is first asked for.

    ``keeps``: for many calls, so that all codes are packed at once. ``dtype``: of the products. ``shifts``: plain codes
    are shifted as packed ones always are.
    """

    def __init__(
        self, codebook: Tensor, metric: str, *, keeps: bool, dtype: torch.dtype = torch.float32, shifts: bool = False
    ) -> None:
        self.codebook, self.metric, self.keeps, self.dtype, self.shifts = codebook, metric, keeps, dtype, shifts

    @cached_property
    def plain(self) -> PlainCodes:
        """The codes as they are; shifted where that is asked for."""
        shift = self.frame.shift.float() if self.shifts and self.metric == "euclidean" and self.frame else None
        return plain_codes(self.codebook, self.metric, shift, self.dtype)

    @cached_property
    def numbers(self) -> Tensor | None:
        """Indices ``[K']`` of the finite codes; None where all are."""
        return None if _largest(self.codebook) < math.inf else torch.isfinite(self.codebook).all(1).nonzero()[:, 0]

    @cached_property
    def codes(self) -> Tensor:
        """The finite codes ``[K', D]``."""
        return self.codebook if self.numbers is None else self.codebook[self.numbers]

    @cached_property
    def frame(self) -> Frame | None:
        """None without codes, and where float64 codes leave the range that may be scaled."""
        if len(self.codes) == 0:
            return None
        if self.codes.dtype == torch.float64 and bool(bounds.out_of_range(self.codes).any()):
            return None
        return frame_of(self.codes, self.metric, _largest(self.codes))

    @cached_property
    def packed(self) -> PackedCodebook | None:
        """All codes at once, where the codebook is kept; else they are packed in blocks."""
        if not self.keeps or self.frame is None:
            return None
        return pack(self.codes, self.frame, self.dtype, matmul.bf16_pays(math.inf, self.codes))


Prepare = Callable[[Tensor, str], Prepared]
prepare: Prepare = partial(Prepared, keeps=True)


def nearest_code(x: Tensor, codebook: Tensor, metric: str = "euclidean", prepare_once: Prepare | None = None) -> Tensor:
    """Exactly :func:`fastvq.reference.nearest_code`, several times faster than materialising ``[N, K]``.

    Beyond a few numbers per token, memory does not grow with N, nor with K unless the packed codebook is cached
    (``prepare_once`` is :func:`prepare` with a cache) or a tensor is float64: it takes one packed block of codes (4 to
    6 MiB from 4 to 64 dimensions, 12 with one, at most 32, half as much again in bfloat16), about 10 MiB for a block of
    tokens, and 1 to 4 MiB per thread.
    """
    # The shape, because the length of a tensor takes as long as an operator of PyTorch.
    n, dim = x.shape
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    if dim > bounds.MOST_COLUMNS:
        return reference.nearest_code(x, codebook, metric)
    _keep_freed_blocks()
    return _search(x, prepare_once(codebook, metric) if prepare_once else Prepared(codebook, metric, keeps=False))


@cache
def _keep_freed_blocks() -> None:
    """Let glibc keep the blocks that a search frees.

    It returns them to the system until a larger block has been freed: this one, untouched and just under its limit of
    32 MiB. Fresh pages cost a fifth of each search.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def _search(x: Tensor, prepared: Prepared) -> Tensor:
    """:func:`nearest_code` of at least one token."""
    codebook = prepared.codebook
    n, n_codes = x.shape[0], codebook.shape[0]
    is_few = n_codes <= tuning.FEW_CODES or n * n_codes <= tuning.FEW_SCORES or n <= tuning.FEW_TOKENS
    if not is_few or _bf16_pays(x, codebook, prepared) or not scan_scores.are_comparable(x, prepared.plain):
        return search_packed(x, prepared)
    found = scan_scores.search(x, prepared.plain)
    return _decided(found, x, codebook, prepared, prepared.plain.longest)


def search_packed(x: Tensor, prepared: Prepared) -> Tensor:
    """:func:`nearest_code` of at least one token in packed codes, one block after the other."""
    metric, codes, numbers = prepared.metric, prepared.codes, prepared.numbers
    if len(codes) == 0:
        return x.new_full((len(x),), -1, dtype=torch.int64)
    if prepared.frame is None:
        indices = reference.nearest_code(x, codes, metric)
    else:
        indices = _search_blocks(x, codes, prepared, prepared.frame)
    return indices if numbers is None else torch.where(indices < 0, -1, numbers[indices])


def _search_blocks(x: Tensor, codes: Tensor, prepared: Prepared, frame: Frame) -> Tensor:
    threshold = torch.full((len(x),), -torch.inf, dtype=prepared.dtype, device=x.device)
    indices = torch.full((len(x),), -1, device=x.device)
    step = len(codes) if prepared.packed else _codes_per_block(codes, x.dtype)
    for first in range(0, len(codes), step):
        block = codes[first : first + step]
        # Nothing else holds a packed block, so that it is gone before the next one is packed.
        packing = partial(pack, block, frame, prepared.dtype, _bf16_pays(x, block, prepared))
        found = _search_block(x, block, prepared, prepared.packed or packing(), threshold)
        if len(block) == len(codes):
            return found
        found[found >= 0] += first
        both = ((indices >= 0) & (found >= 0)).nonzero()[:, 0]
        candidates = both.repeat(2), torch.cat([indices[both], found[both]])
        indices = torch.where(found < 0, indices, found)
        if len(both):
            decide(x, codes, *candidates, prepared.metric, out=indices)
    return indices


def _codes_per_block(codes: Tensor, dtype: torch.dtype) -> int:
    """Codes per block of ``codes [K, D]``; all for float64, whose products may overflow and lose their order."""
    if torch.float64 in (codes.dtype, dtype):
        return len(codes)
    dim = codes.shape[1]
    return max(1, tuning.LEAST_CODE_VALUES // dim, min(tuning.CODES_PER_BLOCK, tuning.MOST_CODE_VALUES // dim))


def _bf16_pays(x: Tensor, codes: Tensor, prepared: Prepared) -> bool:
    return prepared.dtype == torch.float32 and matmul.bf16_pays(x.shape[0], codes)


def _search_block(x: Tensor, codes: Tensor, prepared: Prepared, packed: PackedCodebook, threshold: Tensor) -> Tensor:
    """Winners among ``codes`` of tokens ``[N, D]``, -1 where none reaches ``threshold [N]``, which it raises."""
    n = even_blocks(len(x), min(tuning.TOKENS_PER_BLOCK, tuning.TOKEN_VALUES // packed.rows.shape[2]))
    search: Callable[[Tensor, PackedCodebook, Tensor], Candidates] = scan_groups.search
    if packed.rounded and _bf16_pays(x, codes, prepared):
        search = partial(scan_bf16.search, rounded=packed.rounded)
    blocks = zip(x.split(n), threshold.split(n), strict=True)
    found = joined([search(tokens, packed, known) for tokens, known in blocks], n)
    indices = _decided(found, x, codes, prepared, 0.0)
    # Finite tokens with NaN as a threshold are out of range.
    beyond = threshold.isnan().nonzero()[:, 0]
    beyond = beyond[torch.isfinite(x[beyond]).all(1)]
    if len(beyond):
        every = torch.ones(len(codes), dtype=torch.bool, device=x.device)
        indices[beyond] = _search_again(x[beyond], codes, every, prepared, 0.0)
    return indices


def _decided(found: Candidates, x: Tensor, codes: Tensor, prepared: Prepared, longest: float) -> Tensor:
    """Winners of tokens ``[N, D]`` among ``codes``, whose ``longest`` norm the scan had to reckon with."""
    indices = found.indices
    if found.owners.numel():
        decide(x, codes, found.owners, found.codes, prepared.metric, out=indices)
    if found.crowded.numel():
        indices[found.crowded] = _search_again(x[found.crowded], codes, found.reached, prepared, longest)
    return indices


def _search_again(x: Tensor, codes: Tensor, reached: Tensor, before: Prepared, longest: float) -> Tensor:
    """Winners of crowded tokens ``[n, D]`` among ``codes [K, D]`` where ``reached [K]``."""
    numbers = reached.nonzero()[:, 0]
    few = codes.index_select(0, numbers)
    is_first = first_of_equal(few) == torch.arange(len(few), device=x.device)
    if not is_first.all():
        numbers, few = numbers[is_first], few[is_first]
    again = Prepared(few, before.metric, keeps=False, dtype=before.dtype, shifts=True)
    if 2 * len(numbers) > len(codes) and not tuning.CLOSER * again.plain.longest < longest:
        if before.dtype == torch.float64:
            distinct, inverse = torch.unique(first_of_equal(x), return_inverse=True)
            return numbers[reference.nearest_code(x[distinct], few, before.metric)][inverse]
        again = Prepared(few, before.metric, keeps=False, dtype=torch.float64, shifts=True)
    return numbers[_search(x, again)]


def _largest(rows: Tensor) -> float:
    """Largest magnitude, infinite where there is a NaN: many times faster than ``isfinite``."""
    if len(rows) == 0:
        return 0.0
    low, high = torch.aminmax(rows)
    top = float(torch.maximum(-low, high))
    return top if top < math.inf else math.inf
