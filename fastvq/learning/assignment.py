"""Passes of k-means over the tokens of all ranks: each token's nearest code, and what that says of the codes."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.backends.base import Backend
from fastvq.common import distributed
from fastvq.functional import search_codes
from fastvq.learning.batches import Batches, TokenBatches
from fastvq.learning.seeding import draw_rows

# Float64 values in a block of differences: 2 MiB stay in a CPU's cache, 64 MiB make few launches on other devices. The
# sums of a block are as large as the codebook, so that a block has at least twice as many tokens.
_BLOCK_VALUES_CPU, _BLOCK_VALUES = 1 << 18, 1 << 23
_TOKENS_PER_CODE = 2


class _Known(NamedTuple):
    """Of the tokens of a batch: squared distance to the nearest code, and its index."""

    apart: Tensor
    k: Tensor


class Assignment(NamedTuple):
    """What a pass finds for codes ``e [K, D]``, over the tokens of all ranks with weight w and nearest code k."""

    labels: list[Tensor]  # int64 [n] for each batch of this rank; -1: not real
    shapes: list[torch.Size]  # leading shapes of these batches, where they are known
    counts: Tensor  # int64 [K], Σ 1
    mass: Tensor  # float64 [K], Σ w
    pulls: Tensor  # float64 [K, D], Σ w (x - e_k)
    inertia: float  # Σ w |x - e_k|², over all k


class Tokens:
    """Tokens ``[n, D]`` of all ranks, batch by batch, on ``device``.

    ``weights [n]``, float64, belong to the only batch.
    """

    def __init__(
        self, batches: TokenBatches, weights: Tensor | None, backend: Backend, device: torch.device, sync: bool
    ) -> None:
        self._batches = batches
        self._is_fixed = not isinstance(batches, Batches) or batches.is_fixed
        self._weights = weights
        self._backend = backend
        self._device = device
        self._sync = sync

    def assign(self, codes: Tensor) -> Assignment:
        """Search ``codes [K, D]`` for every token and add up.

        Differences are made and added in float64, so that a mean is as exact as its code's dtype holds it, however far
        from zero the tokens are.
        """
        wide, K = codes.double(), len(codes)
        counts, mass = (torch.zeros(K, dtype=torch.float64, device=codes.device) for _ in range(2))
        pulls, inertia, labels = torch.zeros_like(wide), wide.new_zeros(1), []
        for tokens, real, weights in self._weighted():
            indices = self._search(tokens, codes, real)
            for w, k, apart in _blocks(tokens, weights, indices, wide):
                inertia += torch.where(w > 0, w * apart.square().sum(1), 0).sum()
                if self._weights is not None:
                    apart *= w[:, None]
                    mass += self._mass(w, k, K)
                n, sums = self._backend.code_statistics(apart, k, K, None)
                counts += n
                pulls += sums
            labels.append(indices)
        shapes = self._batches.shapes if isinstance(self._batches, Batches) else []
        mass = counts if self._weights is None else mass
        counts, mass, pulls, inertia = distributed.start_sums((counts, mass, pulls, inertia), self._sync)()
        return Assignment(labels, shapes, counts.long(), mass, pulls, float(inertia))

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """At most n tokens of all ranks, with odds of their weights; ``generator`` belongs to this rank."""
        return draw_rows(((tokens, weights) for tokens, _, weights in self._weighted()), n, generator, self._sync)

    def draw_far(self, n: int, codes: Tensor, generator: torch.Generator) -> Tensor:
        """The same with odds of weight times squared distance to the nearest of ``codes``."""
        return draw_rows(self._odds(codes, 0, []), n, generator, self._sync)

    def spread(self, codes: Tensor, n: int, rounds: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``codes`` with n more of each round of :meth:`draw_far`, and the weight of the tokens nearest to each.

        The rounds of k-means|| (Bahmani et al. 2012, arXiv 1203.6402). A round searches the codes of the round before,
        where the batches are the same in each pass.
        """
        start, known = 0, list[_Known]()
        for _ in range(rounds):
            drawn = draw_rows(self._odds(codes, start, known), n, generator, self._sync)
            start, codes = len(codes), torch.cat([codes, drawn])
        mass = torch.zeros(len(codes), dtype=torch.float64, device=codes.device)
        for _, weights, _, k in self._nearest(codes, start, known):
            mass += self._mass(weights, k, len(codes))
        return codes, distributed.all_reduce_sum(mass, self._sync)

    def _weighted(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Tokens, which are real, and their weights, 0 for one that is not."""
        for tokens, real in self._batches:
            tokens, real = tokens.to(self._device), real.to(self._device)
            yield tokens, real, real.double() if self._weights is None else torch.where(real, self._weights, 0)

    def _odds(self, codes: Tensor, start: int, known: list[_Known]) -> Iterator[tuple[Tensor, Tensor]]:
        for tokens, weights, apart, _ in self._nearest(codes, start, known):
            yield tokens, weights * apart

    def _nearest(
        self, codes: Tensor, start: int, known: list[_Known]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Tokens, weights, squared distances to the nearest code and its index.

        ``known`` has the last two for the codes before ``start``; it is replaced.
        """
        start = start if self._is_fixed else 0
        before, new = known.copy(), codes[start:]
        known.clear()
        for i, (tokens, real, weights) in enumerate(self._weighted()):
            if start and not len(new):
                apart, k = before[i]
            else:
                k = self._search(tokens, new, real)
                apart = distances(tokens, new, k)
            if start and len(new):
                closer = apart < before[i].apart
                apart, k = torch.where(closer, apart, before[i].apart), torch.where(closer, k + start, before[i].k)
            known.append(_Known(apart, k))
            yield tokens, weights, apart, k

    def _search(self, tokens: Tensor, codes: Tensor, real: Tensor) -> Tensor:
        """Index of the nearest code ``[n]``; -1 for a token that is not real."""
        if len(codes) == 1:
            return torch.where(real, 0, -1)
        return search_codes(tokens, codes, "euclidean", real, self._backend)

    def _mass(self, weights: Tensor, indices: Tensor, n_codes: int) -> Tensor:
        """The weight of the tokens of every code."""
        return self._backend.code_statistics(weights[:, None], indices, n_codes, None)[1][:, 0]


def distances(tokens: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """Squared distances ``[n]`` of ``tokens [n, D]`` to their codes, summed in float64; 0 where the index is -1."""
    weights = torch.ones_like(indices, dtype=torch.float64)
    blocks = _blocks(tokens, weights, indices, codes.double())
    return torch.cat([torch.where(k < 0, 0, apart.square_().sum(1)) for _, k, apart in blocks])


def _blocks(tokens: Tensor, weights: Tensor, indices: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks of weights and indices, and the differences ``x - e_k``, float64, to be overwritten."""
    values = _BLOCK_VALUES_CPU if tokens.device.type == "cpu" else _BLOCK_VALUES
    size = max(1, values // tokens.shape[1], _TOKENS_PER_CODE * len(codes))
    for x, w, k in zip(tokens.split(size), weights.split(size), indices.split(size), strict=True):
        apart = codes[k.clamp(min=0)]
        yield w, k, torch.sub(x, apart, out=apart)
