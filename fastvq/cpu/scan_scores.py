"""The scan of unpacked codes, where packing costs more than it saves: few codes, or few tokens.

Candidates are the codes whose computed score reaches the largest score of their token less a margin
(:func:`fastvq.cpu.bounds.margin`). Small products keep every score, larger ones the maxima of a table.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.cpu import bounds, tuning
from fastvq.cpu.candidates import concatenate, even_blocks
from fastvq.cpu.decide import decide
from fastvq.cpu.matmul import product, product_values
from fastvq.cpu.scan_table import ONE, Table, pairs


class Each(NamedTuple):
    """Codes of which every score is kept; used like a :class:`Table`."""

    scores: Callable[[Tensor], Tensor]  # of tokens [n, D]: [n, K]

    def maxima(self, tokens: Tensor) -> Tensor:
        """The scores, ``[n, K]``."""
        return self.scores(tokens)

    def named(self, reaches: Tensor) -> Tensor:
        """For ``reaches [n, K]``, zeros and ones, each with a one: its code, at least ONE where there are several."""
        codes = torch.arange(ONE, ONE + reaches.shape[1], dtype=torch.float32, device=reaches.device)
        return torch.mv(reaches, codes).sub_(ONE)

    def candidates(
        self, tokens: Tensor, thresholds: Tensor, reaches: Tensor, open_tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token and code of the ones in the rows ``open_tokens``, and the exhaustive tokens, which are left out."""
        return pairs(reaches.index_select(0, open_tokens), open_tokens)


class _Codes(NamedTuple):
    rows: Tensor  # [K, D] float32, of norm 1 for the cosine
    bias: Tensor | None  # [K] float32: added to the products
    largest: float  # largest norm b; NaN or infinite where they cannot be compared

    def in_table(self, step: int) -> Table:
        """For products with ``step`` tokens; codes that cannot win fill the last row."""
        rows, bias = self.rows, self.bias
        if lacking := -len(rows) % tuning.TABLE_COLUMNS:
            bias = F.pad(rows.new_zeros(len(rows)) if bias is None else bias, (0, lacking), value=-math.inf)
            rows = F.pad(rows, (0, 0, 0, lacking))
        n_rows = len(rows) // tuning.TABLE_COLUMNS
        return Table(lambda tokens: product(tokens, rows, bias), len(self.rows), n_rows, tuning.TABLE_COLUMNS, step)


def search(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Find the codes of tokens ``x [N, D]`` in ``codebook [K, D]``, with ``m = 0`` and ``s = 1``.

    Returns:
        Indices ``[N]`` int64, and the tokens whose index is undefined: exhaustive tokens, and all from a block on with
        too many open tokens, or with a token that may leave float32's range.
    """
    n = len(x)
    indices = torch.empty(n, dtype=torch.int64, device=x.device)
    step = even_blocks(n, product_values() // len(codebook))
    codes = _codes(codebook, metric)
    scored = codes.in_table(step) if n > step else Each(lambda tokens: product(tokens, codes.rows, codes.bias))
    found, undefined, end = [], [], 0
    while end < n:
        # The first block is one product, and tells.
        tokens = x[end : end + (tuning.TOKENS_PER_BLOCK if end else step)].float()
        margin = bounds.margin(tokens, codes.largest, metric)
        if math.isnan(margin):
            break
        maxima = scored.maxima(tokens)
        thresholds = maxima.amax(1, keepdim=True).sub_(margin)
        reaches = maxima.ge_(thresholds)
        numbers = scored.named(reaches)
        indices[end : end + len(tokens)] = numbers
        if float(numbers.amax()) >= ONE:
            open_tokens = (numbers >= ONE).nonzero()[:, 0]
            if len(open_tokens) > tuning.MOST_OPEN * len(tokens) + tuning.FEW_OPEN:
                break
            owners, candidates, exhaustive = scored.candidates(tokens, thresholds, reaches, open_tokens)
            found.append((owners.add_(end), candidates))
            undefined.append(exhaustive.add_(end))
        end += len(tokens)
    if found:
        decide(x, codebook, *concatenate(found), metric, out=indices)
    if end < n:
        undefined.append(torch.arange(end, n, device=x.device))
    return indices, torch.cat(undefined) if undefined else indices[:0]


def _codes(codebook: Tensor, metric: str) -> _Codes:
    """The codes as they are compared, divided by their norms for the cosine."""
    rows, bias = codebook.float(), None
    norms = torch.linalg.vector_norm(rows, dim=1)
    largest = float(norms.amax()) + bounds.norm_room(rows.shape[1])
    if metric == "euclidean":
        bias = norms.square_().mul_(-0.5)
    elif metric == "cosine":
        rows = rows / norms[:, None]
        in_range = largest < bounds.LARGEST_NORM and norms.amin() > bounds.LEAST_COSINE_NORM
        largest = 1 + bounds.error_constant(rows.shape[1]) if in_range else math.nan
    return _Codes(rows, bias, largest)
