"""The frame of a codebook: the shift m, the power of two 2^b and the mean M of the packed codes (`bounds.py`)."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import column_chunk
from ..launch import all_registers, cdiv
from . import bounds
from .powers import exp2_exact, power_of_two

# Programs per chunk of columns that measure codes, at most; the next kernel reads one result of each.
MOST_PARTS = 128
# Codes among which the ordinary ones are found, one in so many of them at least: the others may be long.
SAMPLE, ORDINARY = 256, 64
# Codes 2^LONG times as long as the shortest neither move the frame nor widen M.
LONG = 3
# fp16 spans 2^40: an ordinary code 2^-24 below the range keeps 12 bits of it, the others so much room above it.
ROOM = 24
# Twice the least M, beside the squared limit of ordinary sizes: far from 0 the spread of codes is small beside that.
LEAST = 2.0**-36


@triton.jit
def unit_or_given(p_e, b_inv, m_e, WIDE: tl.constexpr, UNIT: tl.constexpr):
    """g e: the codes as given (g = 1) or of unit length, in float64 for float64 codes and in fp32 otherwise."""
    b_e = tl.load(p_e, mask=m_e, other=0.0)
    b_e = b_e.to(tl.float64) if WIDE else b_e.to(tl.float32)
    return b_e * b_inv if UNIT else b_e


@triton.jit
def ordinary(sizes, K, SAMPLE: tl.constexpr, ORDINARY: tl.constexpr, LONG: tl.constexpr):
    """The limit of the sizes of ordinary codes, a power of two, and one of these codes.

    A code is ordinary if it is not much longer than the shortest ones: the exponent of at least one in ORDINARY of
    SAMPLE codes, leaving out zeros and infinities, plus LONG. Where all are left out the limit is inf.
    """
    o_k = (tl.arange(0, SAMPLE).to(tl.int64) * K) // SAMPLE
    b_size = tl.load(sizes + o_k)
    b_size = tl.where(b_size > 0.0, b_size, float("inf"))
    b_exponent = (b_size.to(tl.int32, bitcast=True) >> 23) & 255
    number = tl.sum((b_exponent < 255).to(tl.int32), axis=0)
    exponent = tl.full([], 0, tl.int32)  # the largest that fewer than one in ORDINARY are below
    for i in tl.static_range(8):
        larger = exponent | (128 >> i)
        below = tl.sum((b_exponent < larger).to(tl.int32), axis=0)
        exponent = tl.where(below * ORDINARY < number, larger, exponent)
    code = tl.min(tl.where(b_exponent == exponent, o_k, K), axis=0)
    limit = (tl.minimum(exponent + 1 + LONG, 255) << 23).to(tl.float32, bitcast=True)
    none = number == 0
    return tl.where(none, float("inf"), limit), tl.where(none, 0, code)


@triton.jit(do_not_specialize=["K", "parts"])
def measure_columns_kernel(
    codes, inverse, sizes, measured,
    K, parts,
    D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, EUCLIDEAN: tl.constexpr,
    SAMPLE: tl.constexpr, ORDINARY: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """One program measures BD columns of every parts-th block of BK codes of one head.

    Writes number, sum and root of the sum of squares of the finite values of ordinary codes, minimum and maximum of
    the finite values of all codes, the value that was subtracted first, and the limit of what is ordinary, in fp32
    (measured [H, parts, 7, D]). For euclidean distances the value is that of an ordinary code, so that squares tell how
    values far from 0 spread. For the other metrics, whose M is 0, it is 0, and so are the squares.
    """
    i_p, i_h = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    limit, code = tl.full([], float("inf"), tl.float32), tl.full([], 0, tl.int64)
    if not UNIT:
        limit, code = ordinary(sizes + i_h * K, K, SAMPLE, ORDINARY, LONG)
    b_first = tl.zeros([BD], tl.float32)
    if EUCLIDEAN:
        b_first = tl.load(codes + (i_h * K + code) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_first = tl.where(tl.abs(b_first) < float("inf"), b_first, 0.0)
    b_number, b_sum, b_squares = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float64)
    b_low, b_high = tl.full([BD], float("inf"), tl.float32), tl.full([BD], float("-inf"), tl.float32)
    for k in range(i_p * BK, K, parts * BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < K
        b_inv = tl.load(inverse + i_h * K + o_k, mask=m_k, other=0.0)[:, None] if UNIT else 1.0
        m_e = m_k[:, None] & m_d[None, :]
        b_e = unit_or_given(codes + (i_h * K + o_k)[:, None] * D + o_d[None, :], b_inv, m_e, WIDE, UNIT)
        b_e = b_e.to(tl.float32)  # [BK, BD]
        if EUCLIDEAN:
            b_e -= b_first[None, :]
        # The compiler would turn b_e - b_e == 0 into a test of the rounding error of the product e g.
        finite = m_e & (tl.abs(b_e) < float("inf"))
        near = finite
        if not UNIT:
            near &= (tl.load(sizes + i_h * K + o_k, mask=m_k, other=float("inf")) <= limit)[:, None]
        b_number += tl.sum(near.to(tl.float32), axis=0)
        b_sum += tl.sum(tl.where(near, b_e, 0.0), axis=0)
        if EUCLIDEAN:  # in float64: values within the range of fp32 have squares outside it
            b_squares += tl.sum(tl.where(near, b_e.to(tl.float64) * b_e.to(tl.float64), 0.0), axis=0)
        b_low = tl.minimum(b_low, tl.min(tl.where(finite, b_e, float("inf")), axis=0))
        b_high = tl.maximum(b_high, tl.max(tl.where(finite, b_e, float("-inf")), axis=0))
    p_measured = measured + ((i_h * parts + i_p) * 7) * D + o_d
    tl.store(p_measured, b_number, mask=m_d)
    tl.store(p_measured + D, b_sum, mask=m_d)
    tl.store(p_measured + 2 * D, tl.sqrt(b_squares).to(tl.float32), mask=m_d)
    tl.store(p_measured + 3 * D, b_low, mask=m_d)
    tl.store(p_measured + 4 * D, b_high, mask=m_d)
    tl.store(p_measured + 5 * D, b_first, mask=m_d)
    tl.store(p_measured + 6 * D, tl.zeros([BD], tl.float32) + limit, mask=m_d)


@triton.jit(do_not_specialize=["parts"])
def frame_kernel(
    measured, shift, scale, offset, mean_sq,
    parts,
    D: tl.constexpr, ROOT_D: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr, UP: tl.constexpr,
    EUCLIDEAN: tl.constexpr, ROOM: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """One program turns the measurements of one head into m [D], 2^b, an upper bound of 2^b |m|, and M.

    The longest code fills fp16; of euclidean codes the longest that leaves room for the ordinary ones.
    """
    i_h = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, PARTS)
    b_largest = tl.zeros([BD], tl.float32)
    b_far = tl.zeros([BD], tl.float32)
    b_spread = tl.zeros([BD], tl.float64)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        m_d = o_d < D
        m_p = (o_p < parts)[:, None] & m_d[None, :]
        p_measured = measured + ((i_h * parts + o_p) * 7)[:, None] * D + o_d[None, :]
        b_number = tl.maximum(tl.sum(tl.load(p_measured, mask=m_p, other=0.0), axis=0), 1.0)
        b_mean = tl.sum(tl.load(p_measured + D, mask=m_p, other=0.0), axis=0) / b_number
        b_root = tl.load(p_measured + 2 * D, mask=m_p, other=0.0).to(tl.float64)
        b_low = tl.min(tl.load(p_measured + 3 * D, mask=m_p, other=float("inf")), axis=0)
        b_high = tl.max(tl.load(p_measured + 4 * D, mask=m_p, other=float("-inf")), axis=0)
        b_first = tl.load(measured + (i_h * parts * 7 + 5) * D + o_d, mask=m_d, other=0.0)
        # Any finite shift is valid where the sum overflows.
        b_mean = tl.where(tl.abs(b_first + b_mean) < float("inf"), b_mean, -b_first)
        b_span = tl.maximum(tl.maximum(b_high - b_mean, b_mean - b_low), 0.0)  # max_k |g e - m|
        b_squares = tl.sum(b_root * b_root, axis=0) / b_number - b_mean.to(tl.float64) * b_mean.to(tl.float64)
        tl.store(shift + i_h * D + o_d, b_first + b_mean, mask=m_d)
        b_largest = tl.maximum(b_largest, tl.where(m_d, b_span, 0.0))
        b_far = tl.maximum(b_far, tl.where(m_d, tl.abs(b_first + b_mean), 0.0))
        b_spread += tl.where(m_d & (b_squares > 0.0), b_squares, 0.0)
    # The limits keep 2^b, and 2^a / 2^b for tokens of any size, normal numbers.
    limit = tl.load(measured + (i_h * parts * 7 + 6) * D)
    limit = tl.where(limit < float("inf"), limit, 1.0)
    largest = tl.max(b_largest, axis=0)
    b_exponent = power_of_two(tl.where(largest > 0.0, largest, limit), -106, 119)
    if EUCLIDEAN:
        b_exponent = tl.maximum(b_exponent, power_of_two(limit, -106, 119) - ROOM)
    b_scale = exp2_exact(b_exponent)
    tl.store(scale + i_h, b_scale)
    tl.store(offset + i_h, tl.max(b_far, axis=0) * b_scale * ROOT_D)
    if EUCLIDEAN:  # where ordinary codes are all alike, the best score has to stay above zero
        b_spread = tl.maximum(tl.sum(b_spread, axis=0), limit.to(tl.float64) * limit.to(tl.float64) * LEAST)
        b_M = b_spread * b_scale.to(tl.float64) * b_scale.to(tl.float64) * 0.5
        tl.store(mean_sq + i_h, b_M.to(tl.float32) * UP)
    else:
        tl.store(mean_sq + i_h, 0.0)


def frame(codes: Tensor, inverse: Tensor, sizes: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m [H, D], 2^b [H], a bound of 2^b |m| [H] and M [H], fp32, of dense codes [H, K, D] and g_k [H, K] of unit codes.

    sizes [H, K] fp32 are the largest absolute values of the codes. Any M is valid. It is 0 for other than euclidean
    distances.
    """
    H, K, D = codes.shape
    block_k, block_d = 64, column_chunk(D, 64)
    parts = min(cdiv(K, block_k), MOST_PARTS)
    measured = torch.empty(H, parts, 7, D, dtype=torch.float32, device=codes.device)
    shift = torch.empty(H, D, dtype=torch.float32, device=codes.device)
    scale, offset, mean_sq = (torch.empty(H, dtype=torch.float32, device=codes.device) for _ in range(3))
    measure_columns_kernel[(parts, cdiv(D, block_d), H)](
        codes, inverse, sizes, measured, K, parts,
        D=D, BK=block_k, BD=block_d,
        WIDE=codes.dtype == torch.float64, UNIT=metric == "cosine", EUCLIDEAN=metric == "euclidean",
        SAMPLE=SAMPLE, ORDINARY=ORDINARY, LONG=LONG, **all_registers(),
    )  # fmt: skip
    frame_kernel[(H,)](
        measured, shift, scale, offset, mean_sq, parts,
        D=D, ROOT_D=math.sqrt(D) * bounds.UP, PARTS=MOST_PARTS, BD=32, UP=bounds.UP,
        EUCLIDEAN=metric == "euclidean", ROOM=ROOM, LEAST=LEAST,
    )  # fmt: skip
    return shift, scale, offset, mean_sq
