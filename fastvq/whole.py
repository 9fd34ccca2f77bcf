"""Which codes can win where there are few: the bounds of some tokens against all codes stay in the cache.

:mod:`fastvq.cpu` derives the bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.candidates import (
    Candidates,
    even_pieces,
    is_crowded,
    joined,
    only_row,
    places,
    row_weights,
    with_several,
)
from fastvq.packed import PackedCodebook, pack_tokens, raise_lower
from fastvq.products import product, product_values

# With more codes it takes longer to compare every bound than to score the codes of the best group again. Measured
# against that: a fifth less at 1,024 codes, a twentieth less at 2,048, a tenth more at 4,096.
MOST_CODES = 2048


def search(x: Tensor, packed: PackedCodebook, lower: Tensor) -> Candidates:
    """Candidates of one block of tokens ``[n, D]``: the bounds of all codes, compared where they are.

    Raises ``lower [n]``, the best lower bounds that are known of the tokens; NaN where a token may not be compared.
    """
    n = len(x)
    n_groups, group, width = packed.rows.shape
    n_codes = n_groups * group
    step = even_pieces(n, product_values() // n_codes)
    rows, maxima = lower.new_empty(n, width), lower.new_empty(n_groups * step)
    to_lower = pack_tokens(x, packed.frame, out=rows)

    codes, weights = packed.rows.view(n_codes, width), row_weights(n_codes, x.device)
    sums = lower.new_empty(n)
    pieces = zip(rows.split(step), to_lower.split(step, 1), lower.split(step), sums.split(step), strict=True)
    for some, of_some, least, counted in pieces:
        bounds = product(codes, some)
        largest = maxima[: n_groups * len(least)].view(n_groups, -1)
        torch.amax(bounds.view(n_groups, group, -1), 1, out=largest)
        raise_lower(least, largest, packed, of_some, out=largest)
        torch.mv(bounds.ge_(least).t(), weights, out=counted)
        del bounds  # the next takes its place in the cache

    several = with_several(sums)
    found = [(several[:0], several[:0])]
    for some in several.split(step):
        bounds = product(codes, rows.index_select(0, some))
        numbers, at = places(bounds.ge_(lower.index_select(0, some)))
        found.append((some.index_select(0, at), numbers))
    return Candidates(only_row(sums), *joined(found), is_crowded(sums).nonzero()[:, 0])
