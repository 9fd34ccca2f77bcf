"""Directions: what a codebook with the cosine metric learns from and holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """``x / |x|`` over the last dimension, at least float32; zero stays zero."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Squares of large coordinates would overflow, those of small ones vanish. A direction has no length to derive.
    largest = x.detach().abs().amax(-1, keepdim=True)
    return F.normalize(x / largest.masked_fill(largest == 0, 1.0), dim=-1)


def unit_or(codes: Tensor, before: Tensor) -> Tensor:
    """``codes [K, D]`` of norm 1; where one has shrunk to nothing, because it won no token for long, ``before``."""
    norms = torch.linalg.vector_norm(codes, dim=1, keepdim=True)
    return torch.where(norms > 1e-15, codes / norms, before)
