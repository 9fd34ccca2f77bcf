"""A first scan in bfloat16, where the processor multiplies such matrices faster than float32.

It names the groups of codes that can win, whose codes are scored again in float32. Tokens for which it names too many
are searched in float32 altogether. :mod:`fastvq.cpu.pack_bf16` derives the bounds.

Rounding keeps order: a sum that is at least L is, once rounded, at least L rounded. Codes that can win have products
that are not negative, whose order is that of their bits, so that the maxima are those of integers: these take a third
of the time of float32's and a sixth of bfloat16's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.cpu.candidates import Candidates, joined
from fastvq.cpu.matmul import bfloat16_units, product_values
from fastvq.cpu.pack import PackedCodebook, error_constant, pack_tokens, raise_lower
from fastvq.cpu.pack_bf16 import UNIT, RoundedCodebook, RoundedTokens, round_tokens
from fastvq.cpu.scan_groups import reaching, rescored

Search = Callable[[Tensor, PackedCodebook, Tensor], Candidates]


class Worth(NamedTuple):
    """From which sizes on products in bfloat16 save more time than what is done besides."""

    codes: int
    coordinates: int
    work: float  # N K (D + 8): maxima of integers save as much as eight coordinates


# Times measured against float32, on two cores each.
_WORTH = {
    # Xeon: 1.15 with 8,192 x 1,024 x 128, 1.0 with 512 x 16,384 x 64, 0.8 with 8,192 x 2,048 x 64 and with
    # 512 x 16,384 x 256, 0.5 with 8,192 x 4,096 x 256.
    "AMX": Worth(2048, 32, 6e8),
    # EPYC (Zen 5), product twice as fast as oneDNN's of float32: 1.2 with 8,192 x 1,024 x 64, 0.95 with 8,192 x 2,048 x
    # 64, 1.2 with 8,192 x 4,096 x 8, 1.0 with 8,192 x 4,096 x 16 and with 2,048 x 4,096 x 32, 0.9 with 512 x 16,384 x
    # 64, 0.6 with 8,192 x 4,096 x 128.
    "AVX-512 BF16": Worth(2048, 16, 5e8),
}
# Few enough that a product takes in many codes, many enough that its operands are read from memory rarely.
_TOKENS_PER_PRODUCT = 512
# A product of a new size is compiled first, which takes some milliseconds: few sizes, whatever the number of tokens.
_MULTIPLE = 128
# With more, the three terms of the bound are not covered by the precision to spare.
_MOST_COLUMNS = 1 << 14
# Products are shifted by the best score among a few codes of one in so many groups. A rough shift will do: what is left
# to round then costs less than rounding the operands.
_GROUPS_PER_SAMPLE, _CODES_PER_SAMPLE = 64, 8
# To score the codes of more groups again, one in so many, takes longer than to search all codes in float32. Bounds the
# memory of what is rescored.
_GROUPS_PER_RESCORED = 8
_FEWEST_RESCORED, _MOST_RESCORED = 8, 64
# Where a larger share of tokens is left for float32, the first scan is not worth its time.
_MOST_LEFT = 1 / 3


def pays(n_tokens: float, codes: Tensor) -> bool:
    """Whether this machine finds the codes ``[K, D]`` of so many tokens sooner with a first scan in bfloat16."""
    units = bfloat16_units()
    if units is None or not codes.is_cpu:
        return False
    worth, (n_codes, dim) = _WORTH[units], codes.shape
    enough = n_codes >= worth.codes and worth.coordinates <= dim <= _MOST_COLUMNS
    return enough and n_tokens * n_codes * (dim + 8) >= worth.work


def search(x: Tensor, packed: PackedCodebook, lower: Tensor, *, rounded: RoundedCodebook, fine: Search) -> Candidates:
    """Candidates of one block of tokens ``[n, D]``; ``fine`` searches in float32.

    Raises ``lower [n]``, the best lower bounds that are known of the tokens; NaN where a token may not be compared.
    """
    n, n_groups, width = len(x), len(packed.rows), packed.rows.shape[2]
    rows, to_lower = lower.new_empty(n, width), lower.new_empty(3, n)
    most = min(_MOST_RESCORED, max(_FEWEST_RESCORED, n_groups // _GROUPS_PER_RESCORED))
    # What is made of so many tokens, and their maxima, stay in the cache. The first piece is small, and tells.
    at_most = max(product_values() // max(width, n_groups), _TOKENS_PER_PRODUCT)
    step = at_most // _TOKENS_PER_PRODUCT * _TOKENS_PER_PRODUCT
    pieces, crowded, end = [], [], 0
    while end < n:
        some = slice(end, min(n, end + (step if end else _TOKENS_PER_PRODUCT)))
        to_lower[:, some] = pack_tokens(x[some], packed.frame, out=rows[some])
        _raise_by_sample(lower[some], rows[some], packed, to_lower[:, some])
        tokens = round_tokens(rows[some], to_lower[:, some], lower[some], rounded.ratio, error_constant(width - 2))
        owners, groups, many = reaching(_reaches(tokens, packed, rounded), most)
        pieces.append((owners + some.start, groups))
        crowded.append(many + some.start)
        end = some.stop
        if len(many) > _MOST_LEFT * (end - some.start):
            break
    found = rescored(*joined(pieces), rows, lower, packed, to_lower)
    others = torch.cat([*crowded, torch.arange(end, n, device=x.device)])
    if len(others):
        least = lower[others]
        found = _with(found, fine(x[others], packed, least), others)
        lower[others] = least
    return found


def _raise_by_sample(lower: Tensor, rows: Tensor, packed: PackedCodebook, to_lower: Tensor) -> None:
    """Raise ``lower [n]`` for tokens ``[n, D + 2]`` by a few codes."""
    codes = packed.rows[::_GROUPS_PER_SAMPLE, :_CODES_PER_SAMPLE]
    some = packed._replace(rows=codes, norms=packed.norms[::_GROUPS_PER_SAMPLE])
    bounds = torch.mm(codes.flatten(0, 1), rows.t())
    raise_lower(lower, bounds.view(*codes.shape[:2], -1).amax(1), some, to_lower)


def _reaches(tokens: RoundedTokens, packed: PackedCodebook, rounded: RoundedCodebook) -> Tensor:
    """Not 0 where the largest bound of a group reaches the best lower bound of a token, ``[groups, n]``."""
    maxima = _maxima(tokens.rows, rounded.rows).view(torch.bfloat16).float()
    # A product that is not negative was at least this share of itself before it was rounded.
    least = torch.addmm(maxima, packed.norms, tokens.to_lower, beta=1 - 2 * UNIT).amax(0)
    least = torch.maximum(tokens.lower, least)
    return maxima.ge_(least.bfloat16().float())


def _maxima(tokens: Tensor, codes: Tensor) -> Tensor:
    """Bits of the largest product in each group where it is not negative, else negative: int16 ``[groups, n]``.

    For tokens ``[n, D + 4]`` and codes ``[groups, G, D + 4]`` in bfloat16.
    """
    n_groups, group, width = codes.shape
    n = len(tokens)
    tokens = F.pad(tokens, (0, 0, 0, -n % _MULTIPLE))
    values = product_values(torch.bfloat16)
    step = min(n_groups, max(1, values // (group * _TOKENS_PER_PRODUCT)))  # groups per product
    maxima = torch.empty(n_groups, len(tokens), dtype=torch.int16, device=tokens.device)
    buffer = torch.empty(step * group * _TOKENS_PER_PRODUCT, dtype=torch.bfloat16, device=tokens.device)
    pieces = codes.view(-1, width).split(step * group)
    for some, of_some in zip(tokens.split(_TOKENS_PER_PRODUCT), maxima.split(_TOKENS_PER_PRODUCT, 1), strict=True):
        for rows, largest in zip(pieces, of_some.split(step), strict=True):
            products = buffer[: len(rows) * len(some)].view(len(rows), -1)
            torch.mm(rows, some.t(), out=products)
            torch.amax(products.view(torch.int16).view(-1, group, len(some)), 1, out=largest)
    return maxima[:, :n]


def _with(found: Candidates, others: Candidates, at: Tensor) -> Candidates:
    """``found``, and those of the tokens ``at``, which have none yet."""
    found.indices[at] = others.indices
    return Candidates(
        found.indices,
        torch.cat([found.owners, at[others.owners]]),
        torch.cat([found.codes, others.codes]),
        torch.cat([found.crowded, at[others.crowded]]),
    )
