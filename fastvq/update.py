"""The EMA update of a codebook, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.restart import is_dead

# Laplace smoothing of the counts, in tokens: VideoGPT's and ESM3's constant.
_SMOOTHING = 1e-7


def ema_step(
    embeddings: Tensor,
    N: Tensor,
    z_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    rows: Tensor | None = None,
    found: Tensor | None = None,
    restart_thres: float = 1.0,
    restart_thres_relative: float | None = None,
    resets: bool = False,
) -> None:
    """Move the codes towards the tokens they won; the formulas stand in :class:`fastvq.EMACodebook`.

    Args:
        embeddings, N, z_avg: the state ``[K, D]``, ``[K]``, ``[K, D]``, float32, changed in place.
        counts, sums: ``[K]`` and ``[K, D]``, float32, of the tokens of this step.
        decay: γ.
        rows: ``[K, D]``, what a dead code restarts from. None: no restart.
        found: scalar bool, whether ``rows`` hold tokens.
        restart_thres: a code is dead below this moving count.
        restart_thres_relative: share of the mean moving count; if given, it replaces ``restart_thres``.
        resets: restarted codes get ``N = 1`` and ``z_avg`` = their row.
    """
    N.mul_(decay).add_(counts, alpha=1 - decay)
    z_avg.mul_(decay).add_(sums, alpha=1 - decay)
    n = N.sum()
    weights = (N + _SMOOTHING) / (n + len(N) * _SMOOTHING) * n
    # Before any token was ever counted there is nothing to divide by.
    codes = torch.where(n > 0, z_avg / weights[:, None], embeddings)
    if rows is not None and found is not None:
        restarts = is_dead(N, restart_thres, restart_thres_relative) & found
        codes = torch.where(restarts[:, None], rows, codes)
        if resets:
            N.masked_fill_(restarts, 1)
            z_avg.copy_(torch.where(restarts[:, None], rows, z_avg))
    embeddings.copy_(codes)
