"""One step of the moving averages that a codebook learns by, as a record, and which codes are dead."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.common.token_sums import TokenSums

# From here on, halfway between float32's largest number and the next power of two, numbers round to infinity.
INFINITE = 2.0**128 - 2.0**103


class EMAStep(NamedTuple):
    """Moves codes to the averages of the tokens they win, in place.

    With ``γ = decay``, ``ε = smoothing`` and ``S = ΣN``, in float64, every operation rounded by itself, and the results
    once to float32::

        N_k, z_k ← 1, E_k   where N_k = 0 and counts_k > 0: the average of a code starts where the code is
        N_k ← γ N_k + (1 - γ) counts_k
        z_k ← γ z_k + (1 - γ) sums_k
        E_k ← z_k · (1 / w_k),   w_k = (N_k + ε) / (S + K ε) · S

    A code and its average stay what they are, whatever that is, while ``N_k = 0``. A code whose new ``z_k`` or ``E_k``
    is not finite in float32 stays where it is, with the ``N_k`` and ``z_k`` of before (:func:`must_stay`); ``S`` counts
    its tokens.

    With ``rows``, and unless ``found`` is False, a dead code (:func:`is_dead`) then takes a new place,
    ``E_k ← rows_k``. With ``resets`` it also gets ``z_k ← rows_k`` and ``N_k ← 1``, so that it stays there until it has
    had a chance to win tokens.

    Equal steps give equal bits in every process. Sources: van den Oord et al. 2017 (arXiv 1711.00937, appendix A.1);
    restarts as VideoGPT ``videogpt/vqvae.py``; resets as RQ-VAE ``rqvae/models/rqvae/quantizations.py``.
    """

    embeddings: Tensor  # E, float32 [K, D]; written
    N: Tensor  # float32 [K]; written
    z_avg: Tensor  # z, float32 [K, D]; written
    counts: Tensor  # float64 [K], tokens of each code
    sums: Tensor | TokenSums  # float64 [K, D], their sums; TokenSums for a backend with late_sums alone
    rows: Tensor | None  # float32 [K, D], a new place for every code; None: no restarts
    found: Tensor | None  # bool, one element: whether rows may be used; None: they may
    decay: float  # γ
    restart_thres: float = 1.0  # tokens per step
    restart_thres_relative: float | None = None  # in mean counts S / K; takes the place of restart_thres
    resets: bool = False  # a restarted code also restarts its averages
    smoothing: float = 1e-7  # ε of the Laplace smoothing, in tokens: VideoGPT's and ESM3's

    def all_sums(self) -> Tensor:
        """``sums`` as one tensor."""
        return self.sums.all() if isinstance(self.sums, TokenSums) else self.sums


def counts_before(N: Tensor, counts: Tensor) -> Tensor:
    """``N`` in float64, and 1 for a code whose average starts with this step."""
    return torch.where(N > 0, N, (counts > 0).to(N.dtype)).double()


def is_dead(N: Tensor, restart_thres: float, restart_thres_relative: float | None) -> Tensor:
    """Rarely used codes, bool ``[K]``: ``N_k < restart_thres``, or ``N_k < restart_thres_relative · ΣN / K``."""
    return N < (restart_thres if restart_thres_relative is None else N.sum() * (restart_thres_relative / len(N)))


def must_stay(averages: Tensor, factors: Tensor) -> Tensor:
    """Codes that a step leaves alone, bool ``[K]``: ``z_k`` or ``z_k · (1 / w_k)`` is not finite in float32.

    ``averages [K, D]`` and ``factors [K]``, the ``1 / w_k``, are float64.
    """
    largest = averages.abs().amax(1)
    # NaN is below nothing. The products are ordered as the averages are.
    return ~((largest < INFINITE) & (largest * factors < INFINITE))
