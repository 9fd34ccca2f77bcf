"""Random draws of k-means: tokens with given odds.

A draw is a race. A token of weight w arrives after an exponential time of rate w, and the first n tokens win: a draw
without replacement with odds of w (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir"). A race
needs no sum of weights, reads the tokens once in batches of any size, and merges over ranks.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastvq.common.distributed import Ranks, all_gather


def draw_rows(batches: Iterable[tuple[Tensor, Tensor]], n: int, generator: torch.Generator, ranks: Ranks) -> Tensor:
    """At most n tokens of all ranks, without replacement, with odds of their weights: the same rows on every rank.

    ``batches``, at least one, hold tokens ``[m, D]`` and their weights ``[m]``, floating; weight 0 is never drawn.
    ``generator`` belongs to this rank.
    """
    best: tuple[Tensor, Tensor] | None = None
    for tokens, weights in batches:
        arrival = torch.empty_like(weights, dtype=torch.float64).exponential_(generator=generator)
        keys = torch.where(weights > 0, weights.double() / arrival, 0)
        if best is None:
            best = keys.new_zeros(n), tokens.new_zeros(n, tokens.shape[1])
        keys, rows = _first(keys, tokens, min(n, len(tokens)))
        best = _first(torch.cat([best[0], keys]), torch.cat([best[1], rows]), n)
    if best is None:
        raise ValueError("x must hold at least one batch, got none")
    keys, rows = _first(all_gather(best[0], ranks), all_gather(best[1], ranks), n)
    return rows[keys > 0]


def _first(keys: Tensor, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    keys, order = keys.topk(n)
    return keys, rows[order]
