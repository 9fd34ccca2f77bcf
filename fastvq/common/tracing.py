"""Whether a call computes, or is recorded to be computed later."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter


def is_traced(x: Tensor) -> bool:
    """Whether a compiler or a tensor subclass records operations on ``x``, or ``x`` has no values."""
    is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return is_recorded or type(x) not in (Tensor, Parameter) or x.is_meta


def may_read(tensor: Tensor) -> bool:
    """Whether a branch may depend on the value of ``tensor``."""
    return not torch.compiler.is_compiling() and not tensor.is_meta
