"""The moving averages of a codebook, block by block."""

import torch

from fastvq.common.ema_step import EMAStep, is_dead
from fastvq.cpu import tuning


@torch.no_grad()
def ema_step(step: EMAStep) -> None:
    """:func:`fastvq.reference.ema_step`, the same bits, without temporaries as large as the codebook."""
    embeddings, N, z_avg, counts, sums, rows, found, decay, *_ = step
    N.copy_(N * decay + counts * (1 - decay))
    total = N.sum()
    kept = torch.where(total > 0, decay, 1.0)
    weights = (N + step.smoothing) / (total + len(N) * step.smoothing) * total
    size = max(1, tuning.EMA_VALUES // embeddings.shape[1])
    blocks = [slice(first, first + size) for first in range(0, len(N), size)]
    for block in blocks:
        z, e = z_avg[block], embeddings[block]
        z.mul_(kept).add_(sums[block] * (1 - decay))
        e.copy_(torch.where(total > 0, z / weights[block, None], e))
    if rows is None:
        return
    dead = is_dead(N, step.restart_thres, step.restart_thres_relative)
    if found is not None:
        dead = dead & found.reshape(())
    for tensor in (embeddings, z_avg) if step.resets else (embeddings,):
        for block in blocks:
            tensor[block] = torch.where(dead[block, None], rows[block], tensor[block])
    if step.resets:
        N.copy_(torch.where(dead, 1, N))
