"""The coordinates of a token come last, or, as in convolutions, after the batch dimension."""

import torch
from torch import Tensor

from fastvq.backends.operators import is_jit_tracing
from fastvq.common.checks import describe


def tokens_last(z: Tensor, dim: int, channel_first: bool) -> Tensor:
    """A view ``[..., D]`` of ``z [..., D]``, or of ``z [b, D, ...]`` where ``channel_first``.

    Raises:
        TypeError, ValueError: ``z`` is not a floating-point tensor of that shape.
    """
    if not isinstance(z, Tensor) or not z.is_floating_point():
        raise TypeError(f"z must be a floating-point tensor, got {describe(z)}")
    if channel_first:
        if z.dim() < 2 or z.shape[1] != dim:
            raise ValueError(f"z must be [b, {dim}, ...] to match embedding_dim, got {list(z.shape)}")
        return z.movedim(1, -1)
    if z.shape[-1:] != (dim,):
        raise ValueError(f"z must be [..., {dim}] to match embedding_dim, got {list(z.shape)}")
    return z


def as_given(tokens: Tensor, z: Tensor, channel_first: bool) -> Tensor:
    """``tokens [..., D]`` in the layout and memory format of ``z``: ``.view`` works where it works on ``z``."""
    if not channel_first:
        return tokens
    if is_jit_tracing():  # the older exporter to ONNX knows no copy into a tensor and no dimension -1 here
        return tokens.movedim(tokens.dim() - 1, 1).contiguous()
    return torch.empty_like(z.detach(), dtype=tokens.dtype).copy_(tokens.movedim(-1, 1))
