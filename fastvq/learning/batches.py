"""Tokens to learn from, batch by batch."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fastvq.common.checks import check_same_device
from fastvq.common.directions import directions

# Tokens [n, D] float32 and which are real, bool [n], batch by batch; iterated more than once.
TokenBatches = Iterable[tuple[Tensor, Tensor]]


class Batches:
    """One tensor with its mask, or an iterable of tensors, as flattened batches; can be read many times.

    ``prepare`` checks and flattens a tensor and its mask.

    Raises:
        TypeError: ``x`` is an iterator, which can be read only once, or no iterable.
        ValueError: ``x`` and ``mask`` do not fit; while iterating: there is no batch, or batches differ in D or device.
    """

    def __init__(
        self,
        x: Tensor | Iterable[Tensor],
        mask: Tensor | None,
        prepare: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
    ) -> None:
        if isinstance(x, Iterator) or not isinstance(x, (Tensor, Iterable)):
            raise TypeError(
                f"x must be a tensor or an iterable that can be read more than once (a list, a DataLoader), got "
                f"{'the iterator ' if isinstance(x, Iterator) else ''}{type(x).__name__}"
            )
        if mask is not None and not isinstance(x, Tensor):
            raise ValueError("mask must be None where x is an iterable of batches; select the real tokens of each")
        self._batches = [x] if isinstance(x, Tensor) else x
        self._mask = mask
        self._prepare = prepare

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first = None
        for batch in self._batches:
            tokens, real = self._prepare(batch, self._mask)
            first = tokens if first is None else first
            if tokens.shape[1] != first.shape[1]:
                raise ValueError(f"x must hold batches of one dimension, got {first.shape[1]} and {tokens.shape[1]}")
            check_same_device("x", tokens, first)
            yield tokens, real
        if first is None:
            raise ValueError("x must hold at least one batch, got none")


class Moved:
    """``batches`` on ``device``."""

    def __init__(self, batches: TokenBatches, device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for tokens, real in self._batches:
            yield tokens.to(self._device), real.to(self._device)


def flatten(tokens: Tensor, mask: Tensor | None, metric: str) -> tuple[Tensor, Tensor]:
    """Tokens as float32 ``[n, D]``, of norm 1 for the cosine, and which are real and finite, bool ``[n]``."""
    rows = tokens.detach().reshape(-1, tokens.shape[-1]).float()
    real = torch.isfinite(rows).all(1)
    return directions(rows) if metric == "cosine" else rows, real if mask is None else real & mask.reshape(-1)
