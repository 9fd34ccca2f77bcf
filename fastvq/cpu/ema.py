"""The moving averages of a codebook, block by block."""

import torch
from torch import Tensor

from fastvq.common.ema_step import EMAStep, counts_before, is_dead, must_stay
from fastvq.common.token_sums import TokenSums
from fastvq.cpu import tuning


@torch.no_grad()
def ema_step(step: EMAStep) -> Tensor:
    """:func:`fastvq.reference.ema_step` on a CPU, the same bits, without temporaries as large as the codebook."""
    embeddings, N, z_avg, counts, sums, rows, found, decay, *_ = step
    moved = counts_before(N, counts).mul_(decay).add_(counts * (1 - decay))
    total = float(moved.sum())
    stays = torch.zeros_like(N, dtype=torch.bool)
    uncounted = moved == 0
    starts = (N == 0) & ~uncounted
    has_uncounted, has_starts = bool(uncounted.any()), bool(starts.any())
    size = max(1, tuning.EMA_VALUES // embeddings.shape[1])
    if total > 0:
        weights = (moved + step.smoothing).div_(total + len(N) * step.smoothing).mul_(total)
        factors = weights.reciprocal_()
        harmless = (1e38 / max(1.0, float(factors.amax()))) ** 2
        for first in range(0, len(N), size):
            block = slice(first, first + size)
            z, e, factor = z_avg[block], embeddings[block], factors[block, None]
            added = sums.of(block).mul_(1 - decay) if isinstance(sums, TokenSums) else sums[block] * (1 - decay)
            average = (torch.where(starts[block, None], e, z) if has_starts else z).double().mul_(decay).add_(added)
            # A sum of squares is read six times as fast as the largest value.
            if not has_uncounted and torch.dot(average.view(-1), average.view(-1)) < harmless:
                z.copy_(average)
                e.copy_(average.mul_(factor))
            else:
                stays[block] = must_stay(average, factors[block]) & ~uncounted[block]
                rests = (stays[block] | uncounted[block])[:, None]
                z.copy_(torch.where(rests, z, average))
                e.copy_(torch.where(rests, e, average.mul_(factor)))
    if rows is not None and (found is None or found):
        dead = is_dead(moved, step.restart_thres, step.restart_thres_relative) & ~stays
        for some in dead.nonzero()[:, 0].split(size):
            for tensor in (embeddings, z_avg) if step.resets else (embeddings,):
                tensor[some] = rows[some]
        if step.resets:
            moved.masked_fill_(dead, 1)
    N.copy_(torch.where(stays, N, moved))
    return stays
