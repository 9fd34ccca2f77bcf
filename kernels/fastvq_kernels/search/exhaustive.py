"""The last word: tokens that the third scan proves, and for the others, which have ties, a walk in float64."""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import all_registers, cdiv, multiprocessors
from .decide import Crowded
from .exact import NO_CODE, exact_value
from .pack_codes import PackedCodebook
from .scan_float64 import SHARES, Float64Bounds, sharing

# Codes evaluated at a time.
BLOCK_K = 256


@triton.jit(do_not_specialize=["N", "K", "width", "steps", "programs"])
def exhaustive_kernel(
    tokens, codes, norms, half_sq, counts, crowded, upper, second, lower, winner, indices,
    N, K, width, steps, rows, programs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHARES: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    """Each program walks over crowded tokens of one head with the stride of the grid, and writes their indices.

    The winner of the third scan is proved if the upper bounds of all other codes are below the largest lower bound.
    Else all codes are evaluated in the shares that can hold the winner. The lowest of the best wins.
    """
    i_h = tl.program_id(1).to(tl.int64)
    n = tl.load(counts + i_h)
    _, shares, length = sharing(n, programs, steps, BM, SHARES)
    o_s = tl.arange(0, SHARES)
    m_s = o_s < shares
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        token = i_h * N + tl.load(crowded + i_h * N + i)
        first = i_h * rows + (i // BM * shares) * BM + i % BM
        b_upper = tl.load(upper + first + o_s * BM, mask=m_s, other=float("-inf"))  # [SHARES]
        b_second = tl.load(second + first + o_s * BM, mask=m_s, other=float("-inf"))
        b_lower = tl.load(lower + first + o_s * BM, mask=m_s, other=float("-inf"))
        b_k = tl.load(winner + first + o_s * BM, mask=m_s, other=-1)
        known = tl.max(b_lower, axis=0)
        at = tl.min(tl.where(b_upper == tl.max(b_upper, axis=0), o_s, SHARES), axis=0)
        rest = tl.maximum(tl.max(b_second, axis=0), tl.max(tl.where(o_s == at, float("-inf"), b_upper), axis=0))
        code = tl.sum(tl.where(o_s == at, b_k, 0), axis=0).to(tl.int64)
        if ~(rest < known):
            best = tl.full([], float("inf"), tl.float64)
            code = tl.full([], -1, tl.int64)
            for s in range(shares):
                last = tl.minimum((s + 1) * length * BN, K)
                last = tl.where(tl.load(upper + first + s * BM) < known, 0, last)
                for k in range(s * length * BN, last, BK):
                    o_k = k + tl.arange(0, BK).to(tl.int64)
                    m_k = o_k < last
                    m_k &= tl.load(half_sq + i_h * K + o_k, mask=m_k, other=float("inf")) < float("inf")
                    b_row = i_h * K + o_k
                    b_value = exact_value(
                        tokens + token * width, codes + b_row * width, norms + b_row, m_k, width, METRIC
                    )
                    # A distance that overflows still loses to none but the codes that never win.
                    low = tl.min(tl.where(m_k, b_value, float("inf")), axis=0)
                    lowest = tl.min(tl.where(m_k & (b_value == low), o_k, NO_CODE), axis=0)
                    better = (lowest < NO_CODE) & ((low < best) | (code < 0))
                    best, code = tl.where(better, low, best), tl.where(better, lowest, code)
        tl.store(indices + token, code)


def exhaustive(x: Tensor, packed: PackedCodebook, crowded: Crowded, found: Float64Bounds, indices: Tensor) -> None:
    """Complete indices [H, N] in place for the crowded tokens."""
    H, N, D = x.shape
    K = packed.codes.shape[1]
    exhaustive_kernel[(min(cdiv(8 * multiprocessors(x.device), H), N), H)](
        x, packed.codes, packed.norms, packed.half_sq, crowded.count, crowded.tokens,
        found.upper, found.second, found.lower, found.winner, indices,
        N, K, D, found.steps, found.upper.shape[1], found.programs,
        BM=found.config.block_m, BN=found.config.block_n, BK=BLOCK_K, SHARES=SHARES, METRIC=packed.metric,
        enable_fp_fusion=False, **all_registers(),
    )  # fmt: skip
