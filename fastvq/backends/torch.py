"""The certified search, the statistics and the moving averages in plain PyTorch: fast on CPUs, right on any device."""

import torch
from torch import Tensor

from fastvq import reference
from fastvq.backends.base import Backend, Cache, runs_anywhere
from fastvq.common.ema_step import EMAStep
from fastvq.common.precision import full_precision
from fastvq.cpu import ema, search, statistics


def _nearest_code(x: Tensor, codebook: Tensor, metric: str, cache: Cache | None) -> Tensor:
    prepare_once = cache.keeping(search.prepare) if cache else None
    with full_precision(x.device):
        if x.dim() == 2:
            return search.nearest_code(x, codebook, metric, prepare_once)
        heads = zip(x, codebook, strict=True)
        return torch.stack([search.nearest_code(tokens, codes, metric, prepare_once) for tokens, codes in heads])


def _ema_step(step: EMAStep) -> Tensor:
    return (ema if step.N.device.type == "cpu" else reference).ema_step(step)


TORCH = Backend("torch", runs_anywhere, search.prepare, _nearest_code, statistics.code_statistics, _ema_step, True)
