"""The formulas of :mod:`fastvq.reference` as a backend: slow, and right by definition."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import reference
from fastvq.backends.codebook_cache import CodebookCache
from fastvq.common.ema_step import EMAStep
from fastvq.common.precision import full_precision


class ReferenceBackend:
    """The float64 oracle, the one-hot statistics and the moving averages as published."""

    name = "reference"

    def obstacle(self, device: torch.device) -> str | None:
        """None: PyTorch runs everywhere."""
        return None

    def prepare(self, codebook: Tensor, metric: str) -> Tensor:
        """The codebook as it is."""
        return codebook

    def nearest_code(self, x: Tensor, codebook: Tensor, metric: str, cache: CodebookCache | None = None) -> Tensor:
        """The oracle, one head after the other."""
        if x.dim() == 2:
            return reference.nearest_code(x, codebook, metric)
        return torch.stack([reference.nearest_code(*head, metric) for head in zip(x, codebook, strict=True)])

    def code_statistics(
        self, x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Products with the one-hot matrix ``[N, K]``."""
        with full_precision(x.device):
            return reference.code_statistics(x, indices, n_codes)

    def ema_step(self, step: EMAStep) -> None:
        """The formulas, each on the whole codebook."""
        reference.ema_step(step)
