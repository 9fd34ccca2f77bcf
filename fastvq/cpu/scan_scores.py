"""Search in the codes as they are, where packing them costs more than it saves: among few codes, or for few tokens.

The codes whose computed score reaches the best one of their token, less a margin that :mod:`fastvq.cpu.search`
derives, can win. Of a small product each score is compared with that limit, of larger ones those that
:mod:`fastvq.cpu.scan_table` keeps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.cpu import scan_table as table
from fastvq.cpu.candidates import even_pieces, joined
from fastvq.cpu.decide import settle
from fastvq.cpu.matmul import product, product_values
from fastvq.cpu.pack import LARGEST_NORM, error_constant, norm_room

# Up to so many tokens or scores (4 MiB) among more codes.
FEW_TOKENS = 16
FEW_SCORES = 1 << 20
# Tokens are searched in blocks of so many, of which few numbers are kept.
_TOKENS_PER_BLOCK = 8192
# With more tokens for which several codes can win, a share of a block, the sharper bounds of packed codes are worth
# their price.
_MOST_SEVERAL, _FEW_SEVERAL = 1 / 4, 16
# The direction of a code that is as short as this, which counts for the cosine, still has its precision.
_LEAST_NORM = 2.0**-40
# Codes in a row of the table: over other numbers than these the maxima take longer.
_COLUMNS = 64


class _Codes(NamedTuple):
    rows: Tensor  # [K, D] float32, of norm 1 for the cosine
    bias: Tensor | None  # [K] float32: what is added to the products
    largest: float  # largest norm b; NaN or infinite where they cannot be compared

    def in_table(self, step: int) -> table.Table:
        """For products with ``step`` tokens; codes that cannot win fill the last row."""
        rows, bias = self.rows, self.bias
        if lacking := -len(rows) % _COLUMNS:
            bias = F.pad(rows.new_zeros(len(rows)) if bias is None else bias, (0, lacking), value=-math.inf)
            rows = F.pad(rows, (0, 0, 0, lacking))
        n_rows = len(rows) // _COLUMNS
        return table.Table(lambda tokens: product(tokens, rows, bias), len(self.rows), n_rows, _COLUMNS, step)

    def each(self) -> table.Each:
        """For a single product with all tokens."""
        return table.Each(lambda tokens: product(tokens, self.rows, self.bias))


def fits(x: Tensor, codebook: Tensor) -> bool:
    """Whether ``x [N, D]`` and ``codebook [K, D]`` are a problem for :func:`search`."""
    n, n_codes = len(x), len(codebook)
    few = n_codes <= table.MOST_CODES or n * n_codes <= FEW_SCORES or (n <= FEW_TOKENS and n_codes <= table.ONE)
    return few and torch.float64 not in (x.dtype, codebook.dtype)


def search(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Find the codes of tokens ``x [N, D]`` in ``codebook [K, D]``, with ``m = 0`` and ``s = 1``.

    Returns:
        Indices ``[N]`` int64, and the rows of tokens for which they mean nothing: those for which very many codes can
        win, and all from a block on in which too many tokens have several, or one may leave float32's range.
    """
    n = len(x)
    indices = torch.empty(n, dtype=torch.int64, device=x.device)
    step = even_pieces(n, product_values() // len(codebook))
    codes = _codes(codebook, metric)
    scored = codes.in_table(step) if n > step else codes.each()
    pairs, left, end = [], [], 0
    while end < n:
        # The first block is one product, and tells.
        tokens = x[end : end + (_TOKENS_PER_BLOCK if end else step)].float()
        margin = _margin(tokens, codes.largest, metric)
        if math.isnan(margin):
            break
        kept = scored.maxima(tokens)
        limits = kept.amax(1, keepdim=True).sub_(margin)
        reaches = kept.ge_(limits)
        numbers = scored.named(reaches)
        indices[end : end + len(tokens)] = numbers
        if float(numbers.amax()) >= table.ONE:
            several = (numbers >= table.ONE).nonzero()[:, 0]
            if len(several) > _MOST_SEVERAL * len(tokens) + _FEW_SEVERAL:
                break
            owners, candidates, crowded = scored.reaching(tokens, limits, reaches, several)
            pairs.append((owners.add_(end), candidates))
            left.append(crowded.add_(end))
        end += len(tokens)
    if pairs:
        settle(x, codebook, *joined(pairs), metric, out=indices)
    if end < n:
        left.append(torch.arange(end, n, device=x.device))
    return indices, torch.cat(left) if left else indices[:0]


def _codes(codebook: Tensor, metric: str) -> _Codes:
    """The codes as they are compared.

    For the cosine they are divided by norms in float32, which moves a score by less than ``(D/2 + 4)u·a``: c has room
    for as much beside the error of the product.
    """
    rows, bias = codebook.float(), None
    norms = torch.linalg.vector_norm(rows, dim=1)
    largest = float(norms.amax()) + norm_room(rows.shape[1])
    if metric == "euclidean":
        bias = norms.square_().mul_(-0.5)
    elif metric == "cosine":
        rows = rows / norms[:, None]
        in_range = largest < LARGEST_NORM and norms.amin() > _LEAST_NORM
        largest = 1 + error_constant(rows.shape[1]) if in_range else math.nan
    return _Codes(rows, bias, largest)


def _margin(tokens: Tensor, b: float, metric: str) -> float:
    """How far below the best computed score that of another code may be that can win; NaN where scores may overflow.

    Twice the largest error ``c(a·b + h)`` of any token and code, and the slack. Here coordinates and products may be
    subnormal, and be taken for 0.
    """
    dim = tokens.shape[1]
    a = float(torch.linalg.vector_norm(tokens, dim=1).amax()) + norm_room(dim)
    if not (a < LARGEST_NORM and b < LARGEST_NORM):  # nor NaN
        return math.nan
    h, oracle = (0.5 * b * b, 4 * (dim + 4) * 2.0**-53 * a * a) if metric == "euclidean" else (0.0, 0.0)
    return 2 * error_constant(dim) * (a * b + h) + (dim + 16) * 2.0**-126 * (1 + a + b) + oracle
