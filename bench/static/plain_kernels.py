"""A plain search without any of the library's ideas: the baseline of the instruction counts."""

import triton
import triton.language as tl


@triton.jit
def max_with_index(
    x, codebook, half_norms, out, N, K, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOWEST: tl.constexpr
):
    """Nearest code of BN tokens, by the running maximum of x·e - ½|e|² and its index over tiles of BK codes.

    LOWEST: on equal scores take the lowest index (costs one more compare and select per pair). K is a multiple of
    BK; tokens from N on are neither read nor written.
    """
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_d = tl.arange(0, D)
    m_n = o_n < N
    b_x = tl.load(x + o_n[:, None] * D + o_d[None, :], mask=m_n[:, None], other=0.0)  # [BN, D]
    b_best = tl.full([BN], float("-inf"), tl.float32)
    b_index = tl.zeros([BN], tl.int32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_e = tl.load(codebook + o_k[None, :] * D + o_d[:, None])  # [D, BK]
        b_s = tl.dot(b_x, b_e) - tl.load(half_norms + o_k)[None, :]  # [BN, BK]
        b_max, b_arg = tl.max(b_s, axis=1, return_indices=True, return_indices_tie_break_left=LOWEST)  # [BN]
        b_index = tl.where(b_max > b_best, b_arg + i_k, b_index)
        b_best = tl.maximum(b_max, b_best)
    tl.store(out + o_n, b_index, mask=m_n)
