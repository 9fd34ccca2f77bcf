"""Sums of the tokens of each code without atomics, in an order that the tokens of that code alone decide.

A stable sort by code gives each code one stretch of tokens. A stretch is cut into runs of RUN tokens; the last takes
the rest. A run is added in four chains, token i to chain i mod 4, and its sum is (chain 0 + chain 1) +
(chain 2 + chain 3). One run is the sum of its code. Several runs are a stretch of rows one level up, added in the same
way. So a code that wins every token is spread over the machine, a value passes through at most RUN / 2 + 2 additions
per level, and the sum has the same bits whatever the other codes or the launch.

Row p of level l stands for the sorted position p RUN^l, which makes every place a formula: with first and count of a
code's tokens, its stretch at that level starts at row ceil(first / RUN^l) and has floor(count / RUN^l) rows, and the
run that starts at row s becomes row ceil(s / RUN) of the next level. Nothing has to be counted or searched.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import ORDERED
from ..launch import cdiv


@triton.jit
def load_rows(p_rows, p_order, b_row, m_r, o_d, D: tl.constexpr, TOKENS: tl.constexpr):
    """[BR, BD] float64 of one row per run; zero where the run has ended."""
    if TOKENS:
        b_row = tl.load(p_order + b_row, mask=m_r, other=0)
    p_x = p_rows + b_row[:, None] * D + o_d[None, :]
    return tl.load(p_x, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["N", "K", "log_unit"])
def sum_runs_kernel(
    p_rows,  # [., D] tokens, or the sums of the level below
    p_indices,  # [N] int64
    p_order,  # [N] int64: token at each sorted position
    p_starts,  # [K + 1] int64: first sorted position of each code
    p_sums,  # [K, D] float64
    p_above,  # [ceil(N / (RUN << log_unit)), D] float64
    N,
    K,
    log_unit,  # a row stands for the sorted position p << log_unit
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    LOG_RUN: tl.constexpr,
    TOKENS: tl.constexpr,  # the rows are tokens
):
    """One program adds BD dimensions of BR runs.

    The first cdiv(K, BR) programs take the codes whose stretch is a single run at this level and write their sums; at
    the level of the tokens that includes the codes without any. The others take the runs of longer stretches.
    """
    i_r = tl.program_id(0)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    RUN: tl.constexpr = 1 << LOG_RUN
    unit = tl.full([], 1, tl.int64) << log_unit
    n_code_programs = tl.cdiv(K, BR)
    if i_r < n_code_programs:
        b_k = i_r.to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
        m_r = b_k < K
        b_first = tl.load(p_starts + b_k, mask=m_r, other=0)
        b_tokens = tl.load(p_starts + b_k + 1, mask=m_r, other=0) - b_first
        b_row = (b_first + unit - 1) >> log_unit
        b_length = b_tokens >> log_unit
        m_r &= (b_length < RUN) & ((b_length > 0) | (log_unit == 0))
        p_out, b_out = p_sums, b_k
    else:
        b_j = (i_r - n_code_programs).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
        b_position = b_j << (log_unit + LOG_RUN)
        m_r = b_position < N
        b_k = tl.load(p_indices + tl.load(p_order + b_position, mask=m_r, other=0), mask=m_r, other=-1)
        m_r = (b_k >= 0) & (b_k < K)
        b_first = tl.load(p_starts + b_k, mask=m_r, other=0)
        b_rows = (tl.load(p_starts + b_k + 1, mask=m_r, other=0) - b_first) >> log_unit
        b_row = (b_first + unit - 1) >> log_unit
        b_run = b_j - ((b_row + RUN - 1) >> LOG_RUN)
        b_runs = b_rows >> LOG_RUN
        # The last run has up to 2 RUN - 1 rows; their second multiple of RUN names no run.
        m_r &= b_run < b_runs
        b_row += b_run << LOG_RUN
        b_length = tl.where(b_run == b_runs - 1, b_rows - (b_run << LOG_RUN), RUN)
        p_out, b_out = p_above, b_j
    b_length = tl.where(m_r, b_length, 0).to(tl.int32)
    b_0 = tl.zeros([BR, BD], tl.float64)
    b_1 = tl.zeros([BR, BD], tl.float64)
    b_2 = tl.zeros([BR, BD], tl.float64)
    b_3 = tl.zeros([BR, BD], tl.float64)
    for i in range(0, tl.max(b_length), 4):
        b_0 += load_rows(p_rows, p_order, b_row + i, i < b_length, o_d, D, TOKENS)
        b_1 += load_rows(p_rows, p_order, b_row + i + 1, i + 1 < b_length, o_d, D, TOKENS)
        b_2 += load_rows(p_rows, p_order, b_row + i + 2, i + 2 < b_length, o_d, D, TOKENS)
        b_3 += load_rows(p_rows, p_order, b_row + i + 3, i + 3 < b_length, o_d, D, TOKENS)
    b_sum = (b_0 + b_1) + (b_2 + b_3)  # [BR, BD]
    tl.store(p_out + b_out[:, None] * D + o_d[None, :], b_sum, mask=m_r[:, None] & (o_d < D)[None, :])


def sort_key(n_codes: int) -> torch.dtype:
    """The shortest integers that name the codes: a radix sort passes over its keys once per byte."""
    return torch.int16 if n_codes < 2**15 else torch.int32


def ordered_statistics(x: Tensor, indices: Tensor, n_codes: int) -> tuple[Tensor, Tensor]:
    """Counts ``[K]`` int64 and sums ``[K, D]`` float64 of dense ``x [N, D]`` by dense ``indices [N]`` in ``[0, K)``."""
    n_tokens, dim = x.shape
    key = sort_key(n_codes)
    # Other indices go to both ends, outside the stretches of the codes.
    codes, order = torch.sort(indices.clamp(-1, n_codes).to(key), stable=True)
    starts = torch.searchsorted(codes, torch.arange(n_codes + 1, dtype=key, device=x.device))
    sums = torch.empty(n_codes, dim, dtype=torch.float64, device=x.device)
    block_r, block_d = ORDERED.blocks(dim)
    log_unit, rows, n_above = 0, x, 0
    # Few tokens need no second level; it runs nevertheless, so that no later batch compiles it.
    while log_unit <= ORDERED.log_run or n_above:
        run = ORDERED.run << log_unit
        n_above = cdiv(n_tokens, run) if n_tokens >= run else 0
        above = torch.empty(n_above, dim, dtype=torch.float64, device=x.device)
        grid = (cdiv(n_codes, block_r) + cdiv(n_above, block_r), cdiv(dim, block_d))
        sum_runs_kernel[grid](
            rows, indices, order, starts, sums, above, n_tokens, n_codes, log_unit,
            D=dim, BR=block_r, BD=block_d, LOG_RUN=ORDERED.log_run, TOKENS=log_unit == 0, num_warps=ORDERED.num_warps,
        )  # fmt: skip
        log_unit, rows = log_unit + ORDERED.log_run, above
    return starts.diff(), sums
