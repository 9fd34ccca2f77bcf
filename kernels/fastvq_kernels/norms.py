"""Float64 norms of the codes with the oracle's order of summation (cosine only)."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["K"])
def square_sums_kernel(codes, out, K, D, BK: tl.constexpr):
    """One program sums e_kj^2 over ascending j, each square and addition rounded, for BK codes of one head."""
    i_k, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    b_sum = tl.zeros([BK], tl.float64)
    for j in range(D):
        b_e = tl.load(codes + (i_h * K + o_k) * D + j, mask=m_k, other=0.0).to(tl.float64)  # [BK]
        b_sum += b_e * b_e
    tl.store(out + i_h * K + o_k, b_sum, mask=m_k)


def code_norms(codes: Tensor) -> Tensor:
    """sqrt(sum_j e_kj^2) of dense codes [H, K, D] as float64 [H, K]."""
    H, K, D = codes.shape
    out = torch.empty(H, K, dtype=torch.float64, device=codes.device)
    square_sums_kernel[(triton.cdiv(K, 128), H)](codes, out, K, D, BK=128, enable_fp_fusion=False)
    return out.sqrt()
