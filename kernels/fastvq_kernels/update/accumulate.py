"""Tokens per code and their sums: by atomics, or in a fixed order (`ordered.py`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import ACCUMULATE, atomics_would_queue
from ..launch import cdiv, dense
from .ordered import ordered_statistics


@triton.jit(do_not_specialize=["N", "K"])
def accumulate_kernel(
    p_x,  # [N, D], any floating dtype
    p_indices,  # [N] int64
    p_counts,  # [K] int32
    p_sums,  # [K, D] float64
    N,
    K,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """One program adds BD dimensions of BN tokens to the rows of their codes, by float64 atomics.

    Tokens with an index outside [0, K) are ignored. The programs of the first block of dimensions count, in integers.
    The order of the additions differs from run to run.
    """
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    b_index = tl.load(p_indices + o_n, mask=o_n < N, other=-1)  # [BN]
    has_code = (b_index >= 0) & (b_index < K)
    m_x = has_code[:, None] & (o_d < D)
    b_x = tl.load(p_x + o_n[:, None] * D + o_d, mask=m_x, other=0.0).to(tl.float64)  # [BN, BD]
    tl.atomic_add(p_sums + b_index[:, None] * D + o_d, b_x, mask=m_x, sem="relaxed")
    if tl.program_id(1) == 0:
        tl.atomic_add(p_counts + b_index, tl.full([BN], 1, tl.int32), mask=has_code, sem="relaxed")


def code_statistics(
    x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Counts ``[K]`` int64 and sums ``[K, D]`` float64.

    Args:
        x: tokens ``[N, D]``, any floating dtype; added in float64.
        indices: int64 ``[N]``; indices outside ``[0, K)`` are ignored.
        n_codes: K.
        deterministic: True adds in a fixed order, False by atomics; None takes the faster way for the sizes.
    """
    x, indices = dense(x), dense(indices)
    if deterministic is None:
        deterministic = atomics_would_queue(len(x), n_codes)
    return (ordered_statistics if deterministic else atomic_statistics)(x, indices, n_codes)


def atomic_statistics(x: Tensor, indices: Tensor, n_codes: int) -> tuple[Tensor, Tensor]:
    """`code_statistics` of dense arguments by atomics."""
    n_tokens, dim = x.shape
    counts = torch.zeros(n_codes, dtype=torch.int32, device=x.device)
    sums = torch.zeros(n_codes, dim, dtype=torch.float64, device=x.device)
    if n_tokens:
        block_n, block_d = ACCUMULATE.blocks(dim)
        accumulate_kernel[cdiv(n_tokens, block_n), cdiv(dim, block_d)](
            x, indices, counts, sums, n_tokens, n_codes, D=dim, BN=block_n, BD=block_d, num_warps=ACCUMULATE.num_warps
        )
    return counts.long(), sums
