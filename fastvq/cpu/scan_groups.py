"""The scan of many codes: the largest bound of each group names groups, which are then refined."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.cpu import tuning
from fastvq.cpu.candidates import Candidates, concatenate, even_blocks, nonzero_pairs, stable_order, up_to
from fastvq.cpu.matmul import product, product_values
from fastvq.cpu.pack import PackedCodebook, pack_tokens, raise_threshold


def search(x: Tensor, packed: PackedCodebook, threshold: Tensor) -> Candidates:
    """Candidates of one block of tokens ``[n, D]``.

    Raises ``threshold [n]``, the best lower bounds known of the best scores in the dtype of the packed codes; NaN where
    scores might overflow.
    """
    n, n_groups, width = len(x), len(packed.rows), packed.rows.shape[2]
    rows = threshold.new_empty(n, width)
    factors = pack_tokens(x, packed.frame, out=rows)
    # The maxima of so many tokens stay in the cache as well.
    step = even_blocks(n, max(tuning.TOKENS_PER_PRODUCT, product_values(threshold.dtype) // n_groups))
    blocks = []
    for i in range(0, n, step):
        block = slice(i, i + step)
        maxima = _maxima(rows[block], packed)
        raise_threshold(threshold[block], maxima, packed, factors[:, block])
        blocks.append(reaching(maxima.ge_(threshold[block]), i, max(2, n_groups // tuning.GROUPS_PER_REFINED)))
    return refine(GroupPairs.join(blocks), rows, threshold, packed, None)


def _maxima(tokens: Tensor, packed: PackedCodebook) -> Tensor:
    """The largest upper bound in each group, ``[groups, n]``, for packed tokens ``[n, D + 2]``."""
    n_groups, group, width = packed.rows.shape
    n = min(len(tokens), tuning.TOKENS_PER_PRODUCT)
    step = min(n_groups, max(1, product_values(tokens.dtype) // (group * n)))  # groups per product
    maxima = tokens.new_empty(n_groups, len(tokens))
    code_blocks = packed.rows.view(-1, width).split(step * group)
    for block, block_out in zip(tokens.split(n), maxima.split(n, 1), strict=True):
        for codes, largest in zip(code_blocks, block_out.split(step), strict=True):
            torch.amax(product(codes, block).view(-1, group, len(block)), 1, out=largest)
    return maxima


class GroupPairs(NamedTuple):
    """Tokens with the groups that hold candidates of theirs."""

    owners: Tensor  # [pairs] int64: a token
    groups: Tensor  # [pairs] int64: a group
    crowded: Tensor  # int64: tokens with too many groups, which have no pairs, and
    reached: Tensor  # [groups] bool: the groups of these

    @staticmethod
    def join(blocks: list[GroupPairs]) -> GroupPairs:
        """The pairs of all ``blocks``."""
        owners, groups, crowded, reached = zip(*blocks, strict=True)
        return GroupPairs(torch.cat(owners), torch.cat(groups), torch.cat(crowded), torch.stack(reached).any(0))


def reaching(reaches: Tensor, first: int, most: int) -> GroupPairs:
    """Pairs where ``reaches [groups, n]`` is not 0, for the tokens from ``first`` on."""
    groups, owners = nonzero_pairs(reaches)
    counts = torch.bincount(owners, minlength=reaches.shape[1])
    crowded = (counts > most).nonzero()[:, 0]
    owners, groups = up_to(most, counts, owners, groups)
    return GroupPairs(owners + first, groups, crowded + first, reaches.index_select(1, crowded).any(1))


def refine(
    pairs: GroupPairs, tokens: Tensor, threshold: Tensor, packed: PackedCodebook, factors: Tensor | None
) -> Candidates:
    """Candidates of packed tokens ``[n, D + 2]`` among the codes of their groups.

    With ``factors [3, n]`` raises ``threshold [n]`` first.
    """
    counts = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    step = max(1, tuning.REFINED_VALUES // packed.rows.shape[1])  # pairs of token and group
    blocks = zip(pairs.owners.split(step), pairs.groups.split(step), strict=True)
    found = [_refine(*block, tokens, threshold, packed, counts, factors) for block in blocks]
    owners, codes = concatenate(found)
    is_crowded = counts > tuning.most_candidates(packed.n_codes)
    crowded_pairs = is_crowded.index_select(0, pairs.owners).nonzero()[:, 0]
    reached = pairs.reached.index_fill(0, pairs.groups.index_select(0, crowded_pairs), True)
    counts.masked_fill_(is_crowded, 0)
    indices = torch.full_like(counts, -1)
    indices.index_copy_(0, owners, codes).masked_fill_(counts != 1, -1)
    open_pairs = (counts.index_select(0, owners) > 1).nonzero()[:, 0]
    owners, codes = owners.index_select(0, open_pairs), codes.index_select(0, open_pairs)
    crowded = torch.cat([pairs.crowded, is_crowded.nonzero()[:, 0]])
    reached = reached.repeat_interleave(packed.rows.shape[1])[: packed.n_codes]
    if packed.numbers is not None:
        indices = torch.where(indices < 0, indices, packed.numbers[indices])
        codes = packed.numbers[codes]
        reached = torch.empty_like(reached).index_copy_(0, packed.numbers, reached)
    return Candidates(indices, owners, codes, crowded, reached)


def _refine(
    owners: Tensor, groups: Tensor, tokens: Tensor, threshold: Tensor, packed: PackedCodebook, counts: Tensor,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The codes in ``groups [pairs]`` whose own bound reaches the threshold of their token, ``owners [pairs]``.

    Adds their number to ``counts [n]``.

    Returns:
        Token and code of each, in no particular order; some of them, or none, for an exhaustive token.
    """
    n_groups, group, width = packed.rows.shape
    owners, groups, filled = _in_batches(owners, groups, n_groups)
    batch = tuning.TOKENS_PER_BATCH
    # Batches per product: the copies of their codes and tokens, and the bounds, are in the cache together.
    step = max(1, min(len(groups), product_values(tokens.dtype) // (4 * group * width)))
    upper = tokens.new_empty(len(groups), batch, group)
    codes = tokens.new_empty(step, group, width)
    copies = tokens.new_empty(step * batch, width)
    for of, at, out in zip(groups.split(step), owners.split(step * batch), upper.split(step), strict=True):
        torch.index_select(packed.rows, 0, of, out=codes[: len(of)])
        torch.index_select(tokens, 0, at, out=copies[: len(at)])
        torch.bmm(copies[: len(at)].view(len(of), batch, width), codes[: len(of)].mT, out=out)
    del codes, copies
    if factors is not None:
        group_norms = packed.norms.index_select(0, groups).unbind(1)
        least = upper.amax(2)
        for token_factors, norms in zip(factors, group_norms, strict=True):
            least.addcmul_(token_factors.index_select(0, owners).view_as(least), norms[:, None])
        threshold.scatter_reduce_(0, owners, least.view(-1), "amax")
    thresholds = threshold.index_select(0, owners).masked_fill_(~filled, torch.inf)
    reaches = upper.view(-1, group).ge_(thresholds[:, None])
    found, step = [], product_values() // group
    for i, block in enumerate(reaches.split(step)):
        pairs, members = nonzero_pairs(block)
        pairs += i * step
        of = groups.index_select(0, torch.div(pairs, batch, rounding_mode="floor"))
        at = owners.index_select(0, pairs)
        counts += torch.bincount(at, minlength=len(counts))
        found.append(up_to(tuning.most_candidates(packed.n_codes), counts, at, of * group + members))
    return concatenate(found)


def _in_batches(owners: Tensor, groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of token and group in batches that have the group in common.

    Returns:
        Token of each place, group of each batch, and whether a place holds a pair: token 0 fills the last batch of a
        group.
    """
    batch = tuning.TOKENS_PER_BATCH
    order = stable_order(groups)
    groups = groups.index_select(0, order)
    sizes = torch.bincount(groups, minlength=n_groups)
    batches = (sizes + (batch - 1)).div_(batch, rounding_mode="floor")
    fill = batches.mul(batch).sub_(sizes)
    place = (fill.cumsum(0) - fill).index_select(0, groups).add_(torch.arange(len(groups), device=groups.device))
    of = torch.repeat_interleave(batches)
    at = owners.new_zeros(len(of) * batch).index_copy_(0, place, owners.index_select(0, order))
    filled = torch.zeros_like(at, dtype=torch.bool).index_fill_(0, place, True)
    return at, of, filled
