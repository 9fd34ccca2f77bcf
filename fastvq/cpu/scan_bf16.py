"""A first scan in bfloat16, where the processor multiplies it faster than float32.

It names groups with candidates, which are refined in float32. Tokens with too many groups are searched in float32
altogether.

Rounding keeps order: a sum that is at least L is, once rounded, at least L rounded. Products of candidates are not
negative, and ordered as their bits are, so that the maxima are maxima of integers: a third of the time of float32's and
a sixth of bfloat16's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.cpu import bounds, scan_groups, tuning
from fastvq.cpu.candidates import Candidates
from fastvq.cpu.matmul import product_values
from fastvq.cpu.pack import CodesBF16, PackedCodebook, TokensBF16, pack_tokens, raise_threshold, round_tokens
from fastvq.cpu.scan_groups import GroupPairs, reaching, refine


def search(x: Tensor, packed: PackedCodebook, threshold: Tensor, *, rounded: CodesBF16) -> Candidates:
    """Candidates of one block of tokens ``[n, D]``.

    Raises ``threshold [n]``, the best lower bounds known of the best scores; NaN where scores might overflow.
    """
    n, n_groups, width = len(x), len(packed.rows), packed.rows.shape[2]
    rows, factors = threshold.new_empty(n, width), threshold.new_empty(3, n)
    most = min(tuning.MOST_REFINED, max(tuning.FEWEST_REFINED, n_groups // tuning.GROUPS_PER_REFINED))
    # So many tokens, and their maxima, stay in the cache. The first block is small, and tells.
    unit = tuning.TOKENS_PER_PRODUCT
    step = max(product_values() // max(width, n_groups), unit) // unit * unit
    blocks, end = [], 0
    while end < n:
        block = slice(end, min(n, end + (step if end else unit)))
        factors[:, block] = pack_tokens(x[block], packed.frame, out=rows[block])
        _raise_by_sample(threshold[block], rows[block], packed, factors[:, block])
        tokens = round_tokens(rows[block], factors[:, block], threshold[block], rounded.ratio)
        blocks.append(reaching(_reaches(tokens, packed, rounded), end, most))
        end = block.stop
        if len(blocks[-1].crowded) > tuning.MOST_FLOAT32 * (end - block.start):
            break
    pairs = GroupPairs.join(blocks)
    in_float32 = torch.cat([pairs.crowded, torch.arange(end, n, device=x.device)])
    found = refine(pairs._replace(crowded=in_float32[:0]), rows, threshold, packed, factors)
    if len(in_float32):
        thresholds = threshold[in_float32]
        found = _with(found, scan_groups.search(x[in_float32], packed, thresholds), in_float32)
        threshold[in_float32] = thresholds
    return found


def _raise_by_sample(threshold: Tensor, rows: Tensor, packed: PackedCodebook, factors: Tensor) -> None:
    """Raise ``threshold [n]`` for packed tokens ``[n, D + 2]`` by a sample of the codes."""
    codes = packed.rows[:: tuning.GROUPS_PER_SAMPLE, : tuning.CODES_PER_SAMPLE]
    sample = packed._replace(rows=codes, norms=packed.norms[:: tuning.GROUPS_PER_SAMPLE])
    upper = torch.mm(codes.flatten(0, 1), rows.t())
    raise_threshold(threshold, upper.view(*codes.shape[:2], -1).amax(1), sample, factors)


def _reaches(tokens: TokensBF16, packed: PackedCodebook, rounded: CodesBF16) -> Tensor:
    """Not 0 where the largest bound of a group reaches the threshold of a token, ``[groups, n]``."""
    maxima = _maxima(tokens.rows, rounded.rows).view(torch.bfloat16).float()
    # A product that is not negative was at least this share of itself before it was rounded.
    least = torch.addmm(maxima, packed.norms, tokens.factors, beta=1 - 2 * bounds.UNIT_BF16).amax(0)
    least = torch.maximum(tokens.threshold, least)
    return maxima.ge_(least.bfloat16().float())


def _maxima(tokens: Tensor, codes: Tensor) -> Tensor:
    """Bits of the largest product in each group where it is not negative, else negative: int16 ``[groups, n]``.

    For tokens ``[n, D + 4]`` and codes ``[groups, G, D + 4]`` in bfloat16.
    """
    n_groups, group, width = codes.shape
    n, unit = len(tokens), tuning.TOKENS_PER_PRODUCT
    tokens = F.pad(tokens, (0, 0, 0, -n % tuning.MULTIPLE_BF16))
    step = min(n_groups, max(1, product_values(torch.bfloat16) // (group * unit)))  # groups per product
    maxima = torch.empty(n_groups, len(tokens), dtype=torch.int16, device=tokens.device)
    buffer = torch.empty(step * group * unit, dtype=torch.bfloat16, device=tokens.device)
    code_blocks = codes.view(-1, width).split(step * group)
    for block, block_out in zip(tokens.split(unit), maxima.split(unit, 1), strict=True):
        for rows, largest in zip(code_blocks, block_out.split(step), strict=True):
            products = buffer[: len(rows) * len(block)].view(len(rows), -1)
            torch.mm(rows, block.t(), out=products)
            torch.amax(products.view(torch.int16).view(-1, group, len(block)), 1, out=largest)
    return maxima[:, :n]


def _with(found: Candidates, others: Candidates, at: Tensor) -> Candidates:
    """``found``, and the candidates of the tokens ``at``, which have none yet."""
    found.indices[at] = others.indices
    return Candidates(
        found.indices,
        torch.cat([found.owners, at[others.owners]]),
        torch.cat([found.codes, others.codes]),
        torch.cat([found.crowded, at[others.crowded]]),
        found.reached | others.reached,
    )
