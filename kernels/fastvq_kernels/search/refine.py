"""The refinement: proves a token by the scan's bounds or its two best codes in fp32, or puts it on the open list."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import TOKEN_TILE, column_chunk
from ..launch import all_registers, cdiv
from . import bounds
from .bounds import IN_RANGE
from .open_tokens import CANDIDATES, Open, no_open, store_open
from .pack_codes import PackedCodebook, load_code
from .pack_tokens import PackedTokens, load_shifted
from .powers import ratio
from .scan import Bins

# Per program.
TOKENS = 32
# Bins of a token that are read at a time: all of them, unless tokens are few.
BINS = 16


@triton.jit
def code_bounds(
    tokens, codes, inverse, shift, half_sq, length, i_h, o_t, m_t, o_k, b_scale, b_code_scale, b_c, b_X,
    N, K,
    D: tl.constexpr, BT: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
    SHIFT: tl.constexpr, WIDE_X: tl.constexpr, WIDE_E: tl.constexpr, UNIT: tl.constexpr,
    E: tl.constexpr, UNIT_ERROR: tl.constexpr,
):  # fmt: skip
    """Lower and upper bounds [BT, G] of S_k for G codes o_k [BT, G] per token, from the given values."""
    m_k = m_t[:, None] & (o_k < K)
    b_h = tl.load(half_sq + i_h * K + o_k, mask=m_k, other=float("inf"))
    b_n = tl.load(length + i_h * K + o_k, mask=m_k, other=0.0)
    b_inv = tl.load(inverse + i_h * K + o_k, mask=m_k, other=0.0)[:, :, None] if UNIT else 1.0
    p_x = tokens + (i_h * N + o_t)[:, None] * D
    b_acc = tl.zeros([BT, G, BD], tl.float32)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        m_d = o_d < D
        b_x = load_shifted(p_x, shift + i_h * D, o_d, m_t, m_d, WIDE_X, SHIFT)
        b_x = (b_x * b_scale[:, None]).to(tl.float32)  # [BT, BD]
        m_e = m_k[:, :, None] & m_d[None, None, :]
        p_e = codes + (i_h * K + o_k)[:, :, None] * D + o_d[None, None, :]
        b_e = load_code(p_e, b_inv, shift + i_h * D, o_d, m_d, m_e, b_code_scale, WIDE_E, UNIT)  # [BT, G, BD]
        b_acc += b_x[:, None, :] * b_e
    b_s = tl.sum(b_acc, axis=2) - b_c[:, None] * b_h  # [BT, G]
    b_err = E * (b_X[:, None] * b_n + b_c[:, None] * b_h) + UNIT_ERROR * b_X[:, None] * b_code_scale
    # A code outside the range can be anything; one with NaN, Inf or beyond K is nothing.
    inside = (tl.abs(b_s) + b_err < IN_RANGE) & (b_h < IN_RANGE)
    never = b_h == float("inf")
    b_low = tl.where(inside & (~never), b_s - b_err, float("-inf"))
    b_high = tl.where(never, float("-inf"), tl.where(inside, b_s + b_err, float("inf")))
    return b_low, b_high


@triton.jit
def below(b_value, b_cM, b_eta, UP: tl.constexpr):
    """What a bound U_k = S_k + c M has to stay under for the code to lose against a score of at least b_value."""
    return b_value + b_cM - (tl.abs(b_value) + b_cM) * (UP - 1.0) - b_eta


@triton.jit
def take_largest(b_v, b_k, o_bin):
    """The largest of b_v [BT, BINS], what b_k holds there, and b_v without it."""
    b_top = tl.max(b_v, axis=1)
    b_bin = tl.max(tl.where(b_v == b_top[:, None], o_bin, 0), axis=1)
    here = o_bin == b_bin[:, None]
    return b_top, tl.sum(tl.where(here, b_k, 0), axis=1), tl.where(here, float("-inf"), b_v)


@triton.jit(do_not_specialize=["N", "K", "n_bins"])
def refine_kernel(
    tokens, rows, codes, inverse, shift, code_scale, tile_scale, tile_weight, norm, bias, half_sq, length, mean_sq,
    best, rest, winner, indices, counts, open_tokens, low, factors, found,
    N, N_pad, K, K_bias, n_bins,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
    CANDIDATES: tl.constexpr, SPLIT: tl.constexpr, SHIFT: tl.constexpr,
    WIDE_X: tl.constexpr, WIDE_E: tl.constexpr, UNIT: tl.constexpr, CERTIFIED: tl.constexpr,
    SLACK: tl.constexpr, BIAS_ERROR: tl.constexpr, E: tl.constexpr, UNIT_ERROR: tl.constexpr,
    INFLATE: tl.constexpr, A_FINE: tl.constexpr, LAMBDA_FINE: tl.constexpr, TINY: tl.constexpr,
    ORACLE: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One program proves or passes on BT tokens of one head.

    Writes the index of a proved token, -1 for a token with NaN or Inf, and appends the others to the open list. Codes
    and tokens are read only for the few tokens whose best code the bounds alone do not prove.
    """
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < N
    o_bin = tl.arange(0, BINS)[None, :]
    b_v1 = tl.full([BT], float("-inf"), tl.float32)
    b_v2 = b_v1
    b_rest = b_v1
    b_k1 = tl.zeros([BT], tl.int32)
    b_k2 = b_k1
    o_bins = tl.arange(0, BT)[:, None] * n_bins + o_bin  # from the first token of this program
    p_best, p_rest = best + (i_h * N_pad + i_t * BT) * n_bins, rest + (i_h * N_pad + i_t * BT) * n_bins
    p_winner = winner + (i_h * N_pad + i_t * BT) * n_bins
    for first in range(0, n_bins, BINS):
        m_b = m_t[:, None] & (first + o_bin < n_bins)
        b_v = tl.load(p_best + o_bins, mask=m_b, other=float("-inf"))  # [BT, BINS]
        b_k = tl.load(p_winner + o_bins, mask=m_b, other=0)
        b_r = tl.load(p_rest + o_bins, mask=m_b, other=float("-inf"))
        a1, h1, b_v = take_largest(b_v, b_k, o_bin)
        a2, h2, b_v = take_largest(b_v, b_k, o_bin)
        a3 = tl.maximum(tl.max(b_r, axis=1), tl.max(b_v, axis=1))
        wins = a1 > b_v1
        # The loser of the two firsts against the second of the winner; what is open_list goes into the rest.
        x, kx = tl.where(wins, b_v1, a1), tl.where(wins, b_k1, h1)
        y, ky = tl.where(wins, a2, b_v2), tl.where(wins, h2, b_k2)
        b_rest = tl.maximum(tl.maximum(b_rest, a3), tl.maximum(tl.minimum(x, y), tl.where(wins, b_v2, a2)))
        b_v1, b_k1 = tl.where(wins, a1, b_v1), tl.where(wins, h1, b_k1)
        b_v2, b_k2 = tl.maximum(x, y), tl.where(y > x, ky, kx)
        o_bins += BINS

    b_X = tl.load(norm + i_h * N_pad + o_t)
    b_finite = b_X == b_X
    m_in = m_t & (b_X < float("inf"))
    i_tile = (i_h * N_pad + o_t) // TILE
    b_scale = tl.load(tile_scale + i_tile)
    b_code_scale = tl.load(code_scale + i_h)
    b_c = ratio(b_scale, b_code_scale)
    b_M = tl.load(mean_sq + i_h)
    b_cM = b_c * b_M
    b_eta = ORACLE * b_X * b_X / b_c if SHIFT else b_X * 0.0

    # The bound of the best code, less all that it can exceed its score by.
    b_G = tl.load(bias + (i_h * K_bias + b_k1) * 2 + 1, mask=m_in, other=0.0)
    b_slack = SLACK * tl.load(tile_weight + i_tile) * b_G
    if SHIFT:
        b_slack += BIAS_ERROR * b_c * (0.5 * b_G * b_G + b_M)
    b_best = b_v1 - b_cM - b_slack - (tl.abs(b_v1) + b_cM) * (UP - 1.0)
    b_threshold = below(b_best, b_cM, b_eta, UP)
    # Below zero int32 order is not float order, so the threshold itself has to be above.
    proved = m_in & (b_threshold > 0.0) & (b_v2 < b_threshold) & (b_rest < b_threshold)
    b_code = b_k1
    m_two = m_in & (~proved)
    if tl.max(m_two.to(tl.int32), axis=0) > 0:
        low1, high1 = code_bounds(
            tokens, codes, inverse, shift, half_sq, length, i_h, o_t, m_two, b_k1.to(tl.int64)[:, None],
            b_scale, b_code_scale, b_c, b_X, N, K,
            D, BT, 1, BD, SHIFT, WIDE_X, WIDE_E, UNIT, E, UNIT_ERROR,
        )  # fmt: skip
        low2, high2 = code_bounds(
            tokens, codes, inverse, shift, half_sq, length, i_h, o_t, m_two & (b_v2 > float("-inf")),
            b_k2.to(tl.int64)[:, None], b_scale, b_code_scale, b_c, b_X, N, K,
            D, BT, 1, BD, SHIFT, WIDE_X, WIDE_E, UNIT, E, UNIT_ERROR,
        )  # fmt: skip
        low1, high1 = tl.reshape(low1, [BT]), tl.reshape(high1, [BT])
        low2, high2 = tl.reshape(low2, [BT]), tl.reshape(high2, [BT])
        wins = low2 > low1
        b_best = tl.where(m_two, tl.maximum(low1, low2), b_best)
        b_other = tl.where(wins, high1, high2)
        b_threshold = below(b_best, b_cM, b_eta, UP)
        by_two = m_two & (b_threshold > 0.0) & (b_rest < b_threshold)
        by_two &= b_other < b_best - tl.abs(b_best) * (UP - 1.0) - b_eta
        b_code = tl.where(m_two & wins, b_k2, b_code)
        proved |= by_two
    if not CERTIFIED:
        proved = proved & False
    tl.store(indices + i_h * N + o_t, tl.where(proved, b_code, -1).to(tl.int64), mask=m_t)

    m_open = m_t & b_finite & (~proved)
    b_open = m_open.to(tl.int32)
    count = tl.sum(b_open, axis=0)
    if count > 0:
        o_list = tl.atomic_add(counts + i_h, count, sem="relaxed") + tl.cumsum(b_open, axis=0) - 1
        tl.store(open_tokens + i_h * N + o_list, o_t, mask=m_open)
        if CERTIFIED:
            b_threshold = tl.where(m_in, below(b_best, b_cM, b_eta, UP), float("-inf"))
        else:
            b_threshold = tl.full([BT], float("-inf"), tl.float32)
        store_open(
            tokens, rows, shift, low, factors, found, i_h, o_t, o_list, m_open, b_scale, b_c, b_X, b_threshold,
            N, N_pad, D, DP, BT, BD, CANDIDATES, SHIFT, WIDE_X, SPLIT, INFLATE, A_FINE, LAMBDA_FINE, TINY, UP,
        )  # fmt: skip


def refine(x: Tensor, packed: PackedCodebook, packed_tokens: PackedTokens, bins: Bins) -> tuple[Tensor, Open]:
    """Indices [H, N] int64 of proved tokens, and the open list."""
    H, N, D = x.shape
    K = packed.codes.shape[1]
    indices = torch.empty(H, N, dtype=torch.int64, device=x.device)
    open_list = no_open(N, packed_tokens, packed.split)
    DP = packed_tokens.rows.shape[2]
    refine_kernel[(cdiv(N, TOKENS), H)](
        x, packed_tokens.rows, packed.codes, packed.inverse, packed.shift, packed.scale,
        packed_tokens.scale, packed_tokens.weight, packed_tokens.norm,
        packed.bias, packed.half_sq, packed.length, packed.mean_sq, bins.best, bins.rest, bins.winner,
        indices, open_list.counts, open_list.tokens, open_list.low, open_list.factors, open_list.found,
        N, packed_tokens.norm.shape[1], K, packed.bias.shape[1], bins.per_token,
        D=D, DP=DP, BT=TOKENS, BD=column_chunk(D), BINS=BINS, TILE=TOKEN_TILE,
        CANDIDATES=CANDIDATES, SPLIT=packed.split, SHIFT=packed.metric == "euclidean", WIDE_X=x.dtype == torch.float64,
        WIDE_E=packed.codes.dtype == torch.float64, UNIT=packed.metric == "cosine",
        CERTIFIED=D <= bounds.MAX_CERTIFIED_D, SLACK=(2.0 + bounds.accumulation(DP)) * bounds.UP,
        BIAS_ERROR=4.0 * bounds.bias_error(D, DP) * bounds.UP, E=bounds.refinement(D, 32) * bounds.UP,
        UNIT_ERROR=bounds.UNIT if packed.metric == "cosine" else 0.0,
        INFLATE=bounds.norm_inflation(D), A_FINE=bounds.fine_accumulation(DP), LAMBDA_FINE=bounds.balance(True),
        TINY=bounds.TINY, ORACLE=2 * bounds.ORACLE, UP=bounds.UP, **all_registers(),
    )  # fmt: skip
    return indices, open_list
