"""The straight-through estimator with its commitment loss, as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class StraightThrough(torch.autograd.Function):
    """Forward: the codes, and ``w · mean (x - e)²``. Backward: identity to ``x``, plus the commitment term.

    ``∂L/∂x = ∂L/∂quantized + ∂L/∂loss · 2w(x - e)/(n·D)`` with n the number of tokens that have a code
    (Bengio et al. 2013, arXiv 1308.3432; van den Oord et al. 2017, arXiv 1711.00937).

    Only the residual ``x - e`` is kept for the backward. The codebook is not: its EMA update happens in place
    between forward and backward. No gradient flows to the codes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, indices: Tensor, mask: Tensor | None, weight: float
    ) -> tuple[Tensor, Tensor]:
        """Values and loss.

        Args:
            x: tokens ``[..., D]``.
            codes: the code of each token ``[..., D]``; any values where ``indices`` is -1.
            indices: int64 ``[...]``, -1 for a token without a code.
            mask: bool ``[...]``, False for padding: zero output, zero gradient. None is all True.
            weight: ``w``.

        Returns:
            ``quantized [..., D]`` in the dtype of ``x`` (NaN where an unmasked token has no code) and the
            scalar loss, float32 (float64 for float64 ``x``).
        """
        found = (indices >= 0)[..., None]
        precise = torch.promote_types(x.dtype, torch.float32)
        residual = torch.where(found, x.to(precise) - codes.to(precise), 0)
        scale = weight / (found.sum() * x.shape[-1]).clamp(min=1).to(precise)
        # Compiled by PyTorch 2.11, an output without x in it would pass no gradient.
        nothing = x * torch.nan if torch.compiler.is_compiling() else torch.nan
        quantized = torch.where(found, codes.to(x.dtype), nothing)
        if mask is not None:
            quantized = torch.where(mask[..., None], quantized, 0)
        # The scale stays outside: 2w/(n·D) would underflow in float16.
        ctx.save_for_backward(residual.to(x.dtype), 2 * scale, mask)
        return quantized, residual.square().sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_quantized: Tensor, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Gradient of the tokens; the codes get none."""
        residual, scale, mask = ctx.saved_tensors
        grad = grad_quantized if mask is None else torch.where(mask[..., None], grad_quantized, 0)
        # The factor is a tensor without dimensions and would otherwise take part in type promotion only by value.
        return (grad + (grad_loss * scale) * residual.to(scale.dtype)).to(residual.dtype), None, None, None, None
