"""The moving averages of a codebook and the codes they give, in one pass over [K, D]."""

import triton
import triton.language as tl
from torch import Tensor

from ..configs import EMA
from ..launch import cdiv, dense


@triton.jit(do_not_specialize=["K"])
def ema_kernel(
    p_embeddings,  # [K, D] float32, written
    p_n,  # [K] float32, written
    p_z,  # [K, D] float32, read and written
    p_moved,  # [K] float32: the new N before restarts
    p_total,  # [] float32: its sum
    p_sums,  # [K, D] float32
    p_rows,  # [K, D] float32, or None: no restarts
    p_found,  # [] bool, or None: rows may be used
    K,
    decay,
    gain,  # 1 - decay
    smoothing,
    all_smoothing,  # K smoothing
    threshold,
    threshold_per_token,
    D: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    RESETS: tl.constexpr,
):
    """One program moves BK codes.

    Every operation is rounded by itself, with no multiplication fused into an addition, so that all processes, and
    PyTorch's operators, agree on every bit.
    """
    o_k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)  # [BK]
    m_k = o_k < K
    b_total = tl.broadcast_to(tl.load(p_total), [BK])
    b_n = tl.load(p_moved + o_k, mask=m_k, other=1.0)
    b_weight = tl.div_rn(b_n + smoothing, b_total + all_smoothing) * b_total
    if p_rows is not None:
        restarts = m_k & (b_n < threshold + threshold_per_token * b_total)
        if p_found is not None:
            restarts &= tl.load(p_found)
        if RESETS:
            b_n = tl.where(restarts, 1.0, b_n)
    tl.store(p_n + o_k, b_n, mask=m_k)
    # Before any token was ever counted there is nothing to divide by: codes and averages stay.
    m_z = m_k & (b_total > 0)
    m_moved = m_z
    if p_rows is not None:
        m_moved |= restarts
        if RESETS:
            m_z |= restarts
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)  # [BD]
        o_e = o_k[:, None] * D + o_d[None, :]
        m_e = m_k[:, None] & (o_d < D)[None, :]
        b_z = tl.load(p_z + o_e, mask=m_e, other=0.0)  # [BK, BD]
        b_z = b_z * decay + tl.load(p_sums + o_e, mask=m_e, other=0.0) * gain
        b_e = tl.div_rn(b_z, b_weight[:, None])
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
) -> None:
    """The fields of `fastvq.common.ema_step.EMAStep` in their order; ``embeddings``, ``N`` and ``z_avg`` are dense."""
    K, D = embeddings.shape
    moved = N * decay + counts * (1 - decay)
    block_k, block_d = EMA.blocks(D)
    threshold, per_token = (restart_thres, 0.0) if restart_thres_relative is None else (0.0, restart_thres_relative / K)
    ema_kernel[(cdiv(K, block_k),)](
        embeddings, N, z_avg, moved, moved.sum(), dense(sums), rows if rows is None else dense(rows), found,
        K, decay, 1 - decay, smoothing, K * smoothing, threshold, per_token,
        D=D, BK=block_k, BD=block_d, RESETS=resets, num_warps=EMA.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
