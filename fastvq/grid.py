"""Which codes can win, from the row and column maxima of all codes seen as a matrix ``[groups, G]``.

:mod:`fastvq.cpu` derives the bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.packed import PackedCodebook, error_constant, scale_tokens
from fastvq.threads import team_size

# Scores of larger tokens might leave float32's range.
LARGEST_NORM = 2.0**60
# float32 counts no further.
LARGEST_COUNT = 1 << 24
# A product of 512 x 512 float32 values (1 MiB) stays in the level-2 cache of one core (2 MiB: half the speed).
_PRODUCT_VALUES = 1 << 18
_TOKENS_PER_PRODUCT = 512
# Tokens are searched in blocks, as many as keep the maxima of all groups within this many values (2 MiB).
_MAXIMA_PER_BLOCK = 1 << 19
_TOKENS_PER_BLOCK = 4096
# Crossings are refined for so many tokens at a time, and in pieces of this many values (256 KiB) in the cache.
_TOKENS_REFINED = 128
_REFINED_VALUES = 1 << 16
# A token with more crossings is left open, and one with more than one for each 8 codes: a pair costs several times as
# much here as in the oracle, and may be in vain (measured on patches of photographs and on codes in tight clumps).
_MAX_CROSSINGS = 1024
_CODES_PER_CROSSING = 8


def block_size(n_tokens: int, n_groups: int) -> int:
    """Tokens per block: even blocks, as many as there are threads or a multiple of it."""
    threads = team_size()
    most = max(_TOKENS_PER_PRODUCT, min(_TOKENS_PER_BLOCK, _MAXIMA_PER_BLOCK // n_groups))
    blocks = -(-n_tokens // most)
    if n_tokens > _TOKENS_PER_PRODUCT:
        blocks = -(-blocks // threads) * threads
    return -(-n_tokens // blocks)


def search_block(x: Tensor, packed: PackedCodebook) -> tuple[Tensor, Tensor, Tensor]:
    """Scan and refine one block of tokens ``[n, D]``.

    Returns:
        Indices ``[n]``, -1 where they are not known yet, and the pairs that can win among the others, as rows of ``x``
        and codes. Open remain tokens that are not finite, out of float32's range, or crowded: many codes are alike.
    """
    n, dim = x.shape
    c = error_constant(dim)
    tokens = torch.empty(n, dim + 2, device=x.device)
    scale_tokens(x, packed, out=tokens[:, :dim])
    a = torch.linalg.vector_norm(tokens[:, :dim], dim=1).add_(2.0**-62 * dim**0.5)
    # NaN as a bound reaches nothing, so that the token has no candidates.
    a.masked_fill_(~(a < LARGEST_NORM), torch.nan)
    tokens[:, dim], tokens[:, dim + 1] = 1.0, c * a
    slack = (dim + 16) * (2.0**-112 + 2.0**-148 * a)
    if packed.metric == "euclidean":
        slack += 4 * (dim + 4) * 2.0**-53 * a.square()

    row_maxima, column_maxima = _scan(tokens.t(), packed)  # [groups, n], [G, n]
    to_lower = torch.stack([-2 * c * a, torch.full_like(a, -2 * c)])  # [2, n], multiplies (b, h)
    lower = torch.addmm(row_maxima, packed.norms, to_lower).amax(0) - slack
    row_reaches, column_reaches = row_maxima.ge_(lower), column_maxima.ge_(lower)
    n_rows, row = count(row_reaches)
    n_columns, column = count(column_reaches)
    n_crossings = n_rows * n_columns
    indices = torch.where(n_crossings == 1, row * len(column_reaches) + column, -1)
    most = min(_MAX_CROSSINGS, len(row_reaches) * len(column_reaches) // _CODES_PER_CROSSING)
    several = ((n_crossings > 1) & (n_crossings <= most)).nonzero()[:, 0]
    codes = packed.rows.view(-1, dim + 2)
    refined = [
        _refine(some, tokens, codes, lower, row_reaches, column_reaches) for some in several.split(_TOKENS_REFINED)
    ]
    owners, candidates = (torch.cat(parts) for parts in zip(*refined, strict=True))
    return indices, owners, candidates


def count(reaches: Tensor) -> tuple[Tensor, Tensor]:
    """For a matrix of zeros and ones: ones per column, and the number of the row with the one where there is one.

    In float32, since comparing into bool and finding what is true take many times longer than a product. Up to
    LARGEST_COUNT rows.
    """
    numbers = torch.arange(len(reaches), dtype=torch.float32, device=reaches.device)
    counts, sums = torch.stack([torch.ones_like(numbers), numbers]) @ reaches
    return counts, sums.long()


def _scan(tokens: Tensor, packed: PackedCodebook) -> tuple[Tensor, Tensor]:
    """Row maxima ``[groups, n]`` and column maxima ``[G, n]`` of the upper bounds for tokens ``[D + 2, n]``."""
    n_groups, group, width = packed.rows.shape
    n_tokens = tokens.shape[1]
    row_maxima = torch.empty(n_groups, n_tokens, device=tokens.device)
    column_maxima = torch.empty(group, n_tokens, device=tokens.device)
    n = min(_TOKENS_PER_PRODUCT, n_tokens)
    step = max(1, _PRODUCT_VALUES // (group * n))  # groups per product
    buffer = torch.empty(min(step, n_groups) * group * n, device=tokens.device)
    for some, rows, columns in zip(tokens.split(n, 1), row_maxima.split(n, 1), column_maxima.split(n, 1), strict=True):
        for g0 in range(0, n_groups, step):
            codes = packed.rows[g0 : g0 + step].view(-1, width)
            bounds = buffer[: len(codes) * some.shape[1]].view(len(codes), -1)
            torch.mm(codes, some, out=bounds)
            bounds = bounds.view(-1, group, some.shape[1])
            torch.amax(bounds, 1, out=rows[g0 : g0 + step])
            if g0 == 0:
                torch.amax(bounds, 0, out=columns)
            else:
                torch.maximum(columns, bounds.amax(0), out=columns)
    return row_maxima, column_maxima


def _refine(
    some: Tensor, tokens: Tensor, codes: Tensor, lower: Tensor, row_reaches: Tensor, column_reaches: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the codes where a reaching row meets a reaching column, those whose own bound reaches, for ``some`` tokens.

    Returns:
        Token and code of each pair that is left.
    """
    pairs, rows = row_reaches.t().index_select(0, some).nonzero().unbind(1)
    owners = some.index_select(0, pairs)
    pairs, columns = column_reaches.t().index_select(0, owners).nonzero().unbind(1)
    owners = owners.index_select(0, pairs)
    candidates = rows.index_select(0, pairs) * len(column_reaches) + columns
    step = max(1, _REFINED_VALUES // tokens.shape[1])
    upper = torch.cat(
        [
            (tokens.index_select(0, o) * codes.index_select(0, k)).sum(1)
            for o, k in zip(owners.split(step), candidates.split(step), strict=True)
        ]
    )
    kept = (upper >= lower.index_select(0, owners)).nonzero()[:, 0]
    return owners.index_select(0, kept), candidates.index_select(0, kept)
