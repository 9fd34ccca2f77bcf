"""The third scan: crowded tokens against all codes in a float64 product, whose bounds leave only true ties."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import Float64Config, float64_config
from ..launch import all_registers, cdiv, multiprocessors
from . import bounds
from .decide import Crowded
from .pack_codes import PackedCodebook

# Programs that share the codes of a tile of tokens, at most.
SHARES = 16


@triton.jit
def sharing(n, programs, steps, BM: tl.constexpr, SHARES: tl.constexpr):
    """Tiles of n tokens, shares of the codes for each, and steps of each share."""
    tiles = tl.cdiv(n, BM)
    shares = tl.minimum(tl.maximum(programs // tl.maximum(tiles, 1), 1), SHARES)
    length = tl.cdiv(steps, shares)
    return tiles, tl.cdiv(steps, length), length


@triton.jit
def load_float64(p_rows, p_shift, m_rows, o_d, D: tl.constexpr, SHIFT: tl.constexpr):
    """Rows [B, BD], less m [BD] for euclidean distances, in float64; zeros where m_rows is False."""
    m_d = o_d < D
    b = tl.load(p_rows[:, None] + o_d[None, :], mask=m_rows[:, None] & m_d[None, :], other=0.0).to(tl.float64)
    if SHIFT:
        b_m = tl.load(p_shift + o_d, mask=m_d, other=0.0).to(tl.float64)
        # Outside m_rows for the compiler's sake: it would move the conversion behind shared memory, to every warp.
        b = tl.where(m_rows[:, None], b - b_m[None, :], 0.0)
    return b


@triton.jit(do_not_specialize=["N", "K", "steps"])
def scan_float64_kernel(
    tokens, codes, shift, norms, half_sq, counts, crowded, upper, second, lower, winner,
    N, K, steps, rows,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SHARES: tl.constexpr,
    METRIC: tl.constexpr, ERROR: tl.constexpr, TINY: tl.constexpr, LARGEST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program walks over shares of the codes for tiles of BM crowded tokens of one head, with the grid's stride.

    Writes per token and share the two largest upper bounds of a score, the code of the first, and the largest lower
    bound (upper, second, winner and lower [H, rows], BM after BM). The number of tokens is read here, on the device.
    """
    SHIFT: tl.constexpr = METRIC == "euclidean"
    i_h = tl.program_id(1).to(tl.int64)
    n = tl.load(counts + i_h)
    tiles, shares, length = sharing(n, tl.num_programs(0), steps, BM, SHARES)
    p_shift = shift + i_h * D
    o_n = tl.arange(0, BN)
    for item in range(tl.program_id(0), tiles * shares, tl.num_programs(0)):
        o_i = (item // shares) * BM + tl.arange(0, BM)
        m_i = o_i < n
        b_t = tl.load(crowded + i_h * N + o_i, mask=m_i, other=0)  # [BM]
        p_x = tokens + (i_h * N + b_t) * D
        b_largest = tl.zeros([BM], tl.float64)
        b_sq = tl.zeros([BM], tl.float64)
        for d in range(0, D, BD):
            b_x = load_float64(p_x, p_shift, m_i, d + tl.arange(0, BD), D, SHIFT)  # [BM, BD]
            b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_x), axis=1))
            b_sq += tl.sum(b_x * b_x, axis=1)
        b_u1 = tl.full([BM], float("-inf"), tl.float64)
        b_u2 = b_u1
        b_low = b_u1
        b_k = tl.full([BM], -1, tl.int32)
        longest = tl.zeros([], tl.float64)
        lowest = tl.full([], 0, tl.int32) + K
        first = item % shares * length
        for t in range(first, tl.minimum(first + length, steps)):
            o_k = t * BN + o_n
            m_k = o_k < K
            m_k &= tl.load(half_sq + i_h * K + o_k, mask=m_k, other=float("inf")) < float("inf")
            p_e = codes + (i_h * K + o_k) * D
            b_s = tl.zeros([BM, BN], tl.float64)
            b_abs = tl.zeros([BN, BD], tl.float64)
            b_sq_e = tl.zeros([BN, BD], tl.float64)
            for d in tl.range(0, D, BD, num_stages=STAGES):
                o_d = d + tl.arange(0, BD)
                b_x = load_float64(p_x, p_shift, m_i, o_d, D, SHIFT)  # [BM, BD]
                b_e = load_float64(p_e, p_shift, m_k, o_d, D, SHIFT)  # [BN, BD]
                b_s = tl.dot(b_x, b_e.T, b_s, input_precision="ieee", out_dtype=tl.float64)
                b_abs += tl.abs(b_e)
                if SHIFT:
                    b_sq_e += b_e * b_e
            b_length = tl.sum(b_abs, axis=1)  # [BN]
            b_half = 0.5 * tl.sum(b_sq_e, axis=1)
            longest = tl.maximum(longest, tl.max(b_length, axis=0))
            lowest = tl.minimum(lowest, tl.min(tl.where(m_k, o_k, K), axis=0))
            b_err = ERROR * b_length
            if METRIC == "cosine":
                b_norm = tl.load(norms + i_h * K + o_k, mask=m_k, other=1.0)
                b_inv = tl.where(b_norm > 0.0, 1.0 / b_norm, 0.0)
                b_s *= b_inv[None, :]
                b_err *= b_inv
            # -h_k and its error, and for a product what underflows before the division.
            b_bias = tl.where(m_k, (2.0 * ERROR - 1.0) * b_half, float("-inf"))
            b_bias_low = tl.where(m_k, (-2.0 * ERROR - 1.0) * b_half, float("-inf"))
            if METRIC == "cosine":
                b_bias += TINY * b_inv
                b_bias_low -= TINY * b_inv
            b_upper = b_s + b_largest[:, None] * b_err[None, :] + b_bias[None, :]  # [BM, BN]
            b_lower = b_s - b_largest[:, None] * b_err[None, :] + b_bias_low[None, :]
            b_top = tl.max(b_upper, axis=1)  # [BM]
            b_n = tl.min(tl.where(b_upper == b_top[:, None], o_n[None, :], BN), axis=1)
            b_rest = tl.max(tl.where(o_n[None, :] == b_n[:, None], float("-inf"), b_upper), axis=1)
            b_u2 = tl.maximum(tl.maximum(b_u2, b_rest), tl.minimum(b_u1, b_top))
            b_k = tl.where(b_top > b_u1, t * BN + b_n, b_k)
            b_u1 = tl.maximum(b_u1, b_top)
            b_low = tl.maximum(b_low, tl.max(b_lower, axis=1))
        # The errors that all codes share.
        b_both = tl.zeros([BM], tl.float64) + TINY
        if SHIFT:
            b_both += ERROR * b_sq
        # Below this nothing has overflowed.
        b_magnitude = tl.maximum(tl.maximum(b_largest, 1.0) * longest, b_sq)
        proves = b_magnitude < LARGEST
        b_u1 = tl.where(proves, b_u1 + b_both, float("inf"))
        b_u2 = tl.where(proves, b_u2 + b_both, float("inf"))
        b_low = tl.where(proves, b_low - b_both, float("-inf"))
        if not SHIFT:  # a token of zeros is 0 with every code: the first wins
            b_zero = b_largest == 0.0
            b_k = tl.where(b_zero, tl.where(lowest < K, lowest, -1), b_k)
            b_u1 = tl.where(b_zero, -lowest.to(tl.float64), b_u1)
            b_u2 = tl.where(b_zero, float("-inf"), b_u2)
            b_low = tl.where(b_zero, b_u1, b_low)
        o_out = i_h * rows + item * BM + tl.arange(0, BM)
        tl.store(upper + o_out, b_u1, mask=m_i)
        tl.store(second + o_out, b_u2, mask=m_i)
        tl.store(lower + o_out, b_low, mask=m_i)
        tl.store(winner + o_out, b_k, mask=m_i)


@dataclass(frozen=True)
class Float64Bounds:
    """The result of the third scan, for tiles of config.block_m tokens and up to SHARES shares of the codes each.

    upper, second, lower  [H, rows]  float64: the two largest upper bounds of a score and the largest lower bound
    winner                [H, rows]  int32: the code of the first, -1 if no code can win
    programs, steps                  for each head: by these tokens and codes are shared
    """

    upper: Tensor
    second: Tensor
    lower: Tensor
    winner: Tensor
    programs: int
    steps: int
    config: Float64Config


def scan_float64(x: Tensor, packed: PackedCodebook, crowded: Crowded) -> Float64Bounds:
    """Bounds of the crowded tokens of x [H, N, D]."""
    H, N, D = x.shape
    K = packed.codes.shape[1]
    config = float64_config()
    programs = cdiv(config.programs * multiprocessors(x.device), H) if x.is_cuda else 2
    steps = cdiv(K, config.block_n)
    rows = max(cdiv(N, config.block_m), programs) * config.block_m
    upper, second, lower = (torch.empty(H, rows, dtype=torch.float64, device=x.device) for _ in range(3))
    winner = torch.empty(H, rows, dtype=torch.int32, device=x.device)
    scan_float64_kernel[(programs, H)](
        x, packed.codes, packed.shift, packed.norms, packed.half_sq, crowded.count, crowded.tokens,
        upper, second, lower, winner,
        N, K, steps, rows,
        D=D, BM=config.block_m, BN=config.block_n, BD=config.block_d, SHARES=SHARES,
        METRIC=packed.metric, ERROR=bounds.float64_error(D), TINY=bounds.TINY64, LARGEST=bounds.LARGEST64,
        STAGES=config.num_stages, num_warps=config.num_warps, **all_registers(),
    )  # fmt: skip
    return Float64Bounds(upper, second, lower, winner, programs, steps, config)
