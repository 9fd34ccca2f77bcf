"""A codebook that does not change, with what the searches have made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvq.backends.codebook_cache import Prepare
from fastvq.common.checks import check_codebook


class PreparedCodebook:
    """A copy of a codebook, made by :func:`prepare`, for many searches.

    What a search makes of the codes is kept from its first call on, for each backend, metric and stream: the price is
    paid once, and no call compares codes. Threads may share it. Pickles and copies hold the codes alone.

    Attributes:
        codes: ``[K, D]`` or ``[H, K, D]``, without gradient; must not be written to.
    """

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes
        self._made: dict[tuple[Any, ...], Any] = {}

    def keeping(self, prepare: Callable[[Tensor, str], Any]) -> Prepare[Any]:
        """``prepare(codes, metric)``, or its result of an earlier call. ``codes`` are these, or those of a head."""

        def prepare_once(codes: Tensor, metric: str) -> Any:
            stream = torch.cuda.current_stream(codes.device).cuda_stream if codes.is_cuda else None
            key = prepare, metric, codes.data_ptr(), codes.dim(), stream
            made = self._made.get(key)
            if made is None:
                made = prepare(codes, metric)
                # The memory of a CUDA graph that is being captured belongs to the graph.
                if stream is None or not torch.cuda.is_current_stream_capturing():
                    self._made[key] = made
            return made

        return prepare_once

    def __reduce__(self) -> tuple[type[PreparedCodebook], tuple[Tensor]]:
        return PreparedCodebook, (self.codes,)

    def __repr__(self) -> str:
        return f"PreparedCodebook({list(self.codes.shape)}, {self.codes.dtype}, {self.codes.device})"


def prepare(codebook: Tensor) -> PreparedCodebook:
    """Prepare a codebook that does not change for many searches; pass the result wherever a codebook is taken.

    Few tokens profit most: a call then costs little more than one product of tokens and codes. The results are the
    same. The codes are copied, so that later changes of ``codebook`` have no effect. No gradient flows to them.

    Args:
        codebook: codes ``[K, D]`` or ``[H, K, D]``, floating.

    Raises:
        TypeError: ``codebook`` is not a floating tensor.
        ValueError: ``codebook`` has another shape, or no code.
    """
    check_codebook(codebook)
    return PreparedCodebook(codebook.detach().clone(memory_format=torch.contiguous_format))
