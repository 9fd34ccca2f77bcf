"""Which codes can win where there are few: the bounds of some tokens against all codes stay in the cache.

:mod:`fastvq.cpu` derives the bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.candidates import MAX_CODES, TOKENS_PER_MAXIMA, Candidates, counters, product_values
from fastvq.packed import PackedCodebook, add_to_bounds, pack_tokens

# With more codes it takes longer to compare every bound than to score the codes of the best group again. Measured
# against that: a fifth less at 1,024 codes, a twentieth less at 2,048, a tenth more at 4,096.
MOST_CODES = 2048


def search(x: Tensor, packed: PackedCodebook) -> Candidates:
    """Candidates of one block of tokens ``[n, D]``: the bounds of all codes, compared where they are."""
    n = len(x)
    n_groups, group, width = packed.rows.shape
    n_codes = n_groups * group
    step = min(n, max(1, product_values() // (n_codes * TOKENS_PER_MAXIMA)) * TOKENS_PER_MAXIMA)
    sizes = [n * width, n_codes * step, n_groups * step]
    rows, buffer, maxima = torch.empty(sum(sizes), device=x.device).split(sizes)
    rows = rows.view(n, width)
    to_lower = pack_tokens(x, packed, out=rows)

    codes = packed.rows.view(n_codes, width)
    numbers = counters(n_codes, x.device)
    lower, counts = torch.empty(n, device=x.device), torch.empty(2, n, device=x.device)
    pieces = (rows.t().split(step, 1), to_lower.split(step, 1), lower.split(step), counts.split(step, 1))
    for some, of_some, least, counted in zip(*pieces, strict=True):
        bounds = buffer[: n_codes * len(least)].view(n_codes, -1)
        largest = maxima[: n_groups * len(least)].view(n_groups, -1)
        torch.mm(codes, some, out=bounds)
        torch.amax(bounds.view(n_groups, group, -1), 1, out=largest)
        torch.amax(add_to_bounds(largest, packed, of_some, out=largest), 0, out=least)
        torch.mm(numbers, bounds.ge_(least), out=counted)

    reaching, number = counts
    indices = torch.where(reaching == 1, number, -1).long()
    several = ((reaching > 1) & (reaching <= MAX_CODES)).nonzero()[:, 0]
    owners, candidates = [several[:0]], [several[:0]]
    for some in several.split(step):
        bounds = buffer[: n_codes * len(some)].view(n_codes, -1)
        torch.mm(codes, rows.index_select(0, some).t(), out=bounds)
        numbers_, at = bounds.ge_(lower.index_select(0, some)).nonzero().unbind(1)
        owners.append(some.index_select(0, at))
        candidates.append(numbers_)
    return Candidates(indices, torch.cat(owners), torch.cat(candidates))
