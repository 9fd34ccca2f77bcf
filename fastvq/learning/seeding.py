"""Random draws of k-means: tokens with given odds, and the first codes.

A draw is a race. A token of weight w arrives after an exponential time of rate w, and the first n tokens win: a draw
without replacement with odds of w (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir"). A race
needs no sum of weights, reads the tokens once in batches of any size, and merges over ranks.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastvq.common.distributed import ALONE, Ranks, all_gather

# Of tokens, codes and which tokens are real: squared distances to the nearest code [n], 0 for a token that is not real.
Distances = Callable[[Tensor, Tensor, Tensor], Tensor]
# Codes are picked from the candidates in at most this many turns.
_TURNS = 256


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
        best = _first(torch.cat([best[0], keys]), torch.cat([best[1], tokens]), n)
    if best is None:
        raise ValueError("x must hold at least one batch, got none")
    keys, rows = _first(all_gather(best[0], ranks), all_gather(best[1], ranks), n)
    return rows[keys > 0]


def _first(keys: Tensor, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    keys, order = keys.topk(n)
    return keys, rows[order]


def pick_codes(
    candidates: Tensor, weights: Tensor, n_codes: int, distances: Distances, generator: torch.Generator
) -> Tensor:
    """At most K of ``candidates [m, D]``, with odds of weight times squared distance, ``⌈K/256⌉`` in each turn.

    Up to 256 codes this is k-means++ on weighted points (Arthur and Vassilvitskii 2007).
    """
    per_turn = -(-n_codes // _TURNS)
    codes = candidates[:0]
    nearest = torch.ones_like(weights)
    while len(codes) < n_codes:
        n = min(per_turn, n_codes - len(codes))
        drawn = draw_rows([(candidates, weights * nearest)], n, generator, ALONE)
        if len(drawn) == 0:
            break
        apart = distances(candidates, drawn, torch.ones_like(weights, dtype=torch.bool))
        nearest = torch.minimum(nearest, apart) if len(codes) else apart
        codes = torch.cat([codes, drawn])
    return codes
