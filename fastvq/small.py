"""Search without packing, where packing the codebook would cost more than computing with the codes as they are.

:mod:`fastvq.cpu` derives the bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.candidates import (
    MOST_ROWS,
    at_most,
    is_crowded,
    only_row,
    only_rows,
    places,
    row_weights,
    with_several,
)
from fastvq.packed import LARGEST_NORM, error_constant
from fastvq.products import product
from fastvq.settle import settle

# Up to so many tokens, or scores (4 MiB). Measured: 1.9 ms against 3.6 with 640 x 256 x 32, and 16 ms against 26 with
# 900 x 1,024 x 1,024.
FEW_TOKENS = 16
FEW_SCORES = 1 << 20
# With more pairs than this to settle, the sharper bounds of a packed codebook are worth their price.
_FEW_PAIRS = 1 << 12


def fits(x: Tensor, codebook: Tensor, metric: str) -> bool:
    """Whether ``x [N, D]`` and ``codebook [K, D]`` are a problem for :func:`search`."""
    few = (len(x) <= FEW_TOKENS and len(codebook) <= MOST_ROWS) or len(x) * len(codebook) <= FEW_SCORES
    return few and metric == "euclidean" and torch.float64 not in (x.dtype, codebook.dtype)


def search(x: Tensor, codebook: Tensor) -> Tensor | None:
    """Indices ``[N]`` int64, exact, of ``x [N, D]`` in ``codebook [K, D]`` by squared distance.

    All scores, with ``m = 0`` and ``s = 1``, and the bound of the largest norms, ``c(a·b + h)``. None where a token or
    a code may leave float32's range, and where the bound keeps too many codes.
    """
    dim = x.shape[1]
    x32, codes = x.float(), codebook.float()
    norms = torch.linalg.vector_norm(codes, dim=1)
    a = float(torch.linalg.vector_norm(x32, dim=1).amax()) + 2.0**-62 * dim**0.5
    b = float(norms.amax()) + 2.0**-62 * dim**0.5
    if not (a < LARGEST_NORM and b < LARGEST_NORM):  # nor NaN
        return None
    score = product(x32, codes, norms.square_().mul_(-0.5))
    # Here coordinates and products may be subnormal, and be taken for 0.
    slack = (dim + 16) * 2.0**-126 * (1 + a + b) + 4 * (dim + 4) * 2.0**-53 * a * a
    margin = 2 * error_constant(dim) * (a * b + 0.5 * b * b) + slack
    reaches = score.ge_(score.amax(1, keepdim=True) - margin)
    sums = torch.mv(reaches, row_weights(len(codes), x.device))
    if (indices := only_rows(sums)) is not None:
        return indices
    indices = only_row(sums)
    several = with_several(sums)
    if is_crowded(sums).any() or at_most(sums.index_select(0, several)) > _FEW_PAIRS:
        return None
    if len(several):
        pairs, candidates = places(reaches.index_select(0, several))
        settle(x, codebook, several.index_select(0, pairs), candidates, "euclidean", out=indices)
    return indices
