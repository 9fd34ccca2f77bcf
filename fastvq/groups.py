"""Which codes can win where there are many: first which groups of codes can, from their largest bounds.

:mod:`fastvq.cpu` derives the bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.candidates import MAX_CODES, TOKENS_PER_MAXIMA, Candidates, count, product_values
from fastvq.packed import PackedCodebook, add_to_bounds, pack_tokens

# Few enough that a product takes in many codes, many enough that its operands are read from memory rarely.
_TOKENS_PER_PRODUCT = 512
# Pairs of token and group that are rescored at a time, against 64 codes each (8 MiB).
_PAIRS = 1 << 15
# Pairs of one group are rescored in batches of so many: few large products, since many small ones take longer to call
# than to compute.
_TOKENS_PER_BATCH = 32


def search(x: Tensor, packed: PackedCodebook) -> Candidates:
    """Candidates of one block of tokens ``[n, D]``: scan, and rescore the groups that reach."""
    n = len(x)
    n_groups, group, width = packed.rows.shape
    # One allocation: several smaller ones the C library gives back to the system each time, and pages that come anew
    # are a fifth of the time with 1,024 codes.
    sizes = [n * width, n_groups * n]
    rows, maxima = torch.empty(sum(sizes), device=x.device).split(sizes)
    rows, maxima = rows.view(n, width), maxima.view(n_groups, n)
    to_lower = pack_tokens(x, packed, out=rows)
    _scan(rows.t(), packed, out=maxima)
    lower = add_to_bounds(maxima, packed, to_lower).amax(0)
    reaches = maxima.ge_(lower)
    in_reach, only = count(reaches)
    single = (in_reach == 1).nonzero()[:, 0]
    several = ((in_reach > 1) & (in_reach <= MAX_CODES)).nonzero()[:, 0]
    pieces = [(some, only.index_select(0, some)) for some in single.split(_PAIRS)]
    if len(several):
        per_piece = max(1, int(_PAIRS * len(several) / float(in_reach.index_select(0, several).sum())))
        for some in several.split(per_piece):
            at, groups = reaches.t().index_select(0, some).nonzero().unbind(1)
            pieces.append((some.index_select(0, at), groups))
    if sum(len(owners) for owners, _ in pieces) <= _PAIRS:
        pieces = [_joined(pieces)]
    owners, codes = _joined([_rescore(owners, groups, rows, lower, packed) for owners, groups in pieces])

    n_codes = torch.bincount(owners, minlength=n)
    indices = torch.full((n,), -1, device=x.device).index_copy_(0, owners, codes).masked_fill_(n_codes != 1, -1)
    left = (n_codes.index_select(0, owners) > 1).nonzero()[:, 0]
    return Candidates(indices, owners.index_select(0, left), codes.index_select(0, left))


def _joined(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*pieces, strict=True)
    return torch.cat(first), torch.cat(second)


def _scan(tokens: Tensor, packed: PackedCodebook, out: Tensor) -> None:
    """Write the largest upper bound of every group to ``out [groups, n]``, for tokens ``[D + 2, n]``."""
    n_groups, group, width = packed.rows.shape
    n_tokens, values = tokens.shape[1], product_values()
    n = max(_TOKENS_PER_PRODUCT, values // (n_groups * group * TOKENS_PER_MAXIMA) * TOKENS_PER_MAXIMA)
    n = min(n, n_tokens)
    step = min(n_groups, max(1, values // (group * n)))  # groups per product
    buffer = torch.empty(step * group * n, device=tokens.device)
    pieces = packed.rows.view(-1, width).split(step * group)
    for some, of_some in zip(tokens.split(n, 1), out.split(n, 1), strict=True):
        for codes, largest in zip(pieces, of_some.split(step), strict=True):
            bounds = buffer[: len(codes) * some.shape[1]].view(len(codes), -1)
            torch.mm(codes, some, out=bounds)
            torch.amax(bounds.view(-1, group, some.shape[1]), 1, out=largest)


def _rescore(
    owners: Tensor, groups: Tensor, tokens: Tensor, lower: Tensor, packed: PackedCodebook
) -> tuple[Tensor, Tensor]:
    """Of the codes in ``groups [pairs]`` those whose own bound reaches that of their token, ``owners [pairs]``.

    Returns:
        Token and code of each, in no particular order; none of a token with more than MAX_CODES.
    """
    n_groups, group, width = packed.rows.shape
    owners, groups, limits = _in_batches(owners, groups, lower, n_groups)
    step = max(1, product_values() // (group * width))  # batches per product
    bounds = torch.empty(len(groups), _TOKENS_PER_BATCH, group, device=tokens.device)
    gathered = torch.empty(min(step, len(groups)), group + _TOKENS_PER_BATCH, width, device=tokens.device)
    codes, some = gathered.view(-1, width).split([len(gathered) * group, len(gathered) * _TOKENS_PER_BATCH])
    codes = codes.view(-1, group, width)
    for of, at, out in zip(groups.split(step), owners.split(step * _TOKENS_PER_BATCH), bounds.split(step), strict=True):
        torch.index_select(packed.rows, 0, of, out=codes[: len(of)])
        torch.index_select(tokens, 0, at, out=some[: len(at)])
        torch.bmm(some[: len(at)].view(len(of), -1, width), codes[: len(of)].mT, out=out)
    reaches = bounds.view(-1, group).ge_(limits[:, None])
    n_codes, member = count(reaches.t())
    total = torch.zeros(len(lower), device=tokens.device).index_add_(0, owners, n_codes)
    few = total.index_select(0, owners) <= MAX_CODES
    one = ((n_codes == 1) & few).nonzero()[:, 0]
    several = ((n_codes > 1) & few).nonzero()[:, 0]
    pairs, members = reaches.index_select(0, several).nonzero().unbind(1)
    pairs = torch.cat([one, several.index_select(0, pairs)])
    members = torch.cat([member.index_select(0, one), members])
    groups = groups.index_select(0, torch.div(pairs, _TOKENS_PER_BATCH, rounding_mode="floor"))
    return owners.index_select(0, pairs), groups * group + members


def _in_batches(owners: Tensor, groups: Tensor, lower: Tensor, n_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of token and group in batches of _TOKENS_PER_BATCH that have the group in common.

    Returns:
        Token of each place, the group of each batch, and the bound that a code has to reach in each place: no code
        does in those that fill a group's last batch.
    """
    groups, order = groups.sort()
    sizes = torch.bincount(groups, minlength=n_groups)
    batches = (sizes + (_TOKENS_PER_BATCH - 1)).div_(_TOKENS_PER_BATCH, rounding_mode="floor")
    fill = batches.mul(_TOKENS_PER_BATCH).sub_(sizes)
    place = (fill.cumsum(0) - fill).index_select(0, groups).add_(torch.arange(len(groups), device=groups.device))
    of = torch.repeat_interleave(batches)
    owners = owners.index_select(0, order)
    at = owners.new_zeros(len(of) * _TOKENS_PER_BATCH).index_copy_(0, place, owners)
    limits = torch.full_like(at, torch.inf, dtype=torch.float32)
    return at, of, limits.index_copy_(0, place, lower.index_select(0, owners))
