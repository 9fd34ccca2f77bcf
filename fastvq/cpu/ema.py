"""One step of the moving averages that a codebook learns by."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.choose import choose_backend, on_device_of
from fastvq.learning.restart import is_dead

# Codes are moved in pieces of so many values (1 MiB): what is computed on the way stays in the cache, and takes no
# memory that grows with the codebook.
_PIECE_VALUES = 1 << 18


def ema_step(
    embeddings: Tensor,
    N: Tensor,
    z_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    rows: Tensor | None = None,
    found: Tensor | None = None,
    *,
    decay: float,
    restart_thres: float = 1.0,
    restart_thres_relative: float | None = None,
    resets: bool = False,
    smoothing: float = 1e-7,
) -> None:
    """Move the codes to the averages of the tokens they win, in place.

    With ``γ = decay``, ``ε = smoothing`` and ``S = ΣN``, in float32, every operation rounded by itself::

        N_k ← γ N_k + (1 - γ) counts_k
        z_k ← γ z_k + (1 - γ) sums_k
        E_k ← z_k / ((N_k + ε) / (S + K ε) · S)

    Before any token was ever counted, ``S = 0``, codes and averages stay what they are.

    With ``rows``, and unless ``found`` is False, a code with ``N_k < restart_thres``, or with
    ``N_k < restart_thres_relative · S / K``, a share of the mean that does not depend on the size of a batch, then
    takes a new place: ``E_k ← rows_k``; with ``resets`` also ``z_k ← rows_k`` and ``N_k ← 1``, so that it is not
    moved again before it has had a chance to win tokens.

    Equal arguments give equal bits, in every process. Sources: van den Oord et al. 2017 (arXiv 1711.00937, appendix
    A.1); restarts as VideoGPT ``videogpt/vqvae.py``, resets as RQ-VAE ``rqvae/models/rqvae/quantizations.py``.

    Args:
        embeddings, z_avg: ``E`` and ``z``, float32 ``[K, D]``; written.
        N: float32 ``[K]``; written.
        counts, sums: float32 ``[K]`` and ``[K, D]``, as :func:`fastvq.code_statistics` gives them.
        rows: float32 ``[K, D]``, a new place for every code. Default: no restarts.
        found: bool, one element: whether ``rows`` may be used. Default: they may.
        decay: γ.
        restart_thres: in tokens per step.
        restart_thres_relative: in mean moving counts; takes the place of ``restart_thres``.
        resets: a restarted code also restarts its averages.
        smoothing: ε of the Laplace smoothing, in tokens: VideoGPT's and ESM3's by default.
    """
    with torch.no_grad(), on_device_of(embeddings):
        if choose_backend(embeddings.device)[0] == "triton" and _without_gaps(embeddings, N, z_avg):
            from fastvq_kernels.update import ema

            ema.ema_step(
                embeddings, N, z_avg, counts, sums, rows, found, decay=decay, restart_thres=restart_thres,
                restart_thres_relative=restart_thres_relative, resets=resets, smoothing=smoothing,
            )  # fmt: skip
            # PyTorch does not see what a kernel writes; a kept packed codebook is known to be old by this count.
            torch.autograd.graph.increment_version([embeddings, N, z_avg])
            return
        N.copy_(N * decay + counts * (1 - decay))
        total = N.sum()
        kept = torch.where(total > 0, decay, 1.0)
        weights = (N + smoothing) / (total + len(N) * smoothing) * total
        step = max(1, _PIECE_VALUES // embeddings.shape[1])
        pieces = [slice(first, first + step) for first in range(0, len(N), step)]
        for some in pieces:
            z, e = z_avg[some], embeddings[some]
            z.mul_(kept).add_(sums[some] * (1 - decay))
            e.copy_(torch.where(total > 0, z / weights[some, None], e))
        if rows is None:
            return
        rare = is_dead(N, restart_thres, restart_thres_relative)
        if found is not None:
            rare = rare & found.reshape(())
        for tensor in (embeddings, z_avg) if resets else (embeddings,):
            for some in pieces:
                tensor[some] = torch.where(rare[some, None], rows[some], tensor[some])
        if resets:
            N.copy_(torch.where(rare, 1, N))


def _without_gaps(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)
