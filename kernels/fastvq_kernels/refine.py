"""The refinement: the winning groups again in fp32 from the given values; a proof per token, or the open list."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bounds
from .configs import TOKEN_TILE
from .pack import PackedCodebook, load_code
from .tokens import load_shifted, ratio


@triton.jit
def group_bounds(
    tokens, codes, inverse, shift, half_sq, length, i_h, o_t, m_t, b_group, b_scale, b_code_scale, b_c, b_X,
    K, s_h, s_n, c_h, c_k,
    D: tl.constexpr, BT: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
    SHIFT: tl.constexpr, WIDE_X: tl.constexpr, WIDE_E: tl.constexpr, UNIT: tl.constexpr,
    E: tl.constexpr, UNIT_ERROR: tl.constexpr,
):  # fmt: skip
    """Lower and upper bounds [BT, G] of S_k for the codes of one group per token, and the codes' ids."""
    o_k = b_group.to(tl.int64)[:, None] * G + tl.arange(0, G)[None, :]  # [BT, G]
    m_k = m_t[:, None] & (o_k < K)
    b_h = tl.load(half_sq + i_h * K + o_k, mask=m_k, other=float("inf"))
    b_n = tl.load(length + i_h * K + o_k, mask=m_k, other=0.0)
    b_inv = tl.load(inverse + i_h * K + o_k, mask=m_k, other=0.0)[:, :, None] if UNIT else 1.0
    p_x = tokens + i_h * s_h + o_t[:, None] * s_n
    b_acc = tl.zeros([BT, G, BD], tl.float32)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        m_d = o_d < D
        b_x = load_shifted(p_x, shift + i_h * D, o_d, m_t, m_d, WIDE_X, SHIFT)
        b_x = (b_x * b_scale[:, None]).to(tl.float32)  # [BT, BD]
        m_e = m_k[:, :, None] & m_d[None, None, :]
        p_e = codes + i_h * c_h + o_k[:, :, None] * c_k + o_d[None, None, :]
        b_e = load_code(p_e, b_inv, shift + i_h * D, o_d, m_d, m_e, b_code_scale, WIDE_E, UNIT)  # [BT, G, BD]
        b_acc += b_x[:, None, :] * b_e
    b_s = tl.sum(b_acc, axis=2) - b_c[:, None] * b_h  # [BT, G]
    b_err = E * (b_X[:, None] * b_n + b_c[:, None] * b_h) + UNIT_ERROR * b_X[:, None] * b_code_scale
    # A code outside the range can be anything; one with NaN, Inf or beyond K is nothing.
    inside = tl.abs(b_s) + b_err < 3.0e38
    never = b_h == float("inf")
    b_low = tl.where(inside & (~never), b_s - b_err, float("-inf"))
    b_high = tl.where(never, float("-inf"), tl.where(inside, b_s + b_err, float("inf")))
    return b_low, b_high, o_k


@triton.jit
def winner(b_low, b_high, o_k):
    """Best lower bound, its code, the highest upper bound of the other codes, and of all: four [BT]."""
    b_best = tl.max(b_low, axis=1)
    b_code = tl.min(tl.where(b_low == b_best[:, None], o_k, 1 << 60), axis=1)
    b_other = tl.max(tl.where(o_k == b_code[:, None], float("-inf"), b_high), axis=1)
    return b_best, b_code, b_other, tl.max(b_high, axis=1)


@triton.jit
def refine_kernel(
    tokens, codes, inverse, shift, code_scale, tile_scale, norm, half_sq, length, mean_sq, values, groups,
    indices, open_list, open_line, open_count,
    N, N_pad, K, S, s_h, s_n, c_h, c_k,
    D: tl.constexpr, BT: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr,
    SHIFT: tl.constexpr, WIDE_X: tl.constexpr, WIDE_E: tl.constexpr, UNIT: tl.constexpr, CERTIFIED: tl.constexpr,
    E: tl.constexpr, UNIT_ERROR: tl.constexpr, ORACLE: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One program proves or passes on BT tokens of one head.

    Writes the index of a proved token, -1 for a token with NaN or Inf, and appends the rest to the open list.
    """
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < N
    b_v1 = tl.full([BT], float("-inf"), tl.float32)
    b_v2 = b_v1
    b_v3 = b_v1
    b_g1 = tl.zeros([BT], tl.int32)
    b_g2 = b_g1
    p_v = values + i_h * 3 * N_pad + o_t
    p_g = groups + i_h * 2 * N_pad + o_t
    plane = tl.num_programs(1).to(tl.int64) * N_pad
    for _ in range(S):
        a1, a2, a3 = tl.load(p_v), tl.load(p_v + N_pad), tl.load(p_v + 2 * N_pad)
        h1, h2 = tl.load(p_g), tl.load(p_g + N_pad)
        wins = a1 > b_v1
        # The loser of the two firsts against the second of the winner; the rest goes into the bound.
        x, gx = tl.where(wins, b_v1, a1), tl.where(wins, b_g1, h1)
        y, gy = tl.where(wins, a2, b_v2), tl.where(wins, h2, b_g2)
        b_v3 = tl.maximum(tl.maximum(b_v3, a3), tl.maximum(tl.minimum(x, y), tl.where(wins, b_v2, a2)))
        b_v1, b_g1 = tl.where(wins, a1, b_v1), tl.where(wins, h1, b_g1)
        b_v2, b_g2 = tl.maximum(x, y), tl.where(y > x, gy, gx)
        p_v += plane * 3
        p_g += plane * 2

    b_X = tl.load(norm + i_h * N_pad + o_t)
    b_finite = b_X == b_X
    m_in = m_t & (b_X < float("inf"))
    b_scale = tl.load(tile_scale + (i_h * N_pad + o_t) // TILE)
    b_code_scale = tl.load(code_scale + i_h)
    b_c = ratio(b_scale, b_code_scale)
    b_cM = b_c * tl.load(mean_sq + i_h)
    b_eta = ORACLE * b_X * b_X / b_c if SHIFT else b_X * 0.0

    b_low, b_high, o_k = group_bounds(
        tokens, codes, inverse, shift, half_sq, length, i_h, o_t, m_in, b_g1, b_scale, b_code_scale, b_c, b_X,
        K, s_h, s_n, c_h, c_k, D, BT, G, BD, SHIFT, WIDE_X, WIDE_E, UNIT, E, UNIT_ERROR,
    )  # fmt: skip
    b_best, b_code, b_other, b_all = winner(b_low, b_high, o_k)
    b_line = b_best + b_cM - (tl.abs(b_best) + b_cM) * (UP - 1.0) - b_eta
    # Below zero int32 order is not float order, so the line itself has to be above.
    m_second = m_in & ((b_v2 >= b_line) | (b_line <= 0.0))
    if tl.max(m_second.to(tl.int32), axis=0) > 0:
        b_low, b_high, o_k = group_bounds(
            tokens, codes, inverse, shift, half_sq, length, i_h, o_t, m_second, b_g2, b_scale, b_code_scale, b_c, b_X,
            K, s_h, s_n, c_h, c_k, D, BT, G, BD, SHIFT, WIDE_X, WIDE_E, UNIT, E, UNIT_ERROR,
        )  # fmt: skip
        b_best2, b_code2, b_other2, b_all2 = winner(b_low, b_high, o_k)
        wins = b_best2 > b_best
        b_other = tl.where(wins, tl.maximum(b_other2, b_all), tl.maximum(b_other, b_all2))
        b_code = tl.where(wins, b_code2, b_code)
        b_best = tl.maximum(b_best, b_best2)
        b_line = b_best + b_cM - (tl.abs(b_best) + b_cM) * (UP - 1.0) - b_eta
    proved = m_in & (b_line > 0.0) & (b_v3 < b_line) & (b_other < b_best - tl.abs(b_best) * (UP - 1.0) - b_eta)
    if not CERTIFIED:
        proved = proved & False
    tl.store(indices + i_h * N + o_t, tl.where(proved, b_code, -1), mask=m_t)

    b_open = (m_t & b_finite & (~proved)).to(tl.int32)
    count = tl.sum(b_open, axis=0)
    if count > 0:
        base = tl.atomic_add(open_count, count)
        o_list = base + tl.cumsum(b_open, axis=0) - 1
        tl.store(open_list + o_list, i_h * N + o_t, mask=b_open > 0)
        tl.store(open_line + o_list, b_best, mask=b_open > 0)


def refine(
    x: Tensor,
    packed: PackedCodebook,
    norm: Tensor,
    tile_scale: Tensor,
    values: Tensor,
    groups: Tensor,
    *,
    block_t: int = 16,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices [H, N] int64 where proved, and the list of open tokens.

    The list: tokens [H N] int64, the best lower bound of each [H N] fp32, and how many there are [1] int32.
    """
    H, N, D = x.shape
    S, _, _, N_pad = values.shape
    K = packed.codes.shape[1]
    indices = torch.empty(H, N, dtype=torch.int64, device=x.device)
    open_list = torch.empty(H * N, dtype=torch.int64, device=x.device)
    open_line = torch.empty(H * N, dtype=torch.float32, device=x.device)
    open_count = torch.zeros(1, dtype=torch.int32, device=x.device)
    BD = min(max(8, triton.next_power_of_2(D)), 32)
    refine_kernel[(triton.cdiv(N, block_t), H)](
        x, packed.codes, packed.inverse, packed.shift, packed.scale, tile_scale, norm, packed.half_sq, packed.length,
        packed.mean_sq, values, groups, indices, open_list, open_line, open_count,
        N, N_pad, K, S, x.stride(0), x.stride(1), packed.codes.stride(0), packed.codes.stride(1),
        D=D, BT=block_t, G=packed.config.group, BD=BD, TILE=TOKEN_TILE,
        SHIFT=packed.metric == "euclidean", WIDE_X=x.dtype == torch.float64,
        WIDE_E=packed.codes.dtype == torch.float64, UNIT=packed.metric == "cosine",
        CERTIFIED=D <= bounds.MAX_CERTIFIED_D, E=bounds.refinement(D, 32) * bounds.UP,
        UNIT_ERROR=bounds.UNIT if packed.metric == "cosine" else 0.0, ORACLE=2 * bounds.ORACLE, UP=bounds.UP,
        num_warps=packed.config.refine_warps,  # with 4 a thread holds 255 registers
    )  # fmt: skip
    return indices, open_list, open_line, open_count
