"""The winner among at most 32 candidates of the second scan, in float64."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import all_registers, cdiv, multiprocessors
from .exact import NO_CODE, exact_value
from .open_tokens import CANDIDATES, Open
from .pack_codes import PackedCodebook

TOKENS = 4  # per program and step: one pair for each thread


@triton.jit(do_not_specialize=["N", "K", "width"])
def decide_kernel(
    tokens, codes, norms, counts, open_tokens, found, candidates, indices, crowded,
    N, K, width,
    BT: tl.constexpr, CANDIDATES: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    """Each program walks over blocks of BT open tokens of one head, with the stride of the grid.

    Writes the lowest index of the best candidate in float64, or appends a token with more candidates than there is room
    for to the list for the third scan.
    """
    i_h = tl.program_id(1).to(tl.int64)
    n_open = tl.load(counts + i_h)
    o_c = tl.arange(0, CANDIDATES)[None, :]
    for i in range(tl.program_id(0) * BT, n_open, tl.num_programs(0) * BT):
        o_i = i_h * N + i + tl.arange(0, BT)
        m_i = i + tl.arange(0, BT) < n_open
        b_t = i_h * N + tl.load(open_tokens + o_i, mask=m_i, other=0)  # [BT]
        b_found = tl.load(found + o_i, mask=m_i, other=0)
        few = m_i & (b_found > 0) & (b_found <= CANDIDATES)
        m_c = few[:, None] & (o_c < b_found[:, None])  # [BT, CANDIDATES]
        b_k = tl.load(candidates + o_i[:, None] * CANDIDATES + o_c, mask=m_c, other=0).to(tl.int64)
        b_row = i_h * K + b_k
        b_value = exact_value(tokens + b_t[:, None] * width, codes + b_row * width, norms + b_row, m_c, width, METRIC)
        b_value = tl.where(m_c, b_value, float("inf"))
        b_low = tl.min(b_value, axis=1)
        b_best = tl.min(tl.where(m_c & (b_value == b_low[:, None]), b_k, NO_CODE), axis=1)
        tl.store(indices + b_t, b_best, mask=few)
        b_crowded = (m_i & (~few)).to(tl.int32)
        n_crowded = tl.sum(b_crowded, axis=0)
        if n_crowded > 0:
            o_list = tl.atomic_add(counts + tl.num_programs(1) + i_h, n_crowded, sem="relaxed")
            o_list += tl.cumsum(b_crowded, axis=0) - 1
            tl.store(crowded + i_h * N + o_list, b_t - i_h * N, mask=b_crowded > 0)


@dataclass(frozen=True)
class Crowded:
    """Tokens with too many candidates, as a list for each head: numbers in the head [H, N] int64, counts [H] int32."""

    tokens: Tensor
    count: Tensor


def decide(x: Tensor, packed: PackedCodebook, open_list: Open, candidates: Tensor, indices: Tensor) -> Crowded:
    """Complete indices [H, N] in place for the open tokens with few candidates, and list the others."""
    H, N, D = x.shape
    crowded = torch.empty(H, N, dtype=torch.int64, device=x.device)
    decide_kernel[(min(cdiv(8 * multiprocessors(x.device), H), cdiv(N, TOKENS)), H)](
        x, packed.codes, packed.norms, open_list.counts, open_list.tokens, open_list.found, candidates,
        indices, crowded,
        N, packed.codes.shape[1], D,
        BT=TOKENS, CANDIDATES=CANDIDATES, METRIC=packed.metric, enable_fp_fusion=False,
        **all_registers(),
    )  # fmt: skip
    return Crowded(crowded, open_list.counts[1])
