"""The statistics that an update of the codebook needs, collected over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.backends.base import Backend
from fastvq.common.distributed import Ranks, is_distributed, start_sums
from fastvq.common.precision import widened
from fastvq.common.token_sums import TokenSums
from fastvq.learning.restart import Draw, draw_tokens, merge, over_ranks


class Update(NamedTuple):
    """Statistics of all ranks, float64: ``counts [K]``, ``sums [K, D]``; and tokens for dead codes ``rows [K, D]``.

    ``found`` is a scalar bool, whether there was a token; both are None where no code restarts.
    """

    counts: Tensor
    sums: Tensor | TokenSums
    rows: Tensor | None
    found: Tensor | None


class BatchStatistics(NamedTuple):
    """Statistics of this rank's tokens since the last update, float64, with a draw where codes restart.

    Counts are exact up to 2^53, and one all-reduce takes both.
    """

    counts: Tensor
    sums: Tensor | TokenSums
    draw: Draw | None

    def added_up(self) -> BatchStatistics:
        """The same without the tokens."""
        return self._replace(sums=_add_up(self.sums))

    def plus(self, other: BatchStatistics) -> BatchStatistics:
        """The statistics of both together."""
        draw = merge(self.draw, other.draw) if self.draw and other.draw else other.draw
        return BatchStatistics(self.counts + other.counts, _add_up(self.sums) + _add_up(other.sums), draw)

    def start_update(self, ranks: Ranks) -> Callable[[], Update]:
        """Start the sum over all ranks; the result waits for it."""
        wait = start_sums((self.counts, _add_up(self.sums)), ranks) if is_distributed(ranks) else None

        def update() -> Update:
            counts, sums = wait() if wait else (self.counts, self.sums)
            return Update(counts, sums, *(over_ranks(self.draw, ranks) if self.draw else (None, None)))

        return update


def _add_up(sums: Tensor | TokenSums) -> Tensor:
    return sums.all() if isinstance(sums, TokenSums) else sums


@torch.no_grad()
def collect(tokens: Tensor, indices: Tensor, n_codes: int, restarts: bool, backend: Backend) -> BatchStatistics:
    """Statistics of ``tokens [..., D]`` by ``indices [...]``, -1 left out, with a draw where codes restart."""
    tokens, indices = widened(tokens.detach()).reshape(-1, tokens.shape[-1]), indices.reshape(-1)
    counts, sums = backend.statistics(tokens, indices, n_codes)
    return BatchStatistics(counts.double(), sums, _draw(tokens, indices >= 0, n_codes) if restarts else None)


def _draw(tokens: Tensor, real: Tensor, n_codes: int) -> Draw:
    rows = tokens.float()
    if tokens.dtype == torch.float64:  # finite, but perhaps not in float32
        real = real & rows.isfinite().all(1)
    return draw_tokens(rows, real, n_codes)
