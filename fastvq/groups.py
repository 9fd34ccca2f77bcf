"""Which codes can win: first which groups of codes can, from their largest bounds, then which codes of these.

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
# Over other numbers of tokens than multiples of this the maxima take twice as long.
_TOKENS_PER_MAXIMA = 32
# Tokens are searched in blocks, as many as keep the maxima of all groups within this many values (2 MiB).
_MAXIMA_PER_BLOCK = 1 << 19
_TOKENS_PER_BLOCK = 4096
# Pairs of token and group are rescored in pieces of about so many values (8 MiB).
_RESCORED_VALUES = 1 << 21
# A token with more codes left is cheaper among distinct codes, or in the oracle. Bounds the memory of what is settled.
_MAX_CODES = 64


def block_size(n_tokens: int, n_groups: int) -> int:
    """Tokens per block: nearly even blocks, as many as there are threads or a multiple of it."""
    threads = team_size()
    most = max(_TOKENS_PER_PRODUCT, min(_TOKENS_PER_BLOCK, _MAXIMA_PER_BLOCK // n_groups))
    blocks = -(-n_tokens // most)
    if n_tokens > _TOKENS_PER_PRODUCT:
        blocks = -(-blocks // threads) * threads
    return -(-n_tokens // (blocks * _TOKENS_PER_MAXIMA)) * _TOKENS_PER_MAXIMA


def search_block(x: Tensor, packed: PackedCodebook) -> tuple[Tensor, Tensor, Tensor]:
    """Scan and rescore one block of tokens ``[n, D]``.

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

    maxima = _scan(tokens.t(), packed)  # [groups, n]
    to_lower = torch.stack([-2 * c * a, torch.full_like(a, -2 * c)])  # [2, n], multiplies (b, h)
    lower = torch.addmm(maxima, packed.norms, to_lower).amax(0) - slack
    reaches = maxima.ge_(lower)
    n_groups, group = count(reaches)
    single = (n_groups == 1).nonzero()[:, 0]
    several = ((n_groups > 1) & (n_groups <= _MAX_CODES)).nonzero()[:, 0]
    step = max(1, _RESCORED_VALUES // (dim + 2))  # pairs
    found = [_rescore(some, group.index_select(0, some), tokens, lower, packed) for some in single.split(step)]
    if len(several):
        step = max(1, int(step * len(several) / float(n_groups.index_select(0, several).sum())))
        for some in several.split(step):
            at, groups = reaches.t().index_select(0, some).nonzero().unbind(1)
            found.append(_rescore(some.index_select(0, at), groups, tokens, lower, packed))
    owners, codes = (torch.cat(parts) for parts in zip(*found, strict=True))

    n_codes = torch.bincount(owners, minlength=n)
    indices = torch.full((n,), -1, device=x.device).index_copy_(0, owners, codes).masked_fill_(n_codes != 1, -1)
    left = (n_codes.index_select(0, owners) > 1).nonzero()[:, 0]
    return indices, owners.index_select(0, left), codes.index_select(0, left)


def count(reaches: Tensor) -> tuple[Tensor, Tensor]:
    """For a matrix of zeros and ones: ones per column, and the number of the row with the one where there is one.

    In float32, since comparing into bool and finding what is true take many times longer than a product. Up to
    LARGEST_COUNT rows.
    """
    numbers = torch.arange(len(reaches), dtype=torch.float32, device=reaches.device)
    counts, sums = torch.stack([torch.ones_like(numbers), numbers]) @ reaches
    return counts, sums.long()


def _scan(tokens: Tensor, packed: PackedCodebook) -> Tensor:
    """Largest upper bound of every group ``[groups, n]``, for tokens ``[D + 2, n]``."""
    n_groups, group, width = packed.rows.shape
    n_tokens = tokens.shape[1]
    maxima = torch.empty(n_groups, n_tokens, device=tokens.device)
    n = min(_TOKENS_PER_PRODUCT, n_tokens)
    step = max(1, _PRODUCT_VALUES // (group * n))  # groups per product
    buffer = torch.empty(min(step, n_groups) * group * n, device=tokens.device)
    pieces = packed.rows.split(step)
    for some, of_some in zip(tokens.split(n, 1), maxima.split(n, 1), strict=True):
        for codes, largest in zip(pieces, of_some.split(step), strict=True):
            bounds = buffer[: len(codes) * group * some.shape[1]].view(len(codes), group, -1)
            torch.mm(codes.view(-1, width), some, out=bounds.view(-1, some.shape[1]))
            torch.amax(bounds, 1, out=largest)
    return maxima


def _rescore(
    owners: Tensor, groups: Tensor, tokens: Tensor, lower: Tensor, packed: PackedCodebook
) -> tuple[Tensor, Tensor]:
    """Of the codes in ``groups [pairs]`` those whose own bound reaches that of their token, ``owners [pairs]``.

    Returns:
        Token and code of each, in no particular order; none of a token with more than _MAX_CODES.
    """
    group = packed.rows.shape[1]
    groups, order = groups.sort()
    owners = owners.index_select(0, order)
    some = tokens.index_select(0, owners)
    bounds = torch.empty(len(owners), group, device=tokens.device)
    sizes = torch.bincount(groups, minlength=len(packed.rows)).tolist()
    for codes, rows, out in zip(packed.rows, some.split(sizes), bounds.split(sizes), strict=True):
        if len(rows):
            torch.mm(rows, codes.t(), out=out)
    reaches = bounds.ge_(lower.index_select(0, owners)[:, None])
    n_codes, member = count(reaches.t())
    total = torch.zeros(len(lower), device=tokens.device).index_add_(0, owners, n_codes)
    few = total.index_select(0, owners) <= _MAX_CODES
    one = ((n_codes == 1) & few).nonzero()[:, 0]
    several = ((n_codes > 1) & few).nonzero()[:, 0]
    pairs, members = reaches.index_select(0, several).nonzero().unbind(1)
    pairs = torch.cat([one, several.index_select(0, pairs)])
    members = torch.cat([member.index_select(0, one), members])
    return owners.index_select(0, pairs), groups.index_select(0, pairs) * group + members
