"""What a backend is: search, statistics and moving averages on one kind of device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq.backends.codebook_cache import CodebookCache
from fastvq.backends.prepared import PreparedCodebook
from fastvq.common.ema_step import EMAStep
from fastvq.common.token_sums import TokenSums

# What keeps the packed codebook between calls.
Cache = CodebookCache | PreparedCodebook


class Backend(NamedTuple):
    """One implementation of the three operations. Arguments are checked before; none needs a gradient.

    Attributes:
        name: what users pass as ``backend=``.
        obstacle: ``(device)``; why this backend cannot run there, None where it can.
        prepare: ``(codebook, metric)``; the packed codebook that the search reads, which a cache keeps.
        nearest_code: ``(x, codebook, metric, cache)``; indices ``[..., N]`` of ``x [..., N, D]`` in
            ``codebook [..., K, D]``, with one or no leading dimension, equal to :func:`fastvq.reference.nearest_code`
            of each head. The cache may be None.
        code_statistics: ``(x, indices, n_codes, deterministic)``; counts ``[K]`` int64 and sums ``[K, D]`` float64 of
            ``x [N, D]`` by ``indices [N]``, where -1 is left out; on the CPU where the device of ``x`` has no float64.
            ``deterministic`` as in :func:`fastvq.code_statistics`.
        ema_step: ``(step)``; moves the codes in place and returns those that stayed, bool ``[K]``, as
            :func:`fastvq.reference.ema_step`.
        late_sums: on a CPU, ``ema_step`` takes sums that are not added up yet.
    """

    name: str
    obstacle: Callable[[torch.device], str | None]
    prepare: Callable[[Tensor, str], Any]
    nearest_code: Callable[[Tensor, Tensor, str, Cache | None], Tensor]
    code_statistics: Callable[[Tensor, Tensor, int, bool | None], tuple[Tensor, Tensor]]
    ema_step: Callable[[EMAStep], Tensor]
    late_sums: bool = False

    def statistics(
        self, x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None = None
    ) -> tuple[Tensor, Tensor | TokenSums]:
        """``code_statistics`` with sums as ``ema_step`` takes them."""
        if self.late_sums and x.device.type == "cpu":
            late = TokenSums(x, indices, n_codes)
            return late.counts(), late
        return self.code_statistics(x, indices, n_codes, deterministic)


def runs_anywhere(device: torch.device) -> None:
    """The obstacle of a backend that has none."""
