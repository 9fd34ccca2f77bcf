"""The moving averages of a codebook, block by block."""

import torch

from fastvq.common.ema_step import EMAStep, is_dead
from fastvq.cpu import tuning


@torch.no_grad()
def ema_step(step: EMAStep) -> None:
    """:func:`fastvq.reference.ema_step`, the same bits, without temporaries as large as the codebook."""
    embeddings, N, z_avg, counts, sums, rows, found, decay, *_ = step
    moved = N.double().mul_(decay).add_(counts * (1 - decay))
    N.copy_(moved)
    total = moved.sum()
    weights = (moved + step.smoothing).div_(total + len(N) * step.smoothing).mul_(total)
    size = max(1, tuning.EMA_VALUES // embeddings.shape[1])
    blocks = [slice(first, first + size) for first in range(0, len(N), size)]
    for block in blocks:
        z, e = z_avg[block], embeddings[block]
        average = z.double().mul_(decay).add_(sums[block] * (1 - decay))
        z.copy_(torch.where(total > 0, average.float(), z))
        e.copy_(torch.where(total > 0, average.div_(weights[block, None]).float(), e))
    if rows is None:
        return
    dead = is_dead(moved, step.restart_thres, step.restart_thres_relative)
    if found is not None:
        dead = dead & found.reshape(())
    for tensor in (embeddings, z_avg) if step.resets else (embeddings,):
        for block in blocks:
            tensor[block] = torch.where(dead[block, None], rows[block], tensor[block])
    if step.resets:
        N.copy_(torch.where(dead, 1, N))
