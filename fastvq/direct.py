"""Search in the codes as they are, where packing them costs more than it saves: among few codes, or for few tokens.

The codes whose computed score reaches the best one of their token, less a margin, can win. Of a small product each
score is compared with that limit. Of larger ones the codes are seen as a table, and only the largest scores of its rows
and columns are kept: a code that reaches the limit makes the maxima of its row and its column reach it, so that where
one row and one column do, it is the code where they cross. :mod:`fastvq.cpu` derives the margin.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.candidates import MOST, even_pieces, joined, places
from fastvq.packed import LARGEST_NORM, error_constant
from fastvq.products import product, product_values
from fastvq.settle import settle

# Up to so many codes, and up to so many tokens or scores (4 MiB) among more codes.
MOST_CODES = 2048
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
# What each code, row or column that reaches the limit adds to a sum, beside its number: the sum tells whether there is
# another, and if not, which it is. Exact in float32 up to four of them.
_ONE = 2.0**22


class _Codes(NamedTuple):
    rows: Tensor  # [K', D] float32, of norm 1 for the cosine
    bias: Tensor | None  # [K'] float32: what is added to the products
    largest: float  # largest norm b; NaN or infinite where they cannot be compared

    def scores(self, tokens: Tensor) -> Tensor:
        """``[n, K']`` for tokens ``[n, D]``."""
        return product(tokens, self.rows, self.bias)


def fits(x: Tensor, codebook: Tensor) -> bool:
    """Whether ``x [N, D]`` and ``codebook [K, D]`` are a problem for :func:`search`."""
    n, n_codes = len(x), len(codebook)
    few = n_codes <= MOST_CODES or n * n_codes <= FEW_SCORES or (n <= FEW_TOKENS and n_codes <= _ONE)
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
    codes = _codes(codebook, metric, fill=n > step)
    pairs, left, end = [], [], 0
    while end < n:
        # The first block is one product, and tells.
        tokens = x[end : end + (_TOKENS_PER_BLOCK if end else step)].float()
        margin = _margin(tokens, codes.largest, metric)
        if math.isnan(margin):
            break
        sums, limits, compared = _sums(tokens, codes, margin, step)
        indices[end : end + len(tokens)] = sums
        if float(sums.amax()) >= _ONE:
            several = (sums >= _ONE).nonzero()[:, 0]
            if len(several) > _MOST_SEVERAL * len(tokens) + _FEW_SEVERAL:
                break
            for some in several.split(step):
                if compared is None:
                    reaches = codes.scores(tokens.index_select(0, some)).ge_(limits.index_select(0, some))
                else:
                    reaches = compared.index_select(0, some)
                many = reaches.sum(1) > MOST
                left.append(some[many].add_(end))
                at, candidates = places(reaches.masked_fill_(many[:, None], 0))
                pairs.append((some.index_select(0, at).add_(end), candidates))
        end += len(tokens)
    if pairs:
        settle(x, codebook, *joined(pairs), metric, out=indices)
    return indices, torch.cat([*left, torch.arange(end, n, device=x.device)])


def _codes(codebook: Tensor, metric: str, fill: bool) -> _Codes:
    """The codes, with such that cannot win to ``fill`` a table.

    For the cosine they are divided by norms in float32, which moves a score by less than ``(D/2 + 4)u·a``: c has room
    for as much beside the error of the product.
    """
    rows, bias = codebook.float(), None
    norms = torch.linalg.vector_norm(rows, dim=1)
    largest = float(norms.amax()) + 2.0**-62 * rows.shape[1] ** 0.5
    if metric == "euclidean":
        bias = norms.square_().mul_(-0.5)
    elif metric == "cosine":
        rows = rows / norms[:, None]
        in_range = largest < LARGEST_NORM and norms.amin() > _LEAST_NORM
        largest = 1 + error_constant(rows.shape[1]) if in_range else math.nan
    if fill and (lacking := -len(rows) % _COLUMNS):
        rows = F.pad(rows, (0, 0, 0, lacking))
        bias = F.pad(torch.zeros_like(norms) if bias is None else bias, (0, lacking), value=-math.inf)
    return _Codes(rows, bias, largest)


def _margin(tokens: Tensor, b: float, metric: str) -> float:
    """How far below the best computed score that of another code may be that can win; NaN where scores may overflow.

    Twice the largest error ``c(a·b + h)`` of any token and code, and the slack. Here coordinates and products may be
    subnormal, and be taken for 0.
    """
    dim = tokens.shape[1]
    a = float(torch.linalg.vector_norm(tokens, dim=1).amax()) + 2.0**-62 * dim**0.5
    if not (a < LARGEST_NORM and b < LARGEST_NORM):  # nor NaN
        return math.nan
    h, oracle = (0.5 * b * b, 4 * (dim + 4) * 2.0**-53 * a * a) if metric == "euclidean" else (0.0, 0.0)
    return 2 * error_constant(dim) * (a * b + h) + (dim + 16) * 2.0**-126 * (1 + a + b) + oracle


def _sums(tokens: Tensor, codes: _Codes, margin: float, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """For tokens ``[n, D]`` the number of the code that can win, or at least _ONE where several can.

    And the limits of the scores ``[n, 1]``, and which reach them, ``[n, K']``, where these were compared one by one.
    """
    if len(tokens) <= step:
        scores, numbers = codes.scores(tokens), torch.arange(len(codes.rows), dtype=torch.float32, device=tokens.device)
        limits = scores.amax(1, keepdim=True).sub_(margin)
        reaches = scores.ge_(limits)
        return torch.mv(reaches, numbers.add_(_ONE)).sub_(_ONE), limits, reaches
    maxima, numbers = _maxima(tokens, codes, step), _table_numbers(len(codes.rows), tokens.device)
    limits = maxima.amax(1, keepdim=True).sub_(margin)
    return torch.mv(maxima.ge_(limits), numbers.add_(_ONE)).sub_(2 * _ONE), limits, None


def _maxima(tokens: Tensor, codes: _Codes, step: int) -> Tensor:
    """The largest score of each row of the table, then of each column, ``[n, rows + columns]``."""
    n_rows = len(codes.rows) // _COLUMNS
    maxima = tokens.new_empty(len(tokens), n_rows + _COLUMNS)
    for some, of_some in zip(tokens.split(step), maxima.split(step), strict=True):
        scores = codes.scores(some).view(-1, n_rows, _COLUMNS)
        torch.amax(scores, 2, out=of_some[:, :n_rows])
        torch.amax(scores, 1, out=of_some[:, n_rows:])
        del scores  # the next takes its place in the cache
    return maxima


def _table_numbers(n_codes: int, device: torch.device) -> Tensor:
    """Of each row and column: that of a row and that of a column add up to the number of the code where they cross."""
    rows = torch.arange(0, n_codes, _COLUMNS, dtype=torch.float32, device=device)
    return torch.cat([rows, torch.arange(_COLUMNS, dtype=torch.float32, device=device)])
