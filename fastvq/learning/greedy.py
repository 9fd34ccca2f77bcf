"""Greedy k-means++: codes picked from weighted candidates, each the best of several trials."""

import math

import torch
from torch import Tensor

from fastvq.common.precision import full_precision

# Codes are picked in at most about this many turns, one by one up to this many codes.
_TURNS = 512
# Trials for each code where a turn picks several: two gain most of what greed gains, four nearly all.
_FEW_TRIALS = 4
# Values in a block of distances of trials and candidates, 4 MiB.
_BLOCK_VALUES = 1 << 20
# Share of the squared norms that a float32 distance is off by at most, up to a thousand dimensions.
_MARGIN = 1e-4


def pick_codes(candidates: Tensor, weights: Tensor, n_codes: int, generator: torch.Generator) -> Tensor:
    """At most K of ``candidates [m, D]`` with ``weights [m]``; fewer where no others are left.

    For every code trials are drawn, with odds of weight times squared distance to the codes so far, and the one is kept
    that leaves the least ``Σ weight · distance``: k-means++ with the ``2 + log K`` trials that Arthur and Vassilvitskii
    (2007) suggest. Above 512 codes a turn picks several, each among four trials of its own.
    """
    per_turn = -(-n_codes // _TURNS)
    n_trials = 2 + int(math.log(n_codes)) if per_turn == 1 else _FEW_TRIALS
    points = _Points(candidates, weights)
    points.pick(points.draw(1, points.weights, generator))
    while len(points.picked) < n_codes:
        n = min(per_turn, n_codes - len(points.picked))
        odds = points.weights * points.nearest
        if not odds.any():
            break
        points.pick(points.best_of(points.draw(n * n_trials, odds, generator), n_trials))
    return candidates[points.picked]


class _Points:
    """Candidates with their weights, and squared distances to the codes picked so far, up to a common factor.

    A power of two keeps the float64 rows below 1, so that no square overflows and differences stay exact. Float32 rows
    around zero, in the expanded formula, compare trials and tell which candidates a new code may be nearest to.
    """

    def __init__(self, candidates: Tensor, weights: Tensor) -> None:
        rows = candidates.double()
        exponent = torch.frexp(rows.abs().amax()).exponent.clamp(min=-1000)
        self._rows = torch.ldexp(rows, -exponent)
        self._light = (self._rows - self._rows.mean(0)).float()
        self._norms = self._light.square().sum(1)
        self.weights = weights / weights.amax()
        self._light_weights = self.weights.float()
        self.nearest = torch.full_like(weights, torch.inf)
        self.picked = torch.empty(0, dtype=torch.int64, device=rows.device)

    def draw(self, n: int, odds: Tensor, generator: torch.Generator) -> Tensor:
        """Indices of n candidates, with replacement."""
        ends = odds.cumsum(0)
        places = torch.rand(n, dtype=torch.float64, device=odds.device, generator=generator) * ends[-1]
        return torch.searchsorted(ends, places, right=True).clamp(max=len(odds) - 1)

    def best_of(self, trials: Tensor, n: int) -> Tensor:
        """Of each n of the ``trials`` the one that leaves the least, once."""
        nearest = self.nearest.float()
        left = [torch.minimum(self._apart(block), nearest) @ self._light_weights for block in self._blocks(trials)]
        first = torch.arange(0, len(trials), n, device=trials.device)
        best = trials[first + torch.cat(left).view(-1, n).argmin(1)]
        return best if len(best) == 1 else best.unique()

    def pick(self, new: Tensor) -> None:
        """Add codes and bring ``nearest`` up to date, exactly, where one of them may be nearer."""
        for block in self._blocks(new):
            apart, which = self._apart(block).min(0)
            margin = _MARGIN * (self._norms + self._norms[block[which]])
            close = (apart <= self.nearest + margin).nonzero()[:, 0]
            exact = (self._rows[close] - self._rows[block[which[close]]]).square_().sum(1)
            self.nearest[close] = torch.minimum(self.nearest[close], exact)
        self.picked = torch.cat([self.picked, new])

    def _apart(self, new: Tensor) -> Tensor:
        with full_precision(new.device):
            products = torch.addmm(self._norms, self._light[new], self._light.T, alpha=-2)
        return products.add_(self._norms[new][:, None])

    def _blocks(self, indices: Tensor) -> tuple[Tensor, ...]:
        return indices.split(max(1, _BLOCK_VALUES // len(self._rows)))
