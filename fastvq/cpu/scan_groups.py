"""Which codes can win where there are many: first which groups of codes can, from their largest bounds.

:mod:`fastvq.cpu.search` derives the bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.cpu.candidates import (
    MOST,
    Candidates,
    even_pieces,
    joined,
    order_of,
    places,
    without_crowded,
)
from fastvq.cpu.matmul import product, product_values
from fastvq.cpu.pack import PackedCodebook, pack_tokens, raise_lower

# Few enough that a product takes in many codes, many enough that its operands are read from memory rarely.
_TOKENS_PER_PRODUCT = 512
# Scores that are computed again at a time (8 MiB).
_RESCORED_VALUES = 1 << 21
# Pairs of one group are rescored in batches of so many: few large products, since many small ones take longer to call
# than to compute.
_TOKENS_PER_BATCH = 32


def search(x: Tensor, packed: PackedCodebook, lower: Tensor) -> Candidates:
    """Candidates of one block of tokens ``[n, D]``: scan, and rescore the groups that reach.

    Raises ``lower [n]``, the best lower bounds that are known of the tokens; NaN where a token may not be compared.
    """
    n, n_groups, width = len(x), len(packed.rows), packed.rows.shape[2]
    rows = lower.new_empty(n, width)
    to_lower = pack_tokens(x, packed.frame, out=rows)
    # The maxima of so many tokens stay in the cache as well.
    step = even_pieces(n, max(_TOKENS_PER_PRODUCT, product_values() // n_groups))
    pieces, crowded = [], []
    for i in range(0, n, step):
        some = slice(i, i + step)
        maxima = _maxima(rows[some], packed)
        raise_lower(lower[some], maxima, packed, to_lower[:, some])
        owners, groups, many = reaching(maxima.ge_(lower[some]), MOST)
        pieces.append((owners + i, groups))
        crowded.append(many + i)
    found = rescored(*joined(pieces), rows, lower, packed)
    return found._replace(crowded=torch.cat([found.crowded, *crowded]))


def _maxima(tokens: Tensor, packed: PackedCodebook) -> Tensor:
    """The largest upper bound in each group, ``[groups, n]``, for tokens ``[n, D + 2]``."""
    n_groups, group, width = packed.rows.shape
    n = min(len(tokens), _TOKENS_PER_PRODUCT)
    step = min(n_groups, max(1, product_values() // (group * n)))  # groups per product
    maxima = tokens.new_empty(n_groups, len(tokens))
    pieces = packed.rows.view(-1, width).split(step * group)
    for some, of_some in zip(tokens.split(n), maxima.split(n, 1), strict=True):
        for codes, largest in zip(pieces, of_some.split(step), strict=True):
            torch.amax(product(codes, some).view(-1, group, len(some)), 1, out=largest)
    return maxima


def reaching(reaches: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and groups where ``reaches [groups, n]`` is not 0, and tokens left out: those with more than ``most``."""
    groups, owners = places(reaches)
    counts = torch.bincount(owners, minlength=reaches.shape[1])
    return *without_crowded(owners, groups, counts, most), (counts > most).nonzero()[:, 0]


def rescored(
    owners: Tensor,
    groups: Tensor,
    tokens: Tensor,
    lower: Tensor,
    packed: PackedCodebook,
    to_lower: Tensor | None = None,
) -> Candidates:
    """Candidates of tokens ``[n, D + 2]`` among the codes of ``groups [pairs]``, for ``owners [pairs]``.

    With ``to_lower [3, n]`` raises ``lower [n]`` first.
    """
    counts = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    step = max(1, _RESCORED_VALUES // packed.rows.shape[1])  # pairs of token and group
    pairs = zip(owners.split(step), groups.split(step), strict=True)
    owners, codes = joined([_rescore(of, among, tokens, lower, packed, counts, to_lower) for of, among in pairs])
    crowded = counts > MOST
    counts.masked_fill_(crowded, 0)
    indices = torch.full_like(counts, -1)
    indices.index_copy_(0, owners, codes).masked_fill_(counts != 1, -1)
    left = (counts.index_select(0, owners) > 1).nonzero()[:, 0]
    return Candidates(indices, owners.index_select(0, left), codes.index_select(0, left), crowded.nonzero()[:, 0])


def _rescore(
    owners: Tensor,
    groups: Tensor,
    tokens: Tensor,
    lower: Tensor,
    packed: PackedCodebook,
    counts: Tensor,
    to_lower: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Of the codes in ``groups [pairs]`` those whose own bound reaches that of their token, ``owners [pairs]``.

    Adds to ``counts [n]`` how many there are of each token.

    Returns:
        Token and code of each, in no particular order; not all, or none, of a crowded token.
    """
    n_groups, group, width = packed.rows.shape
    owners, groups, filled = _in_batches(owners, groups, n_groups)
    # Batches per product: the copies of their codes and tokens, and the bounds, are in the cache together.
    step = max(1, min(len(groups), product_values() // (4 * group * width)))
    bounds = tokens.new_empty(len(groups), _TOKENS_PER_BATCH, group)
    codes = tokens.new_empty(step, group, width)
    some = tokens.new_empty(step * _TOKENS_PER_BATCH, width)
    for of, at, out in zip(groups.split(step), owners.split(step * _TOKENS_PER_BATCH), bounds.split(step), strict=True):
        torch.index_select(packed.rows, 0, of, out=codes[: len(of)])
        torch.index_select(tokens, 0, at, out=some[: len(at)])
        torch.bmm(some[: len(at)].view(len(of), _TOKENS_PER_BATCH, width), codes[: len(of)].mT, out=out)
    if to_lower is not None:
        of_groups = packed.norms.index_select(0, groups).unbind(1)
        least = bounds.amax(2)
        for of_tokens, norms in zip(to_lower, of_groups, strict=True):
            least.addcmul_(of_tokens.index_select(0, owners).view_as(least), norms[:, None])
        lower.scatter_reduce_(0, owners, least.view(-1), "amax")
    limits = lower.index_select(0, owners).masked_fill_(~filled, torch.inf)
    reaches = bounds.view(-1, group).ge_(limits[:, None])
    found, step = [], product_values() // group
    for i, some in enumerate(reaches.split(step)):
        pairs, members = places(some)
        pairs += i * step
        of = groups.index_select(0, torch.div(pairs, _TOKENS_PER_BATCH, rounding_mode="floor"))
        at = owners.index_select(0, pairs)
        counts += torch.bincount(at, minlength=len(counts))
        found.append(without_crowded(at, of * group + members, counts, MOST))
    return joined(found)


def _in_batches(owners: Tensor, groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of token and group in batches of _TOKENS_PER_BATCH that have the group in common.

    Returns:
        Token of each place, the group of each batch, and whether a place holds a pair: those that fill a group's last
        batch have token 0.
    """
    order = order_of(groups)
    groups = groups.index_select(0, order)
    sizes = torch.bincount(groups, minlength=n_groups)
    batches = (sizes + (_TOKENS_PER_BATCH - 1)).div_(_TOKENS_PER_BATCH, rounding_mode="floor")
    fill = batches.mul(_TOKENS_PER_BATCH).sub_(sizes)
    place = (fill.cumsum(0) - fill).index_select(0, groups).add_(torch.arange(len(groups), device=groups.device))
    of = torch.repeat_interleave(batches)
    at = owners.new_zeros(len(of) * _TOKENS_PER_BATCH).index_copy_(0, place, owners.index_select(0, order))
    filled = torch.zeros_like(at, dtype=torch.bool).index_fill_(0, place, True)
    return at, of, filled
