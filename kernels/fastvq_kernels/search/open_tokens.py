"""The open list: tokens without a proved winner after the refinement, as the second scan reads them."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bounds import ROUNDED
from .pack_tokens import PackedTokens, load_shifted

# Room for candidates per token; patches of photographs, the hardest data known, rarely have more.
CANDIDATES = 32


@triton.jit
def store_open(
    tokens, rows, shift, low, factors, found, i_h, o_t, o_list, m_open, b_scale, b_c, b_X, b_threshold,
    N, N_pad,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, CANDIDATES: tl.constexpr,
    SHIFT: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
    INFLATE: tl.constexpr, A: tl.constexpr, LAMBDA: tl.constexpr, TINY: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Write x2 of x' = x^ + x2 + rest, and c, w and the threshold, of tokens o_t [BT] in m_open to rows o_list."""
    b_res = tl.zeros([BT], tl.float32)
    p_x = tokens + (i_h * N + o_t)[:, None] * D
    p_half = rows + (i_h * N_pad + o_t)[:, None] * DP
    for d in range(0, D if SPLIT else DP, BD):
        o_d = d + tl.arange(0, BD)
        m_d = o_d < D
        m_x = m_open[:, None] & m_d[None, :]
        b_y = load_shifted(p_x, shift + i_h * D, o_d, m_open, m_d, WIDE, SHIFT)
        b_y = (b_y * b_scale[:, None]).to(tl.float32)  # [BT, BD]
        b_r = b_y - tl.load(p_half + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
        if SPLIT:
            b_low = tl.load(p_half + D + o_d[None, :], mask=m_x, other=0.0)
        else:
            b_low = b_r.to(tl.float16)
            tl.store(low + (i_h * N + o_list)[:, None] * DP + o_d[None, :], b_low, mask=m_open[:, None])
        b_r -= b_low.to(tl.float32)
        b_res += tl.sum(b_r * b_r, axis=1)
    b_rho = tl.sqrt(b_res) * INFLATE + b_X * ROUNDED + TINY
    b_w = tl.maximum(b_rho + A * b_X, (1.0 + A) * b_X / LAMBDA) * (1.0 + A) * UP
    # A token without a threshold has every code as a candidate, more than there is room for.
    known = b_threshold > float("-inf")
    p_factor = factors + (i_h * N + o_list) * 3
    tl.store(p_factor, b_c, mask=m_open)
    tl.store(p_factor + 1, tl.where(known, b_w, 0.0), mask=m_open)
    tl.store(p_factor + 2, tl.where(known, b_threshold, float("inf")), mask=m_open)
    tl.store(found + i_h * N + o_list, tl.where(known, 0, CANDIDATES + 1), mask=m_open)


@dataclass(frozen=True)
class Open:
    """Tokens still open, as a list for each head; rows beyond the count are unwritten.

    counts   [2, H]      int32: how many of each head, and how many `decide` leaves
    tokens   [H, N]      int64: number of the token in its head
    low      [H, N, DP]  fp16: x2; empty where the packed rows hold the split
    factors  [H, N, 3]   fp32: c, w, and the threshold of the second scan (inf: names no code)
    found    [H, N]      int32: number of candidates of the second scan
    """

    counts: Tensor
    tokens: Tensor
    low: Tensor
    factors: Tensor
    found: Tensor

    @property
    def count(self) -> Tensor:
        """[H] int32."""
        return self.counts[0]


def no_open(n: int, tokens: PackedTokens, split: bool) -> Open:
    """An empty list with room for all of the n tokens of each head."""
    H, _, DP = tokens.rows.shape
    device = tokens.rows.device

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return Open(
        counts=torch.zeros(2, H, dtype=torch.int32, device=device),
        tokens=empty(H, n, dtype=torch.int64),
        low=empty(H, 0 if split else n, DP, dtype=torch.float16),
        factors=empty(H, n, 3, dtype=torch.float32),
        found=empty(H, n, dtype=torch.int32),
    )
