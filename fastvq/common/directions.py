"""Directions, rows of norm 1: the tokens and the codes of a codebook with the cosine metric."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.common.precision import at_least_float32


def directions(x: Tensor) -> Tensor:
    """``u = x / |x|`` over the last dimension, at least float32; zero stays zero.

    ``∂L/∂x = (g - u (u·g)) / |x|`` with ``g = ∂L/∂u``, but 0 where no coordinate of ``x`` is a normal number of its
    dtype: zero has no direction, and that of rounding errors is nothing to learn from. The largest number of a format
    is about four times the inverse of its smallest normal one, so no gradient overflows while ``|g| < 3.5``.
    """
    largest = x.detach().to(at_least_float32(x.dtype)).abs().amax(-1, keepdim=True)
    if x.requires_grad:
        x = torch.where(largest < torch.finfo(x.dtype).tiny, x.detach(), x)
    # Squares of large coordinates would overflow, squares of small ones vanish. A direction does not depend on the
    # length, so the divisor needs no gradient.
    return F.normalize(x.to(largest.dtype) / largest.masked_fill(largest == 0, 1.0), dim=-1)


def has_direction(x: Tensor) -> Tensor:
    """Which rows of ``x [..., D]`` are not zero, bool ``[...]``."""
    return x.detach().abs().amax(-1) > 0


def directions_or(codes: Tensor, before: Tensor) -> Tensor:
    """Directions of ``codes [K, D]``; rows of ``before`` for codes that have shrunk to nothing without tokens."""
    norms = torch.linalg.vector_norm(codes, dim=1, keepdim=True)
    return torch.where(norms > 1e-15, codes / norms, before)
