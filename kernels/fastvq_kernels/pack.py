"""The codebook in the packed frame: what is done once per step, K D work, so that the scan does none of it."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bounds
from .configs import SPLIT_D, ScanConfig, packed_width, scan_config
from .dense import dense
from .norms import code_norms


@dataclass(frozen=True)
class PackedCodebook:
    """A codebook ready for the scan; `bounds.py` has the meaning of every bound.

    codes    [H, K, D]    as given, dense: refinement and the float64 scan read these
    metric                euclidean, dot or cosine
    shift    [H, D]       fp32 m
    scale    [H]          fp32 2^b
    half     [H, KP, DP]  fp16 e^, KP a multiple of the scan's tile of BN codes
    bias     [H, KP + BN, 2]  fp32 B_k (padding and codes with NaN or Inf: -inf) and G_k; the scan reads one tile ahead
    half_sq  [H, K]       fp32 h_k; inf: never chosen, FLT_MAX: outside the range, always a candidate
    length   [H, K]       fp32 n_k
    mean_sq  [H]          fp32 M
    norms    [H, K]       float64 |e_k| for cosine, empty otherwise
    inverse  [H, K]       g_k = 1 / |e_k| rounded (0 for a zero code), for cosine, empty otherwise
    split                 columns hold the three products of a two-part fp16 split (D <= SPLIT_D)
    config                the scan configuration this layout is made for
    """

    codes: Tensor
    metric: str
    shift: Tensor
    scale: Tensor
    half: Tensor
    bias: Tensor
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
    b_e = tl.load(p_e, mask=m_e, other=0.0)
    b_e = b_e.to(tl.float64) if WIDE else b_e.to(tl.float32)
    if UNIT:
        b_e = b_e * b_inv
    b_m = tl.load(p_shift + o_d, mask=m_d, other=0.0)  # [BD]
    return tl.where(m_e, (b_e - b_m) * b_scale, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["K"])
def pack_codes_kernel(
    codes, inverse, shift, scale, half, half_sq, length, residual,
    K, KP,
    D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr, INFLATE: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """One program rounds BK codes of one head to fp16 and measures |e'|^2 / 2, |e'| and |e' - e^|."""
    i_k, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    b_scale = tl.load(scale + i_h)
    b_inv = tl.load(inverse + i_h * K + o_k, mask=m_k, other=0.0)[:, None] if UNIT else 1.0

    USED: tl.constexpr = 3 * D if SPLIT else D
    b_sq = tl.zeros([BK], tl.float32)
    b_res = tl.zeros([BK], tl.float32)
    for d in range(0, DP, BD):
        o_c = d + tl.arange(0, BD)
        m_c = o_c < USED
        p_e = codes + (i_h * K + o_k)[:, None] * D + (o_c % D)[None, :]
        m_e = m_k[:, None] & m_c[None, :]
        b_e = load_code(p_e, b_inv, shift + i_h * D, o_c % D, m_c, m_e, b_scale, WIDE, UNIT)  # [BK, BD]
        b_inside = tl.abs(b_e) < 65000.0
        b_half = tl.where(b_inside, b_e, 0.0).to(tl.float16)
        b_r = b_e - b_half.to(tl.float32)
        if SPLIT:
            b_low = b_r.to(tl.float16)
            b_half = tl.where((o_c // D == 2)[None, :], b_low, b_half)
            # The product left out, x2.e2, counts as a residual: |x2| <= 2^-10 X.
            b_r = tl.where((o_c < D)[None, :], tl.abs(b_r - b_low.to(tl.float32)) + tl.abs(b_r) * 0.0009765625, 0.0)
            b_e = tl.where((o_c < D)[None, :], b_e, 0.0)
        b_sq += tl.sum(b_e * b_e, axis=1)
        b_res += tl.sum(b_r * b_r, axis=1)
        tl.store(half + (i_h * KP + o_k)[:, None] * DP + o_c[None, :], b_half, mask=m_k[:, None])
    b_len = tl.sqrt(b_sq) * INFLATE
    tl.store(half_sq + i_h * K + o_k, b_sq * 0.5, mask=m_k)
    tl.store(length + i_h * K + o_k, b_len + TINY, mask=m_k)
    tl.store(residual + i_h * K + o_k, tl.sqrt(b_res) * INFLATE + b_len * 2.384185791015625e-07 + TINY, mask=m_k)


def frame(codes: Tensor, inverse: Tensor | None, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Shift (mean of the finite codes, fp32) and power-of-two scale that brings them below 2^15; no host sync."""
    e = codes.float() if inverse is None else (codes * inverse[..., None]).float()
    e = torch.where(finite[..., None], e, 0.0)
    count = finite.sum(1, keepdim=True).clamp(min=1)
    # A mean that overflows is no help: any finite shift is valid.
    shift = torch.nan_to_num(e.sum(1) / count, nan=0.0, posinf=0.0, neginf=0.0)
    largest = torch.where(finite[..., None], (e - shift[:, None]).abs(), 0.0).amax((1, 2))
    exponent = 15 - torch.frexp(largest.clamp(2.0**-105, 2.0**120))[1]
    scale = ((exponent + 127) << 23).to(torch.int32).view(torch.float32)  # exact, unlike a power function
    return shift.contiguous(), scale


def pack_codebook(codebook: Tensor, metric: str = "euclidean", config: ScanConfig | None = None) -> PackedCodebook:
    """Pack codebook [K, D] or [H, K, D], float16, bfloat16, float32 or float64, for `nearest_code`."""
    codes = dense(codebook if codebook.ndim == 3 else codebook[None])
    H, K, D = codes.shape
    split = D <= SPLIT_D
    DP = packed_width(D)
    config = config or scan_config(DP)
    KP = triton.cdiv(K, config.block_n) * config.block_n
    device = codes.device

    finite = torch.isfinite(codes).all(-1)  # [H, K]
    norms = code_norms(codes) if metric == "cosine" else torch.empty(H, 0, dtype=torch.float64, device=device)
    # A zero code has similarity 0, which the inverse 0 gives as well.
    inverse = torch.where(norms > 0, 1.0 / norms, 0.0).to(
        codes.dtype if codes.dtype == torch.float64 else torch.float32
    )
    unit = metric == "cosine"
    shift, scale = frame(codes, inverse if unit else None, finite)

    half = torch.zeros(H, KP, DP, dtype=torch.float16, device=device)
    half_sq, length, residual = (torch.empty(H, K, dtype=torch.float32, device=device) for _ in range(3))
    block_k = 64
    pack_codes_kernel[(triton.cdiv(K, block_k), H)](
        codes, inverse, shift, scale, half, half_sq, length, residual,
        K, KP,
        D=D, DP=DP, BK=block_k, BD=min(DP, 32),
        WIDE=codes.dtype == torch.float64, UNIT=unit, SPLIT=split, INFLATE=bounds.norm_inflation(D),
        TINY=bounds.TINY,
    )  # fmt: skip

    # The oracle's rounding and, for cosine, that of the unit vectors.
    raw = (
        torch.ones_like(length) * scale[:, None] if unit else length + shift.norm(dim=-1, keepdim=True) * scale[:, None]
    )
    residual = residual + bounds.ORACLE * bounds.UP * raw + (bounds.UNIT * scale[:, None] if unit else 0.0)
    inside = torch.isfinite(half_sq) & torch.isfinite(residual)
    error = bounds.bias_error(D, DP)
    if metric == "euclidean":
        mean_sq = torch.where(finite & inside, half_sq, 0.0).mean(1) * bounds.UP
        bias = mean_sq[:, None] - half_sq + 2.0 * error * (half_sq + mean_sq[:, None])
    else:
        mean_sq, half_sq, bias = torch.zeros_like(scale), torch.zeros_like(half_sq), torch.zeros_like(half_sq)
    largest = torch.finfo(torch.float32).max
    bias = torch.where(finite, torch.where(inside, bias, torch.inf), -torch.inf)
    slack = torch.where(finite & inside, (length + bounds.balance(split) * residual) * bounds.UP, 0.0)
    half_sq = torch.where(finite, torch.where(inside, half_sq, largest), torch.inf)
    half[:, :K] = torch.where((finite & inside)[..., None], half[:, :K], 0.0)
    bounds_of_codes = torch.zeros(H, KP + config.block_n, 2, dtype=torch.float32, device=device)
    bounds_of_codes[:, K:, 0] = -torch.inf
    bounds_of_codes[:, :K] = torch.stack((bias, slack), -1)
    return PackedCodebook(
        codes=codes, metric=metric, shift=shift, scale=scale, half=half, bias=bounds_of_codes,
        half_sq=half_sq, length=length, mean_sq=mean_sq, norms=norms, inverse=inverse, split=split, config=config,
    )  # fmt: skip
