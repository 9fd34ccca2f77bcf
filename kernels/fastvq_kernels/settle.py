"""The last word for the tokens still open: fp32 bounds pick the codes that can win, float64 decides among them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bounds
from .configs import TOKEN_TILE
from .pack import PackedCodebook
from .refine import group_bounds
from .tokens import ratio

# The first LEAD open tokens are shared out in SHARES ranges of codes each: few open tokens would otherwise be
# settled by as many programs, each walking through the whole codebook, on an idle device.
LEAD = 4096
SHARES = 16


@triton.jit
def exact_best(
    p_x, p_e, norms, o_k, m_k, b_finite, best, code, D,
    METRIC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Update (best, code) with the oracle's float64 values of BK codes: ascending j, every operation rounded."""
    b_value = tl.zeros([BK], tl.float64)
    for j in range(D):
        b_e = tl.load(p_e + j, mask=m_k, other=0.0).to(tl.float64)  # [BK]
        x = tl.load(p_x + j).to(tl.float64)
        if METRIC == "euclidean":
            b_diff = x - b_e
            b_value += b_diff * b_diff
        else:
            b_value += x * b_e
    if METRIC == "cosine":
        b_norm = tl.load(norms + o_k, mask=m_k, other=1.0)
        b_value = tl.where(b_norm > 0.0, b_value / b_norm, 0.0)
    if METRIC != "euclidean":
        b_value = -b_value
    b_value = tl.where(b_finite, b_value, float("inf"))
    low = tl.min(b_value, axis=0)
    at = tl.min(tl.where(b_finite & (b_value == low), o_k, 1 << 60), axis=0)
    # Codes come in ascending order, so a later one has to be strictly better.
    better = (at < (1 << 60)) & ((low < best) | (code < 0))
    return tl.where(better, low, best), tl.where(better, at, code)


@triton.jit
def settle_kernel(
    tokens, codes, inverse, norms, shift, code_scale, tile_scale, norm, half_sq, length,
    indices, open_list, open_line, open_count, values, winners,
    N, N_pad, K, width, s_h, s_n, c_h, c_k,
    LEAD: tl.constexpr, SHARES: tl.constexpr, METRIC: tl.constexpr,
    D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr,
    WIDE_X: tl.constexpr, WIDE_E: tl.constexpr, CERTIFIED: tl.constexpr,
    E: tl.constexpr, UNIT_ERROR: tl.constexpr, ORACLE: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Each program walks over the work with the stride of the grid: one token and all codes, or one share of them.

    Writes the index, or for the first LEAD tokens the value and code of each share (values, winners [LEAD, SHARES]).
    The count is read here, on the device. BK codes are evaluated in float64 only if the fp32 bound of one of them
    reaches the best lower bound so far, first the one the refinement left; a token or code outside the range
    of fp32 has an infinite bound and always is.
    """
    SHIFT: tl.constexpr = METRIC == "euclidean"
    UNIT: tl.constexpr = METRIC == "cosine"
    n_open = tl.load(open_count)
    n_lead = tl.minimum(n_open, LEAD)
    steps = tl.cdiv(K, BK)
    for work in range(tl.program_id(0), n_open + n_lead * (SHARES - 1), tl.num_programs(0)):
        shared = work < n_lead * SHARES
        i = tl.where(shared, work // SHARES, work - n_lead * (SHARES - 1))
        share = work % SHARES
        first = tl.where(shared, share * steps // SHARES, 0)
        last = tl.where(shared, (share + 1) * steps // SHARES, steps)
        token = tl.load(open_list + i)
        i_h = token // N
        o_t = token % N + tl.arange(0, 1)  # [1]
        m_t = o_t < N
        p_x = tokens + i_h * s_h + (token % N) * s_n
        b_scale = tl.load(tile_scale + (i_h * N_pad + o_t) // TILE)
        b_code_scale = tl.load(code_scale + i_h)
        b_c = ratio(b_scale, b_code_scale)
        b_X = tl.load(norm + i_h * N_pad + o_t)
        eta = tl.sum(ORACLE * b_X * b_X / b_c if SHIFT else b_X * 0.0, axis=0)
        line = tl.load(open_line + i)
        best = tl.full([], float("inf"), tl.float64)
        code = tl.full([], -1, tl.int64)
        for t in range(first, last):
            b_low, b_high, o_k = group_bounds(
                tokens, codes, inverse, shift, half_sq, length, i_h, o_t, m_t, t + tl.zeros([1], tl.int32),
                b_scale, b_code_scale, b_c, b_X, K, s_h, s_n, c_h, c_k,
                D, 1, BK, BD, SHIFT, WIDE_X, WIDE_E, UNIT, E, UNIT_ERROR,
            )  # fmt: skip
            o_k = tl.reshape(o_k, [BK])
            m_k = o_k < K
            b_finite = m_k & (tl.load(half_sq + i_h * K + o_k, mask=m_k, other=float("inf")) < float("inf"))
            high = tl.max(tl.max(b_high, axis=1), axis=0)
            # Written so that NaN counts as reaching.
            if (~(high + tl.abs(high) * (UP - 1.0) + eta < line)) | (not CERTIFIED):
                best, code = exact_best(
                    p_x, codes + i_h * c_h + o_k * c_k, norms + i_h * K, o_k, m_k, b_finite, best, code, width,
                    METRIC, BK,
                )  # fmt: skip
            line = tl.maximum(line, tl.max(tl.max(b_low, axis=1), axis=0))
        tl.store(values + work, best, mask=shared)
        tl.store(winners + work, code, mask=shared)
        tl.store(indices + token, code, mask=work >= n_lead * SHARES)


@triton.jit
def merge_kernel(indices, open_list, open_count, values, winners, LEAD: tl.constexpr, SHARES: tl.constexpr):
    """Write the index of every shared token: the smallest value, of equal ones the lowest code."""
    o_s = tl.arange(0, SHARES)
    n_lead = tl.minimum(tl.load(open_count), LEAD)
    for i in range(tl.program_id(0), n_lead, tl.num_programs(0)):
        b_value = tl.load(values + i * SHARES + o_s)  # [SHARES]
        b_code = tl.load(winners + i * SHARES + o_s)
        b_code = tl.where(b_code < 0, 1 << 60, b_code)
        low = tl.min(tl.where(b_code < (1 << 60), b_value, float("inf")), axis=0)
        code = tl.min(tl.where(b_value == low, b_code, 1 << 60), axis=0)
        tl.store(indices + tl.load(open_list + i), tl.where(code < (1 << 60), code, -1))


def settle(
    x: Tensor,
    packed: PackedCodebook,
    tile_scale: Tensor,
    norm: Tensor,
    indices: Tensor,
    open_list: Tensor,
    open_line: Tensor,
    open_count: Tensor,
) -> None:
    """Complete indices [H, N] in place for the tokens of the open list."""
    H, N, D = x.shape
    codes = packed.codes
    cuda = x.device.type == "cuda"
    programs = 8 * torch.cuda.get_device_properties(x.device).multi_processor_count if cuda else 1
    lead = min(LEAD, H * N)
    values = torch.empty(lead, SHARES, dtype=torch.float64, device=x.device)
    winners = torch.empty(lead, SHARES, dtype=torch.int64, device=x.device)
    settle_kernel[(programs,)](
        x, codes, packed.inverse, packed.norms, packed.shift, packed.scale, tile_scale, norm, packed.half_sq,
        packed.length, indices, open_list, open_line, open_count, values, winners,
        N, norm.shape[1], codes.shape[1], D, x.stride(0), x.stride(1), codes.stride(0), codes.stride(1),
        LEAD=LEAD, SHARES=SHARES, METRIC=packed.metric,
        D=D, BK=128, BD=min(max(8, triton.next_power_of_2(D)), 32), TILE=TOKEN_TILE,
        WIDE_X=x.dtype == torch.float64, WIDE_E=codes.dtype == torch.float64,
        CERTIFIED=D <= bounds.MAX_CERTIFIED_D, E=bounds.refinement(D, 32) * bounds.UP,
        UNIT_ERROR=bounds.UNIT if packed.metric == "cosine" else 0.0, ORACLE=2 * bounds.ORACLE, UP=bounds.UP,
        enable_fp_fusion=False,
    )  # fmt: skip
    merge_kernel[(min(programs, lead),)](
        indices, open_list, open_count, values, winners, LEAD=LEAD, SHARES=SHARES, num_warps=1
    )
