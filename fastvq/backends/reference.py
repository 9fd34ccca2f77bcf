"""The formulas of :mod:`fastvq.reference` as a backend: slow, and right by definition."""

import torch
from torch import Tensor

from fastvq import reference
from fastvq.backends.base import Backend, Cache, runs_anywhere
from fastvq.common.precision import full_precision


def _prepare(codebook: Tensor, metric: str) -> Tensor:
    return codebook


def _nearest_code(x: Tensor, codebook: Tensor, metric: str, cache: Cache | None) -> Tensor:
    if x.dim() == 2:
        return reference.nearest_code(x, codebook, metric)
    return torch.stack([reference.nearest_code(*head, metric) for head in zip(x, codebook, strict=True)])


def _code_statistics(x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None) -> tuple[Tensor, Tensor]:
    with full_precision(x.device):
        return reference.add_up(x, indices, n_codes)


REFERENCE = Backend("reference", runs_anywhere, _prepare, _nearest_code, _code_statistics, reference.ema_step)
