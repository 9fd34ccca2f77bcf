"""What a backend is: search, statistics and moving averages on one kind of device."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastvq.backends.codebook_cache import CodebookCache
from fastvq.common.ema_step import EMAStep


class Operations(Protocol):
    """The three operations, on arguments that are known to be right."""

    def nearest_code(self, x: Tensor, codebook: Tensor, metric: str, cache: CodebookCache | None = None) -> Tensor:
        """Indices ``[..., N]`` of ``x [..., N, D]`` in ``codebook [..., K, D]``, with one or no leading dimension.

        Exactly :func:`fastvq.reference.nearest_code` per head. Neither tensor may need a gradient. ``cache`` keeps the
        packed codebook ``[K, D]`` for the next call.
        """

    def code_statistics(
        self, x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Counts ``[K]`` and sums ``[K, D]``, float32, of ``x [N, D]`` by ``indices [N]``; -1 is left out.

        ``deterministic=True`` fixes the order of the float32 additions. None leaves it to the global setting of
        PyTorch, and otherwise to what is faster.
        """

    def ema_step(self, step: EMAStep) -> None:
        """Move the codes in place, as :class:`fastvq.common.ema_step.EMAStep` says."""


class Backend(Operations, Protocol):
    """An implementation of the three operations."""

    @property
    def name(self) -> str:
        """What users pass as ``backend=``."""

    def obstacle(self, device: torch.device) -> str | None:
        """Why this backend cannot run on ``device``; None where it can."""

    def prepare(self, codebook: Tensor, metric: str) -> Any:
        """The packed codebook that the search reads: what a cache keeps."""
