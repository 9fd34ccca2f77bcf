"""Fallback for tokens with more than 32 candidates: visit every bin that can hold the winner, float64 where needed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import TOKEN_TILE, column_chunk
from ..launch import all_registers, multiprocessors
from . import bounds
from .decide import Exhaustive
from .exact import NO_CODE, exact_value
from .pack_codes import PackedCodebook
from .pack_tokens import PackedTokens
from .powers import ratio
from .refine import below, code_bounds
from .scan import Bins, code_at

# The first LEAD of these tokens are cut into SHARES each: few tokens would otherwise leave the device idle.
LEAD = 4096
SHARES = 8
# Codes evaluated at a time.
BLOCK_K = 64


@triton.jit
def exact_best(
    p_x, codes, norms, half_sq, o_k, m_k, best, code, D,
    METRIC: tl.constexpr,
):  # fmt: skip
    """Update (best, code) with the float64 values of codes o_k of one token, the lowest code on ties.

    Returns the smallest of the values as well.
    """
    b_finite = m_k & (tl.load(half_sq + o_k, mask=m_k, other=float("inf")) < float("inf"))
    b_value = exact_value(p_x, codes + o_k * D, norms + o_k, m_k, D, METRIC)
    b_value = tl.where(b_finite, b_value, float("inf"))
    low = tl.min(b_value, axis=0)
    at = tl.min(tl.where(b_finite & (b_value == low), o_k, NO_CODE), axis=0)
    better = (at < NO_CODE) & ((low < best) | (code < 0) | ((low == best) & (at < code)))
    return tl.where(better, low, best), tl.where(better, at, code), low


@triton.jit(do_not_specialize=["N", "K", "S", "steps", "all_steps"])
def exhaustive_kernel(
    tokens, codes, inverse, norms, shift, code_scale, tile_scale, norm, half_sq, length, mean_sq,
    best_bounds, rest_bounds, winners_of_bins, indices, exhaustive_tokens, exhaustive_known, counts, values, winners,
    N, N_pad, K, width, S, steps, all_steps,
    LEAD: tl.constexpr, SHARES: tl.constexpr, METRIC: tl.constexpr,
    D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
    WIDE_X: tl.constexpr, WIDE_E: tl.constexpr, CERTIFIED: tl.constexpr,
    E: tl.constexpr, UNIT_ERROR: tl.constexpr, ORACLE: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Each program walks over the work with the stride of the grid: one token, or one share of it.

    Writes the index, or for the first LEAD tokens the value and code of each share (values, winners [LEAD, SHARES]).
    The number of tokens is read here, on the device. A bin with one code that reaches the threshold has that code
    evaluated in float64. A bin with more is walked through: BK codes are evaluated in float64 if the fp32 bound of one
    of them reaches the best lower bound known, at first that of the refinement. A token or code outside the range of
    fp32 has an infinite bound. After codes that repeat the best value, as equal codes do, the next BK skip the bounds.
    """
    SHIFT: tl.constexpr = METRIC == "euclidean"
    UNIT: tl.constexpr = METRIC == "cosine"
    MEMBERS: tl.constexpr = BN // LANES  # codes of a bin in one step
    o_lane = tl.arange(0, LANES)
    n_exhaustive = tl.load(counts)
    n_lead = tl.minimum(n_exhaustive, LEAD)
    for work in range(tl.program_id(0), n_exhaustive + n_lead * (SHARES - 1), tl.num_programs(0)):
        shared = work < n_lead * SHARES
        i = tl.where(shared, work // SHARES, work - n_lead * (SHARES - 1))
        stride = tl.where(shared, SHARES, 1)
        token = tl.load(exhaustive_tokens + i)
        i_h = token // N
        o_t = token % N + tl.arange(0, 1)  # [1]
        m_t = o_t < N
        p_x = tokens + token * D
        b_scale = tl.load(tile_scale + (i_h * N_pad + o_t) // TILE)
        b_code_scale = tl.load(code_scale + i_h)
        b_c = ratio(b_scale, b_code_scale)
        b_cM = b_c * tl.load(mean_sq + i_h)
        b_X = tl.load(norm + i_h * N_pad + o_t)
        b_eta = ORACLE * b_X * b_X / b_c if SHIFT else b_X * 0.0
        eta = tl.sum(b_eta, axis=0)
        known = tl.load(exhaustive_known + i)
        threshold = tl.sum(below(known + tl.zeros([1], tl.float32), b_cM, b_eta, UP), axis=0)
        # Below zero int32 order is not float order: then every bin is walked.
        threshold = tl.where(threshold > 0.0, threshold, float("-inf"))
        if not CERTIFIED:
            threshold = tl.full([], float("-inf"), tl.float32)
        best = tl.full([], float("inf"), tl.float64)
        code = tl.full([], -1, tl.int64)
        for s in range(S):
            o_bin = ((i_h * N_pad + token % N) * S + s) * LANES + o_lane
            b_walk = ~(tl.load(rest_bounds + o_bin) < threshold)  # [LANES]; NaN counts as reaching
            b_one = (~(tl.load(best_bounds + o_bin) < threshold)) & (~b_walk)
            b_k = tl.load(winners_of_bins + o_bin).to(tl.int64)
            if tl.max(b_one.to(tl.int32), axis=0) > 0:
                best, code, _ = exact_best(
                    p_x, codes + i_h * K * D, norms + i_h * K, half_sq + i_h * K, b_k, b_one & (b_k < K),
                    best, code, width, METRIC,
                )  # fmt: skip
            n_walk = tl.sum(b_walk.to(tl.int32), axis=0)
            if n_walk > 0:
                b_rank = tl.where(b_walk, tl.cumsum(b_walk.to(tl.int32), axis=0) - 1, LANES)
                members = (tl.minimum(steps, all_steps - s * steps) * MEMBERS * n_walk).to(tl.int32)
                chunks = tl.cdiv(members, BK)
                evaluate = tl.full([], 0 if CERTIFIED else 1, tl.int32)
                # The chunks of all ranges are dealt out to the shares in turn.
                for chunk in range((work + s * (SHARES - 1) * chunks) % stride, chunks, stride):
                    o_m = chunk * BK + tl.arange(0, BK)
                    o_n = o_m // LANES
                    b_lane = o_m % LANES
                    if n_walk < LANES:
                        o_n = o_m // n_walk
                        here = b_rank[None, :] == (o_m % n_walk)[:, None]
                        b_lane = tl.sum(tl.where(here, o_lane[None, :], 0), axis=1)
                    o_k = code_at(s * steps + o_n // MEMBERS, o_n % MEMBERS, b_lane, BN, LANES).to(tl.int64)
                    o_k = tl.where(o_m < members, o_k, K)  # [BK]
                    if CERTIFIED and evaluate == 0:
                        b_low, b_high = code_bounds(
                            tokens, codes, inverse, shift, half_sq, length, i_h, o_t, m_t, o_k[None, :],
                            b_scale, b_code_scale, b_c, b_X, N, K,
                            D, 1, BK, BD, SHIFT, WIDE_X, WIDE_E, UNIT, E, UNIT_ERROR,
                        )  # fmt: skip
                        high = tl.max(tl.max(b_high, axis=1), axis=0)
                        evaluate = (~(high + tl.abs(high) * (UP - 1.0) + eta < known)).to(tl.int32)
                        known = tl.maximum(known, tl.max(tl.max(b_low, axis=1), axis=0))
                    if evaluate > 0:
                        best, code, low = exact_best(
                            p_x, codes + i_h * K * D, norms + i_h * K, half_sq + i_h * K, o_k, o_k < K,
                            best, code, width, METRIC,
                        )  # fmt: skip
                        evaluate = ((low == best) | (not CERTIFIED)).to(tl.int32)
        tl.store(values + work, best, mask=shared)
        tl.store(winners + work, code, mask=shared)
        tl.store(indices + token, code, mask=work >= n_lead * SHARES)


@triton.jit
def merge_kernel(indices, exhaustive_tokens, counts, values, winners, LEAD: tl.constexpr, SHARES: tl.constexpr):
    """Write the index of every shared token: the smallest value, of equal ones the lowest code."""
    o_s = tl.arange(0, SHARES)
    n_lead = tl.minimum(tl.load(counts), LEAD)
    for i in range(tl.program_id(0), n_lead, tl.num_programs(0)):
        b_value = tl.load(values + i * SHARES + o_s)  # [SHARES]
        b_code = tl.load(winners + i * SHARES + o_s)
        b_code = tl.where(b_code < 0, NO_CODE, b_code)
        low = tl.min(tl.where(b_code < NO_CODE, b_value, float("inf")), axis=0)
        code = tl.min(tl.where(b_value == low, b_code, NO_CODE), axis=0)
        tl.store(indices + tl.load(exhaustive_tokens + i), tl.where(code < NO_CODE, code, -1))


def exhaustive(
    x: Tensor, packed: PackedCodebook, tokens: PackedTokens, bins: Bins, walked: Exhaustive, indices: Tensor
) -> None:
    """Complete indices [H, N] in place for the tokens that `decide` listed."""
    H, N, D = x.shape
    codes, config = packed.codes, packed.config
    programs = 8 * multiprocessors(x.device)
    lead = min(LEAD, H * N)
    values = torch.empty(lead, SHARES, dtype=torch.float64, device=x.device)
    winners = torch.empty(lead, SHARES, dtype=torch.int64, device=x.device)
    exhaustive_kernel[(programs,)](
        x, codes, packed.inverse, packed.norms, packed.shift, packed.scale, tokens.scale,
        tokens.norm, packed.half_sq,
        packed.length, packed.mean_sq, bins.best, bins.rest, bins.winner,
        indices, walked.tokens, walked.known, walked.counts, values, winners,
        N, tokens.norm.shape[1], codes.shape[1], D, bins.ranges, bins.steps,
        packed.half.shape[1] // config.block_n,
        LEAD=LEAD, SHARES=SHARES, METRIC=packed.metric,
        D=D, BK=BLOCK_K, BD=column_chunk(D), BN=config.block_n, LANES=config.lanes,
        TILE=TOKEN_TILE, WIDE_X=x.dtype == torch.float64, WIDE_E=codes.dtype == torch.float64,
        CERTIFIED=D <= bounds.MAX_CERTIFIED_D, E=bounds.refinement(D, 32) * bounds.UP,
        UNIT_ERROR=bounds.UNIT if packed.metric == "cosine" else 0.0, ORACLE=2 * bounds.ORACLE, UP=bounds.UP,
        enable_fp_fusion=False, **all_registers(),
    )  # fmt: skip
    merge_kernel[(min(programs, lead),)](
        indices, walked.tokens, walked.counts, values, winners, LEAD=LEAD, SHARES=SHARES, num_warps=1
    )
