"""The quantizer of Moshi (kyutai-labs/moshi, ``EuclideanCodebook``): ``cdist``, ``argmin``, ``scatter_add``.

Written here after its semantics, without the replacement of expired codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders.base import Contender, Prepared, torch_version, training
from bench.harness.problems import Problem

_DECAY = 0.99
_LEAST_USAGE = 1e-5


def train(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """Search, straight-through gradient, commitment loss, and moving averages of counts and sums."""
    usage = torch.ones(problem.codes, device=codebook.device)
    sums = codebook.float().clone()

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = sums / usage.clamp(min=_LEAST_USAGE)[:, None]
        flat = x.detach()
        indices = torch.cdist(flat[None], codes[None])[0].argmin(-1)
        quantized = F.embedding(indices, codes)
        counted = torch.zeros_like(usage).scatter_add_(0, indices, torch.ones_like(flat[:, 0]))
        added = torch.zeros_like(sums).scatter_add_(0, indices[:, None].expand_as(flat), flat)
        usage.mul_(_DECAY).add_(counted, alpha=1 - _DECAY)
        sums.mul_(_DECAY).add_(added, alpha=1 - _DECAY)
        return x + (quantized - x).detach(), indices, F.mse_loss(x, quantized)

    return training(batches, forward)


CONTENDER = Contender(torch_version, train=train)
