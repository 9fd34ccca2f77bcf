"""Whether a call computes, or is recorded to be computed later."""

from __future__ import annotations

import torch
from torch import Tensor


def is_traced(x: Tensor) -> bool:
    """Whether operations on ``x`` are recorded, by a compiler or a wrapper of tensors, or have no values."""
    is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return is_recorded or type(x) is not Tensor or x.is_meta


def may_read(tensor: Tensor) -> bool:
    """Whether a branch may depend on its value."""
    return not torch.compiler.is_compiling() and not tensor.is_meta
