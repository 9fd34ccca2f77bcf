"""The straight-through estimator, and the commitment loss beside it."""

from typing import Any

import torch
from torch import Tensor


def straight_through(
    x: Tensor, codes: Tensor, indices: Tensor, mask: Tensor | None, passes_gradient: bool = True
) -> Tensor:
    """:class:`StraightThrough` made of plain operators, for calls that are recorded: arguments and result as there."""
    quantized = torch.where(indices[..., None] >= 0, codes.to(x.dtype), torch.nan)
    if passes_gradient:
        # x - x is 0, and NaN beside NaN: values stay as they are.
        quantized = quantized + (x - x.detach())
    return quantized if mask is None else torch.where(mask[..., None], quantized, 0)


class StraightThrough(torch.autograd.Function):
    """The codes forward, the identity to the tokens backward: ``∂L/∂x = ∂L/∂quantized``.

    Nothing but the mask is kept for the backward, and no gradient flows to the codes (Bengio et al. 2013,
    arXiv 1308.3432; van den Oord et al. 2017, arXiv 1711.00937).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
        """``quantized [..., D]`` in the dtype of ``x``.

        Args:
            x: tokens ``[..., D]``.
            codes: the code of each token ``[..., D]``; any values where ``indices`` is -1.
            indices: int64 ``[...]``, -1 for a token without a code, which gets NaN.
            mask: bool ``[...]``, False for padding: zero output, zero gradient.
        """
        ctx.save_for_backward(mask)
        return straight_through(x, codes, indices, mask, passes_gradient=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of the tokens; the codes get none."""
        (mask,) = ctx.saved_tensors
        return grad if mask is None else torch.where(mask[..., None], grad, 0), None, None, None


def commitment_loss(x: Tensor, codes: Tensor, indices: Tensor, weight: float) -> Tensor:
    """``w · mean (x - e)²`` over the tokens ``x [..., D]`` that have a code, at least float32; 0 without any.

    Arguments as in :meth:`StraightThrough.forward`. Only the residual ``x - e`` is kept for the backward: the update
    of the codebook happens in place between forward and backward.
    """
    found = (indices >= 0)[..., None]
    precise = torch.promote_types(x.dtype, torch.float32)
    residual = torch.where(found, x.to(precise) - codes.to(precise), 0)
    return residual.square().sum() * (weight / (found.sum() * x.shape[-1]).clamp(min=1).to(precise))
