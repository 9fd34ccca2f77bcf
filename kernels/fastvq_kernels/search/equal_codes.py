"""Equal codes, found when a codebook is packed: only the first of them can win, since the lowest index does."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import column_chunk
from ..launch import cdiv, next_power_of_2

# A code is looked up in so many tables of so many slots per code. A slot holds one code, so an equal code is overlooked
# where other codes hold all of its slots: of codes without any pattern, less than one in a thousand.
TABLES = tl.constexpr(4)
SLOTS_PER_CODE = 4


@triton.jit
def mixed(h):
    """A permutation of uint32 that leaves no pattern: the digits of the golden ratio and of the root of 2 have none."""
    h = (h ^ (h >> 16)) * 0x9E3779B1
    h = (h ^ (h >> 15)) * 0x6A09E667
    return h ^ (h >> 16)


@triton.jit
def slot_of(b_hash, table: tl.constexpr, LOG_SLOTS: tl.constexpr):
    """Slot of a hash in one of the tables."""
    return table * (1 << LOG_SLOTS) + (mixed(b_hash + table * 0x3C6EF372) >> (32 - LOG_SLOTS)).to(tl.int64)


@triton.jit(do_not_specialize=["K"])
def measure_rows_kernel(
    codes, hashes, sizes, table,
    K,
    D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    LOG_SLOTS: tl.constexpr,
):  # fmt: skip
    """One program measures BK codes of one head: a hash, the same for equal codes, and the largest absolute value.

    Writes hashes [H, K] uint32 and sizes [H, K] fp32 (inf for a code with NaN), and leaves in each slot of the tables
    [H, TABLES, slots], at first zero, K - k of the first code k that belongs there.
    """
    i_k, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    b_hash = tl.zeros([BK], tl.uint32)
    b_size = tl.zeros([BK], tl.float32)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        m_e = m_k[:, None] & (o_d < D)[None, :]
        b_e = tl.load(codes + (i_h * K + o_k)[:, None] * D + o_d[None, :], mask=m_e, other=0.0)  # [BK, BD]
        b_abs = tl.abs(b_e.to(tl.float32))
        b_size = tl.maximum(b_size, tl.max(tl.where(b_abs < float("inf"), b_abs, float("inf")), axis=1))
        if WIDE:
            b_bits = tl.where(b_e == 0.0, 0.0, b_e).to(tl.int64, bitcast=True)  # -0 equals 0
            b_bits = (b_bits ^ (b_bits >> 32)).to(tl.uint32)
        else:
            b_e = b_e.to(tl.float32)
            b_bits = tl.where(b_e == 0.0, 0.0, b_e).to(tl.uint32, bitcast=True)
        b_column = mixed((o_d + 1).to(tl.uint32)) | 1
        b_hash += tl.sum(mixed(b_bits) * b_column[None, :], axis=1)
    tl.store(hashes + i_h * K + o_k, b_hash, mask=m_k)
    tl.store(sizes + i_h * K + o_k, b_size, mask=m_k)
    # What many programs do to one slot queues, so of equal codes here only the first does.
    o_b = tl.arange(0, BK)
    earlier = (b_hash[:, None] == b_hash[None, :]) & (o_b[None, :] < o_b[:, None])  # [BK, BK]
    m_first = m_k & (tl.max(earlier.to(tl.int32), axis=1) == 0)
    for i in tl.static_range(TABLES):
        p_slot = table + i_h * (TABLES << LOG_SLOTS) + slot_of(b_hash, i, LOG_SLOTS)
        tl.atomic_max(p_slot, (K - o_k).to(tl.int32), mask=m_first, sem="relaxed")


@triton.jit
def repeats(
    codes, hashes, table, i_h, o_k, m_k, K,
    D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, LOG_SLOTS: tl.constexpr,
):  # fmt: skip
    """Whether a code that equals o_k [BK] has a lower index."""
    b_hash = tl.load(hashes + i_h * K + o_k, mask=m_k, other=0)
    b_repeats = tl.zeros([BK], tl.int32)
    for i in tl.static_range(TABLES):
        p_slot = table + i_h * (TABLES << LOG_SLOTS) + slot_of(b_hash, i, LOG_SLOTS)
        b_first = K - tl.load(p_slot, mask=m_k, other=0).to(tl.int64)
        m_first = m_k & (b_first < o_k)
        b_other = tl.load(hashes + i_h * K + b_first, mask=m_first, other=0)
        b_same = (m_first & (b_other == b_hash)).to(tl.int32)
        if tl.max(b_same, axis=0) > 0:
            for d in range(0, D, BD):
                o_d = d + tl.arange(0, BD)
                m_e = (b_same > 0)[:, None] & (o_d < D)[None, :]
                b_e = tl.load(codes + (i_h * K + o_k)[:, None] * D + o_d[None, :], mask=m_e, other=0.0)  # [BK, BD]
                b_f = tl.load(codes + (i_h * K + b_first)[:, None] * D + o_d[None, :], mask=m_e, other=0.0)
                b_same = tl.minimum(b_same, tl.min((b_e == b_f).to(tl.int32), axis=1))
        b_repeats = tl.maximum(b_repeats, b_same)
    return b_repeats > 0


def log_slots(n_codes: int) -> int:
    """Base-2 logarithm of the slots of one table."""
    return (SLOTS_PER_CODE * next_power_of_2(n_codes)).bit_length() - 1


def measure_rows(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hashes uint32 [H, K], largest absolute values fp32 [H, K] and tables of first codes of dense codes [H, K, D]."""
    H, K, D = codes.shape
    hashes = torch.empty(H, K, dtype=torch.uint32, device=codes.device)
    sizes = torch.empty(H, K, dtype=torch.float32, device=codes.device)
    table = torch.zeros(H, TABLES.value << log_slots(K), dtype=torch.int32, device=codes.device)
    measure_rows_kernel[(cdiv(K, 64), H)](
        codes, hashes, sizes, table, K,
        D=D, BK=64, BD=column_chunk(D), WIDE=codes.dtype == torch.float64, LOG_SLOTS=log_slots(K),
    )  # fmt: skip
    return hashes, sizes, table
