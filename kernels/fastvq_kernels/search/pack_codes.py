"""The codebook in the packed frame: K D work once per step, so that the scan does none of it."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import CODE_TILE, SPLIT_D, ScanConfig, packed_width, scan_config
from ..launch import all_registers, cdiv, dense
from . import bounds
from .bounds import HALF_LIMIT, LARGEST, LEFT_OUT, ROUNDED
from .equal_codes import log_slots, measure_rows, repeats
from .frame import frame, unit_or_given
from .norms import code_norms


@dataclass(frozen=True)
class PackedCodebook:
    """A codebook ready for both scans; `bounds.py` has the meaning of every bound.

    Padding, codes with NaN or Inf, and codes that equal one of a lower index never win. A code outside the range is a
    candidate of every token, or, if only its length is, a code of the length where the range ends.

    codes    [H, K, D]    as given, dense: refinement and the float64 scan read these
    metric                euclidean, dot or cosine
    shift    [H, D]       fp32 m
    scale    [H]          fp32 2^b
    half     [H, KP, DP]  fp16 e^, KP a multiple of both scans' tiles of codes
    low      [H, KP, DP]  fp16 e2 of e' = e^ + e2 + rest; empty where half holds the split
    bias     [H, KP + BN, 2]  fp32 B_k (codes that never win: -inf) and G_k; the scan reads one tile ahead
    fine     [H, KP + BN, 2]  the same for the second scan
    half_sq  [H, K]       fp32 h_k; inf: never wins, FLT_MAX: outside the range
    length   [H, K]       fp32 n_k, and what the oracle rounds
    mean_sq  [H]          fp32 M
    norms    [H, K]       float64 |e_k| for cosine, empty otherwise
    inverse  [H, K]       g_k = 1 / |e_k| rounded (0 for a zero code, inf outside the range), for cosine, else empty
    split                 columns hold the three products of a two-part fp16 split (D <= SPLIT_D)
    config                the scan configuration this layout is made for
    """

    codes: Tensor
    metric: str
    shift: Tensor
    scale: Tensor
    half: Tensor
    low: Tensor
    bias: Tensor
    fine: Tensor
    half_sq: Tensor
    length: Tensor
    mean_sq: Tensor
    norms: Tensor
    inverse: Tensor
    split: bool
    config: ScanConfig


@triton.jit
def load_code(p_e, b_inv, p_shift, o_d, m_d, m_e, b_scale, WIDE: tl.constexpr, UNIT: tl.constexpr):
    """e' = 2^b (g e - m) for one chunk of columns, fp32; the trailing dimension is the columns."""
    b_e = unit_or_given(p_e, b_inv, m_e, WIDE, UNIT)
    b_m = tl.load(p_shift + o_d, mask=m_d, other=0.0)  # [BD]
    return tl.where(m_e, (b_e - b_m) * b_scale, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["K"])
def pack_codes_kernel(
    codes, inverse, hashes, table, shift, scale, offset, mean_sq, half, low, bias, fine, half_sq, length,
    K, KP, K_bias,
    D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, LOG_SLOTS: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, EUCLIDEAN: tl.constexpr, SPLIT: tl.constexpr,
    INFLATE: tl.constexpr, LAMBDA: tl.constexpr, LAMBDA_FINE: tl.constexpr, ORACLE: tl.constexpr,
    UNIT_ERROR: tl.constexpr, ERROR: tl.constexpr, FINE_ERROR: tl.constexpr, REFINEMENT: tl.constexpr,
    LONGEST: tl.constexpr, TINY: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One program rounds BK codes of one head to fp16 and writes h_k, n_k and, by what the rounding left, B_k, G_k."""
    i_k, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    b_scale = tl.load(scale + i_h)
    b_inv = tl.load(inverse + i_h * K + o_k, mask=m_k, other=0.0)[:, None] if UNIT else 1.0

    USED: tl.constexpr = 3 * D if SPLIT else D
    b_finite = tl.full([BK], 1, tl.int32)
    b_within = b_finite
    b_sq = tl.zeros([BK], tl.float32)
    b_res = tl.zeros([BK], tl.float32)
    b_res_fine = tl.zeros([BK], tl.float32)
    for d in range(0, DP, BD):
        o_c = d + tl.arange(0, BD)
        m_c = o_c < USED
        p_e = codes + (i_h * K + o_k)[:, None] * D + (o_c % D)[None, :]
        m_e = m_k[:, None] & m_c[None, :]
        b_given = unit_or_given(p_e, 1.0, m_e, WIDE, False)
        b_finite = tl.minimum(b_finite, tl.min((tl.abs(b_given) < float("inf")).to(tl.int32), axis=1))
        b_e = load_code(p_e, b_inv, shift + i_h * D, o_c % D, m_c, m_e, b_scale, WIDE, UNIT)  # [BK, BD]
        b_within = tl.minimum(b_within, tl.min((tl.abs(b_e) < float("inf")).to(tl.int32), axis=1))
        b_half = tl.where(tl.abs(b_e) < HALF_LIMIT, b_e, 0.0).to(tl.float16)
        b_r = b_e - b_half.to(tl.float32)
        b_low = tl.where(tl.abs(b_r) < HALF_LIMIT, b_r, 0.0).to(tl.float16)
        # Of x'.e' the three products leave out x2.e2, which counts as a residual.
        b_r_fine = tl.abs(b_r - b_low.to(tl.float32)) + tl.abs(b_low.to(tl.float32)) * LEFT_OUT
        o_half = (i_h * KP + o_k)[:, None] * DP + o_c[None, :]
        if SPLIT:
            b_half = tl.where((o_c // D == 2)[None, :], b_low, b_half)
            b_r_fine = tl.where((o_c < D)[None, :], b_r_fine, 0.0)
            b_r = b_r_fine
            b_e = tl.where((o_c < D)[None, :], b_e, 0.0)
        else:
            tl.store(low + o_half, b_low, mask=(o_k < KP)[:, None])
        b_sq += tl.sum(b_e * b_e, axis=1)
        b_res += tl.sum(b_r * b_r, axis=1)
        b_res_fine += tl.sum(b_r_fine * b_r_fine, axis=1)
        tl.store(half + o_half, b_half, mask=(o_k < KP)[:, None])

    can_win = m_k & (b_finite == 1)
    can_win &= ~repeats(codes, hashes, table, i_h, o_k, m_k, K, D, BK, BD, LOG_SLOTS)
    b_len = tl.sqrt(b_sq) * INFLATE
    # What was rounded before the residual was taken, what the oracle rounds, and for cosine the unit vectors.
    b_raw = b_scale if UNIT else b_len + tl.load(offset + i_h)
    b_more = b_len * ROUNDED + TINY + ORACLE * b_raw + UNIT_ERROR * b_scale
    b_len += TINY
    b_G = (b_len + LAMBDA * (tl.sqrt(b_res) * INFLATE + b_more)) * UP
    b_G_fine = (b_len + LAMBDA_FINE * (tl.sqrt(b_res_fine) * INFLATE + b_more)) * UP
    inside = can_win & (b_len < LONGEST) & (b_G < float("inf"))
    measured = inside
    if EUCLIDEAN:  # no token is so long that a longer code could win where one of this length cannot
        too_long = can_win & (b_len >= LONGEST) & (b_within == 1)
        b_sq = tl.where(too_long, LONGEST * LONGEST * 0.5, b_sq)
        b_G = tl.where(too_long, LONGEST * (1.0 + LAMBDA), b_G)
        b_G_fine = tl.where(too_long, LONGEST * (1.0 + LAMBDA_FINE), b_G_fine)
        inside |= too_long
    b_h = tl.where(inside, b_sq * (0.5 if EUCLIDEAN else 0.0), 0.0)
    b_M = tl.load(mean_sq + i_h)
    b_B = b_M - b_h + 2.0 * ERROR * (b_h + b_M)
    b_B_fine = b_M - b_h + 2.0 * FINE_ERROR * (b_h + b_M)
    b_fixed = tl.where(can_win, float("inf"), float("-inf"))
    p_bias = (i_h * K_bias + o_k) * 2
    m_bias = o_k < K_bias
    tl.store(bias + p_bias, tl.where(inside, b_B, b_fixed), mask=m_bias)
    tl.store(bias + p_bias + 1, tl.where(inside, b_G, 0.0), mask=m_bias)
    # The second scan takes a large number instead, which may meet an infinite threshold.
    tl.store(fine + p_bias, tl.where(inside, b_B_fine, tl.minimum(b_fixed, LARGEST)), mask=m_bias)
    tl.store(fine + p_bias + 1, tl.where(inside, b_G_fine, 0.0), mask=m_bias)
    b_h = tl.where(can_win, tl.where(measured, b_h, LARGEST), float("inf"))
    tl.store(half_sq + i_h * K + o_k, b_h, mask=m_k)
    tl.store(length + i_h * K + o_k, b_len + ORACLE / REFINEMENT * b_raw, mask=m_k)


def pack_codebook(codebook: Tensor, metric: str = "euclidean", config: ScanConfig | None = None) -> PackedCodebook:
    """Pack codebook [K, D] or [H, K, D], float16, bfloat16, float32 or float64, for `nearest_code`."""
    codes = dense(codebook if codebook.ndim == 3 else codebook[None])
    H, K, D = codes.shape
    split = D <= SPLIT_D
    DP = packed_width(D)
    config = config or scan_config(DP)
    if DP % config.block_d:
        raise ValueError(f"config.block_d must divide the {DP} columns of packed rows, got {config.block_d}")
    tile = max(config.block_n, CODE_TILE)
    KP = cdiv(K, tile) * tile
    K_bias = KP + config.block_n
    unit, euclidean = metric == "cosine", metric == "euclidean"
    working = torch.float64 if codes.dtype == torch.float64 else torch.float32

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=codes.device)

    norms, inverse = empty(H, K if unit else 0, dtype=torch.float64), empty(H, K if unit else 0, dtype=working)
    if unit:
        code_norms(codes, out=norms, inverse=inverse)
    hashes, sizes, table = measure_rows(codes)
    shift, scale, offset, mean_sq = frame(codes, inverse, sizes, metric)

    half = empty(H, KP, DP, dtype=torch.float16)
    low = empty(H, 0 if split else KP, DP, dtype=torch.float16)
    bias, fine = empty(H, K_bias, 2), empty(H, K_bias, 2)
    half_sq, length = empty(H, K), empty(H, K)
    block_k = 64
    pack_codes_kernel[(cdiv(K_bias, block_k), H)](
        codes, inverse, hashes, table, shift, scale, offset, mean_sq, half, low, bias, fine, half_sq, length,
        K, KP, K_bias,
        D=D, DP=DP, BK=block_k, BD=min(DP, 32), LOG_SLOTS=log_slots(K),
        WIDE=working == torch.float64, UNIT=unit, EUCLIDEAN=euclidean, SPLIT=split,
        INFLATE=bounds.norm_inflation(D), LAMBDA=bounds.balance(split), LAMBDA_FINE=bounds.balance(True),
        ORACLE=bounds.ORACLE * bounds.UP, UNIT_ERROR=bounds.UNIT if unit else 0.0, TINY=bounds.TINY, UP=bounds.UP,
        ERROR=bounds.bias_error(D, DP) if euclidean else 0.0,
        FINE_ERROR=bounds.fine_bias_error(D, DP, split) if euclidean else 0.0,
        REFINEMENT=bounds.refinement(D, 32), LONGEST=bounds.longest(metric), **all_registers(),
    )  # fmt: skip
    return PackedCodebook(
        codes=codes, metric=metric, shift=shift, scale=scale, half=half, low=low, bias=bias, fine=fine,
        half_sq=half_sq, length=length, mean_sq=mean_sq, norms=norms, inverse=inverse, split=split, config=config,
    )  # fmt: skip
