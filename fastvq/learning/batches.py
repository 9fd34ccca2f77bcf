"""Tokens to learn from, batch by batch."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq.common.checks import check_same_device, describe
from fastvq.common.directions import directions

# Tokens [n, D] of one dtype and which are real, bool [n], batch by batch; iterated more than once.
TokenBatches = Iterable[tuple[Tensor, Tensor]]


class Batches:
    """One tensor with its mask, or an iterable of batches, as flattened batches; can be read many times.

    A batch is a tensor, a NumPy array, or a tuple or list of one of them, as ``DataLoader(TensorDataset(x))`` gives it.
    ``prepare`` checks and flattens a tensor and its mask.

    Attributes:
        is_fixed: whether every pass reads the same batches in the same order; a DataLoader may shuffle.
        shapes: the leading shapes of the batches that the last pass has read.

    Raises:
        TypeError: ``x`` is an iterator, which can be read only once, or no iterable.
        ValueError: ``x`` and ``mask`` do not fit; while iterating: there is no batch, or batches differ in D, dtype or
            device.
    """

    def __init__(
        self, x: Any, mask: Tensor | None, prepare: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    ) -> None:
        x = as_tensor(x)
        if isinstance(x, Iterator) or not isinstance(x, (Tensor, Iterable)):
            raise TypeError(
                f"x must be a tensor or an iterable that can be read more than once (a list, a DataLoader), got "
                f"{'the iterator ' if isinstance(x, Iterator) else ''}{type(x).__name__}"
            )
        if mask is not None and not isinstance(x, Tensor):
            raise ValueError("mask must be None where x is an iterable of batches; select the real tokens of each")
        self._x = x
        self._mask = mask
        self._prepare = prepare
        self._prepared: tuple[Tensor, Tensor] | None = None  # one tensor is prepared once
        self.is_fixed = isinstance(x, (Tensor, list, tuple))
        self.shapes: list[torch.Size] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self._x, Tensor):
            self._prepared = self._prepared or self._prepare(self._x, self._mask)
            self.shapes = [self._x.shape[:-1]]
            yield self._prepared
            return
        first, self.shapes = None, []
        for batch in self._x:
            x = _only_tensor(batch)
            tokens, real = self._prepare(x, None)
            first = tokens if first is None else first
            if tokens.shape[1] != first.shape[1]:
                raise ValueError(f"x must hold batches of one dimension, got {first.shape[1]} and {tokens.shape[1]}")
            if tokens.dtype != first.dtype:
                raise ValueError(f"x must hold batches of one precision, got {first.dtype} and {tokens.dtype}")
            check_same_device("x", tokens, first)
            self.shapes.append(x.shape[:-1])
            yield tokens, real
        if first is None:
            raise ValueError("x must hold at least one batch, got none")


def as_tensor(value: Any) -> Any:
    """A NumPy array as a tensor, on its memory where PyTorch can use that; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    # PyTorch takes no negative strides, and warns of arrays that may not be written.
    return torch.from_numpy(np.require(value, requirements=["C", "W"]))


def _only_tensor(batch: Any) -> Any:
    """The tensor of a batch, which may come alone in a tuple or a list."""
    if isinstance(batch, (tuple, list)):
        if len(batch) != 1:
            kinds = ", ".join(map(describe, batch))
            raise TypeError(f"x must hold batches of one tensor each, got a {type(batch).__name__} of ({kinds})")
        batch = batch[0]
    return as_tensor(batch)


def flatten(
    tokens: Tensor, mask: Tensor | None, metric: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Tokens as ``[n, D]`` of ``dtype``, of norm 1 for the cosine, and which can be learned from, bool ``[n]``.

    Those are the real tokens that are finite in ``dtype`` and, for the cosine, have a direction: are not zero.
    """
    rows = tokens.detach().reshape(-1, tokens.shape[-1]).to(dtype)
    low, high = torch.aminmax(rows, dim=1)  # NaN where there is one; unlike isfinite without temporaries of [n, D]
    real = (low > -torch.inf) & (high < torch.inf)
    if mask is not None:
        real = real & mask.reshape(-1)
    if metric == "cosine":
        return directions(rows), real & ((low != 0) | (high != 0))
    return rows, real
