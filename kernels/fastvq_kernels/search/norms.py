"""Float64 norms of the codes with the oracle's order of summation (cosine only)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv


@triton.jit(do_not_specialize=["K"])
def code_norms_kernel(codes, out, inverse, K, D, BK: tl.constexpr, LONGEST: tl.constexpr):
    """One program sums e_kj^2 over ascending j, each square and addition rounded, for BK codes of one head."""
    i_k, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    b_sum = tl.zeros([BK], tl.float64)
    for j in range(D):
        b_e = tl.load(codes + (i_h * K + o_k) * D + j, mask=m_k, other=0.0).to(tl.float64)  # [BK]
        b_sum += b_e * b_e
    b_norm = tl.sqrt(b_sum)  # correctly rounded in float64
    tl.store(out + i_h * K + o_k, b_norm, mask=m_k)
    # A zero code has similarity 0, which the inverse 0 gives as well. An inverse below the normal numbers is not
    # precise: with an infinite one the code is outside the range.
    b_inverse = tl.where(b_norm <= LONGEST, 1.0 / b_norm, float("inf"))
    tl.store(inverse + i_h * K + o_k, tl.where(b_norm > 0.0, b_inverse, 0.0), mask=m_k)


def code_norms(codes: Tensor, out: Tensor, inverse: Tensor) -> None:
    """Write sqrt(sum_j e_kj^2) of dense codes [H, K, D] to out [H, K] float64, and the inverse of it, 0 or inf."""
    H, K, D = codes.shape
    longest = 2.0**126 if inverse.dtype == torch.float32 else 2.0**1022
    code_norms_kernel[(cdiv(K, 128), H)](codes, out, inverse, K, D, BK=128, LONGEST=longest, enable_fp_fusion=False)
