"""The certified search, the statistics and the moving averages in plain PyTorch: fast on CPUs, right on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.codebook_cache import CodebookCache
from fastvq.common.ema_step import EMAStep
from fastvq.common.precision import full_precision
from fastvq.cpu import ema, search, statistics


class TorchBackend:
    """The blocked PyTorch path."""

    name = "torch"

    def obstacle(self, device: torch.device) -> str | None:
        """None: PyTorch runs everywhere."""
        return None

    def prepare(self, codebook: Tensor, metric: str) -> search.Prepared:
        """The finite codes, packed with their bounds."""
        return search.prepare(codebook, metric)

    def nearest_code(self, x: Tensor, codebook: Tensor, metric: str, cache: CodebookCache | None = None) -> Tensor:
        """The certified search, one head after the other."""
        with full_precision(x.device):
            if x.dim() == 2:
                prepare_once = cache.keeping(self.prepare) if cache else None
                return search.nearest_code(x, codebook, metric, prepare_once)
            heads = zip(x, codebook, strict=True)
            return torch.stack([search.nearest_code(tokens, codes, metric) for tokens, codes in heads])

    def code_statistics(
        self, x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sums by ``index_add``; on a CPU always in the same order."""
        return statistics.code_statistics(x, indices, n_codes, deterministic)

    def ema_step(self, step: EMAStep) -> None:
        """Block by block, so that temporaries stay in the cache."""
        ema.ema_step(step)
