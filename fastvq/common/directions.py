"""Directions, rows of norm 1: the tokens and the codes of a codebook with the cosine metric."""

import torch
import torch.nn.functional as F
from torch import Tensor


def directions(x: Tensor) -> Tensor:
    """``x / |x|`` over the last dimension, at least float32; zero stays zero."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Squares of large coordinates would overflow, squares of small ones vanish. A direction does not depend on the
    # length, so the divisor needs no gradient.
    largest = x.detach().abs().amax(-1, keepdim=True)
    return F.normalize(x / largest.masked_fill(largest == 0, 1.0), dim=-1)


def directions_or(codes: Tensor, before: Tensor) -> Tensor:
    """Directions of ``codes [K, D]``; rows of ``before`` for codes that have shrunk to nothing without tokens."""
    norms = torch.linalg.vector_norm(codes, dim=1, keepdim=True)
    return torch.where(norms > 1e-15, codes / norms, before)
