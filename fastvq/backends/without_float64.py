"""A backend for tensors of a device that has no float64: the CPU does its work."""

from functools import cache as once
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastvq.backends.base import Backend, Cache
from fastvq.backends.prepared import PreparedCodebook
from fastvq.common.ema_step import EMAStep

_copies: WeakKeyDictionary[PreparedCodebook, PreparedCodebook] = WeakKeyDictionary()


@once
def on_cpu(backend: Backend) -> Backend:
    """``backend`` on copies of its arguments; indices go back to the device of the tokens, and so does the state.

    Sums, which are float64, stay on the CPU, where the next step of the moving averages reads them.
    """

    def prepare(codebook: Tensor, metric: str) -> Any:
        return backend.prepare(codebook.cpu(), metric)

    def nearest_code(x: Tensor, codebook: Tensor, metric: str, cache: Cache | None) -> Tensor:
        if isinstance(cache, PreparedCodebook):  # which knows its codes by their memory
            cache = _copy_of(cache)
            codebook = cache.codes
        return backend.nearest_code(x.cpu(), codebook.cpu(), metric, cache).to(x.device)

    def code_statistics(x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None) -> tuple[Tensor, Tensor]:
        return backend.code_statistics(x.cpu(), indices.cpu(), n_codes, deterministic)

    def ema_step(step: EMAStep) -> Tensor:
        copies = EMAStep._make(value.cpu() if isinstance(value, Tensor) else value for value in step)
        stayed = backend.ema_step(copies)
        with torch.no_grad():
            for tensor, moved in zip(step[:3], copies[:3], strict=True):
                tensor.copy_(moved)
        return stayed.to(step.N.device)

    return Backend(backend.name, backend.obstacle, prepare, nearest_code, code_statistics, ema_step)


def _copy_of(prepared: PreparedCodebook) -> PreparedCodebook:
    copy = _copies.get(prepared)
    if copy is None:
        copy = _copies[prepared] = PreparedCodebook(prepared.codes.cpu())
    return copy
