"""The moving averages of a codebook and the codes they give, in one pass over [K, D]."""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import EMA
from ..launch import all_registers, cdiv, dense

# From here on, halfway between float32's largest number and the next power of two, numbers round to infinity.
INFINITE = tl.constexpr(2.0**128 - 2.0**103)


def halves(value: float) -> tuple[int, int]:
    """The bits of a float64 as two int32: Triton rounds a Python float to float32."""
    return struct.unpack("<ii", struct.pack("<d", value))


@triton.jit
def from_halves(low, high):
    """The float64 of `halves`."""
    bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def average(p_z, p_embeddings, p_sums, o_e, m_e, m_starts, decay):
    """The new averages in float64, 0 where masked; those of ``m_starts`` start from the codes."""
    b_e = tl.load(p_embeddings + o_e, mask=m_e & m_starts, other=0.0)
    b_z = tl.where(m_starts, b_e, tl.load(p_z + o_e, mask=m_e & ~m_starts, other=0.0)).to(tl.float64)
    return b_z * decay + tl.load(p_sums + o_e, mask=m_e, other=0.0) * (1.0 - decay)


@triton.jit(
    do_not_specialize=[
        "K", "decay_low", "decay_high", "smoothing_low", "smoothing_high",
        "threshold_low", "threshold_high", "per_token_low", "per_token_high",
    ]
)  # fmt: skip
def ema_kernel(
    p_embeddings,  # [K, D] float32, read and written
    p_n,  # [K] float32, read and written
    p_z,  # [K, D] float32, read and written
    p_moved,  # [K] float64: the new N before restarts
    p_total,  # [] float64: its sum
    p_sums,  # [K, D] float64
    p_rows,  # [K, D] float32, or None: no restarts
    p_found,  # [] bool, or None: rows may be used
    p_stays,  # [K] bool, written
    K,
    decay_low,
    decay_high,
    smoothing_low,
    smoothing_high,
    threshold_low,
    threshold_high,
    per_token_low,
    per_token_high,
    D: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    RESETS: tl.constexpr,
):
    """One program moves BK codes, but for those that would not be finite in float32: it names them.

    Every operation is rounded to float64 by itself, with no multiplication fused into an addition, so that all
    processes, and PyTorch's operators, agree on every bit.
    """
    o_k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)  # [BK]
    m_k = o_k < K
    decay = from_halves(decay_low, decay_high)
    smoothing = from_halves(smoothing_low, smoothing_high)
    b_total = tl.broadcast_to(tl.load(p_total), [BK])
    b_n = tl.load(p_moved + o_k, mask=m_k, other=1.0)
    b_factor = 1.0 / ((b_n + smoothing) / (b_total + K * smoothing) * b_total)
    # Before a token was ever counted there is nothing to divide by: code and average stay.
    is_counted = m_k & (b_n > 0)
    starts = is_counted & (tl.load(p_n + o_k, mask=m_k, other=1.0) == 0)
    b_largest = tl.zeros([BK], tl.float64)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)  # [BD]
        o_e = o_k[:, None] * D + o_d[None, :]
        m_e = m_k[:, None] & (o_d < D)[None, :]
        b_z = tl.abs(average(p_z, p_embeddings, p_sums, o_e, m_e, starts[:, None], decay))  # [BK, BD]
        # The comparison turns NaN into infinity.
        b_largest = tl.maximum(b_largest, tl.max(tl.where(b_z < INFINITE, b_z, float("inf")), 1))
    stays = is_counted & ~((b_largest < INFINITE) & (b_largest * b_factor < INFINITE))
    tl.store(p_stays + o_k, stays, mask=m_k)
    if p_rows is not None:
        threshold = from_halves(threshold_low, threshold_high)
        restarts = m_k & ~stays & (b_n < threshold + from_halves(per_token_low, per_token_high) * b_total)
        if p_found is not None:
            restarts &= tl.load(p_found)
        if RESETS:
            b_n = tl.where(restarts, 1.0, b_n)
    tl.store(p_n + o_k, b_n, mask=m_k & ~stays)
    m_z = is_counted & ~stays
    m_moved = m_z
    if p_rows is not None:
        m_moved |= restarts
        if RESETS:
            m_z |= restarts
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)  # [BD]
        o_e = o_k[:, None] * D + o_d[None, :]
        m_e = m_k[:, None] & (o_d < D)[None, :]
        b_z = average(p_z, p_embeddings, p_sums, o_e, m_e & ~stays[:, None], starts[:, None], decay)  # [BK, BD]
        b_e = b_z * b_factor[:, None]
        if p_rows is not None:
            b_row = tl.load(p_rows + o_e, mask=m_e & restarts[:, None], other=0.0)
            b_e = tl.where(restarts[:, None], b_row, b_e)
            if RESETS:
                b_z = tl.where(restarts[:, None], b_row, b_z)
        tl.store(p_z + o_e, b_z, mask=m_e & m_z[:, None])
        tl.store(p_embeddings + o_e, b_e, mask=m_e & m_moved[:, None])


def ema_step(
    embeddings: Tensor,
    N: Tensor,
    z_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    rows: Tensor | None,
    found: Tensor | None,
    decay: float,
    restart_thres: float,
    restart_thres_relative: float | None,
    resets: bool,
    smoothing: float,
) -> Tensor:
    """Takes the fields of `fastvq.common.ema_step.EMAStep` in their order; the state is dense. Returns who stayed."""
    K, D = embeddings.shape
    before = torch.where(N > 0, N, (counts > 0).to(N.dtype))  # an average that starts counts once
    moved = before.double() * decay + counts * (1 - decay)
    block_k, block_d = EMA.blocks(D)
    threshold, per_token = (restart_thres, 0.0) if restart_thres_relative is None else (0.0, restart_thres_relative / K)
    stays = torch.empty(K, dtype=torch.bool, device=N.device)
    ema_kernel[(cdiv(K, block_k),)](
        embeddings, N, z_avg, moved, moved.sum(), dense(sums), rows if rows is None else dense(rows), found, stays,
        K, *halves(decay), *halves(smoothing), *halves(threshold), *halves(per_token),
        D=D, BK=block_k, BD=block_d, RESETS=resets, num_warps=EMA.num_warps, enable_fp_fusion=False, **all_registers(),
    )  # fmt: skip
    return stays
