"""Tokens into the packed frame: shift, one power of two per tile, fp16, and the measured residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import TOKEN_TILE
from ..launch import cdiv
from . import bounds
from .bounds import HALF_LIMIT, ROUNDED
from .powers import exp2_exact, power_of_two

if TYPE_CHECKING:
    from .pack_codes import PackedCodebook


@triton.jit
def load_shifted(p_x, p_shift, o_d, m_row, m_d, WIDE: tl.constexpr, SHIFT: tl.constexpr):
    """x - m for one chunk of columns, in float64 for float64 tokens and in fp32 otherwise."""
    b_x = tl.load(p_x + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)  # [BT, BD]
    b_x = b_x.to(tl.float64) if WIDE else b_x.to(tl.float32)
    if SHIFT:
        b_m = tl.load(p_shift + o_d, mask=m_d, other=0.0)  # [BD]
        b_x = tl.where(m_d[None, :] & m_row[:, None], b_x - b_m[None, :], 0.0)
    return b_x


@triton.jit(do_not_specialize=["N"])
def pack_tokens_kernel(
    x, shift, code_scale, half, norm, tile_scale, tile_weight,
    N, N_pad,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    SHIFT: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, LOWEST_RATIO: tl.constexpr,
    INFLATE: tl.constexpr, A: tl.constexpr, LAMBDA: tl.constexpr, TINY: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One program packs one tile of BT tokens of one head.

    Writes x^ [BT, DP] (zeros beyond D and N; with SPLIT the columns are x1, x2, x1 of x = x1 + x2), X per token
    (NaN: not finite; inf: outside the range, left to the third scan), and per tile the scale
    2^a and the weight w of the codes' slack.
    """
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < N
    p_x = x + (i_h * N + o_t)[:, None] * D
    p_shift = shift + i_h * D

    USED: tl.constexpr = 3 * D if SPLIT else D
    b_largest = tl.zeros([BT], tl.float32)
    b_finite = tl.full([BT], 1, tl.int32)
    for d in range(0, DP, BD):
        o_c = d + tl.arange(0, BD)
        b_x = load_shifted(p_x, p_shift, o_c % D, m_t, o_c < D, WIDE, False)  # [BT, BD]
        b_finite = tl.minimum(b_finite, tl.min((tl.abs(b_x) < float("inf")).to(tl.int32), axis=1))
        b_y = load_shifted(p_x, p_shift, o_c % D, m_t, o_c < D, WIDE, SHIFT).to(tl.float32)
        b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_y), axis=1))
    # A token that overflows fp32 must not flatten its neighbours: the scale ignores it.
    b_inside = (b_finite == 1) & (b_largest < float("inf"))
    b_b = ((tl.load(code_scale + i_h).to(tl.int32, bitcast=True) >> 23) & 255) - 127
    # c = 2^(a-b) must stay in its range, and 2^a a normal number.
    b_a = power_of_two(
        tl.max(tl.where(b_inside, b_largest, 0.0), axis=0),
        tl.maximum(b_b + LOWEST_RATIO, -120),
        tl.minimum(b_b + 40, 120),
    )
    b_scale = exp2_exact(b_a)
    b_inside &= b_largest * b_scale < HALF_LIMIT  # fp16 range, where the clamp held the exponent up

    b_sq = tl.zeros([BT], tl.float32)
    b_res = tl.zeros([BT], tl.float32)
    for d in range(0, DP, BD):
        o_c = d + tl.arange(0, BD)
        b_x = load_shifted(p_x, p_shift, o_c % D, m_t, o_c < USED, WIDE, SHIFT)
        b_y = (b_x * b_scale).to(tl.float32)  # [BT, BD]
        b_y = tl.where(b_inside[:, None], b_y, 0.0)
        b_half = b_y.to(tl.float16)
        b_r = b_y - b_half.to(tl.float32)
        if SPLIT:
            b_low = b_r.to(tl.float16)
            b_half = tl.where((o_c // D == 1)[None, :], b_low, b_half)
            b_r = tl.where((o_c < D)[None, :], b_r - b_low.to(tl.float32), 0.0)
            b_y = tl.where((o_c < D)[None, :], b_y, 0.0)
        b_sq += tl.sum(b_y * b_y, axis=1)
        b_res += tl.sum(b_r * b_r, axis=1)
        tl.store(half + (i_h * N_pad + o_t)[:, None] * DP + o_c[None, :], b_half)
    b_len = tl.sqrt(b_sq) * INFLATE
    # The shift, the cast and the scaling rounded b_y before its residual was taken.
    b_rho = tl.sqrt(b_res) * INFLATE + b_len * ROUNDED + TINY
    b_X = (b_len + b_rho) * UP
    b_w = tl.maximum(b_rho + A * b_X, (1.0 + A) * b_X / LAMBDA) * (1.0 + A) * UP
    tl.store(tile_scale + i_h * (N_pad // BT) + i_t, b_scale)
    tl.store(tile_weight + i_h * (N_pad // BT) + i_t, tl.max(b_w, axis=0))
    b_X = tl.where(b_inside, b_X, float("inf"))
    tl.store(norm + i_h * N_pad + o_t, tl.where(b_finite == 1, b_X, float("nan")))


@dataclass(frozen=True)
class PackedTokens:
    """Tokens in the frame of one packed codebook.

    rows    [H, N_pad, DP]  fp16 x^, N_pad a multiple of TOKEN_TILE
    norm    [H, N_pad]      fp32 X; NaN: not finite, inf: outside the range
    scale   [H, N_pad / TOKEN_TILE]  fp32 2^a
    weight  [H, N_pad / TOKEN_TILE]  fp32 w
    """

    rows: Tensor
    norm: Tensor
    scale: Tensor
    weight: Tensor


def pack_tokens(x: Tensor, packed: PackedCodebook) -> PackedTokens:
    """Pack dense x [H, N, D] for `packed`."""
    H, N, D = x.shape
    DP = packed.half.shape[-1]
    tiles = cdiv(N, TOKEN_TILE)
    rows = torch.empty(H, tiles * TOKEN_TILE, DP, dtype=torch.float16, device=x.device)
    norm = torch.empty(H, tiles * TOKEN_TILE, dtype=torch.float32, device=x.device)
    scale = torch.empty(H, tiles, dtype=torch.float32, device=x.device)
    weight = torch.empty_like(scale)
    pack_tokens_kernel[(tiles, H)](
        x, packed.shift, packed.scale, rows, norm, scale, weight,
        N, tiles * TOKEN_TILE,
        D=D, DP=DP, BT=TOKEN_TILE, BD=min(DP, 32),
        SHIFT=packed.metric == "euclidean", WIDE=x.dtype == torch.float64, SPLIT=packed.split,
        LOWEST_RATIO=bounds.lowest_ratio(packed.metric), INFLATE=bounds.norm_inflation(D), A=bounds.accumulation(DP),
        LAMBDA=bounds.balance(packed.split), TINY=bounds.TINY, UP=bounds.UP,
        num_warps=8,
    )  # fmt: skip
    return PackedTokens(rows, norm, scale, weight)
