"""The second scan: open tokens against all codes, two fp16 parts each; it names every code that may still win."""

# Tuples of tensors grow in loops that the compiler unrolls.
# mypy: disable-error-code="assignment, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import rescan_config
from ..launch import all_registers, cdiv, multiprocessors
from . import bounds
from .open_tokens import CANDIDATES, Open
from .pack_codes import PackedCodebook
from .pack_tokens import PackedTokens
from .scan import Bins


@triton.jit
def three_products(b_u, b_x, b_x2, b_e, b_e2, SPLIT: tl.constexpr):
    """b_u + x.e for one chunk of columns, the small products first: they truncate at their own magnitude."""
    if SPLIT:
        return tl.dot(b_x, b_e.T, input_precision="ieee")
    b_p = tl.dot(b_x, b_e2.T, input_precision="ieee")
    b_p = tl.dot(b_x2, b_e.T, b_p, input_precision="ieee")
    return b_u + tl.dot(b_x, b_e.T, b_p, input_precision="ieee")


@triton.jit
def rescan_tiles(
    rows, low, codes, codes_low, fine, best, rest, winner, open_tokens, factors, found, candidates,
    n_open, N, N_pad, K, KP, K_bias, S, steps_per_range, steps,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LANES: tl.constexpr,
    CANDIDATES: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program's share of the second scan of n_open tokens, in tiles of BM tokens by BN codes.

    Appends to candidates [H, N, CANDIDATES] every code whose upper bound reaches the token's threshold, and counts all
    of them in found, beyond the room as well. A range is not scanned where, for every token of the tile, only the best
    code of each bin can reach the threshold: these codes are named.
    """
    i_h = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(n_open, BM)
    share = tl.minimum(tl.maximum(tl.num_programs(0) // tl.maximum(tiles, 1), 1), steps)  # programs per tile
    # Of a range, `parts` programs scan a part each: short ones, since few ranges may need it.
    length = tl.cdiv(steps_per_range, share)
    parts = tl.cdiv(steps_per_range, length)
    groups = share // parts
    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    o_e = o_n[:, None] * D + o_d[None, :]
    for item in range(tl.program_id(0), tiles * share, tl.num_programs(0)):
        i_p = item % share
        o_i = (item // share) * BM + tl.arange(0, BM)
        m_i = o_i < n_open
        b_t = tl.load(open_tokens + i_h * N + o_i, mask=m_i, other=0)
        p_x = rows + (i_h * N_pad + b_t)[:, None] * D + o_d[None, :]
        p_x2 = low + (i_h * N + o_i)[:, None] * D + o_d[None, :]
        p_factor = factors + (i_h * N + o_i) * 3
        b_c = tl.load(p_factor, mask=m_i, other=1.0)
        b_w = tl.load(p_factor + 1, mask=m_i, other=0.0)
        b_threshold = tl.load(p_factor + 2, mask=m_i, other=float("inf"))  # nothing reaches it
        m_i = b_threshold < float("inf")
        # Below zero int32 order is not float order: then every range is scanned.
        b_reached = tl.where(b_threshold > 0.0, b_threshold, float("-inf"))[:, None]
        p_found = found + i_h * N + o_i
        p_candidate = candidates + (i_h * N + o_i) * CANDIDATES
        b_xs, b_x2s = (), ()
        if RESIDENT:
            for d in tl.static_range(0, D, BD):
                b_xs = b_xs + (tl.load(p_x + d, mask=m_i[:, None], other=0.0),)
                b_x2s = b_x2s + (b_xs[0] if SPLIT else tl.load(p_x2 + d, mask=m_i[:, None], other=0.0),)
        p_bin = ((i_h * N_pad + b_t) * S)[:, None] * LANES + tl.arange(0, LANES)[None, :]  # [BM, LANES]
        for i_s in range(tl.where(i_p < groups * parts, i_p // parts, S), S, groups):
            o_bin = p_bin + i_s * LANES
            b_rest = tl.load(rest + o_bin, mask=m_i[:, None], other=float("-inf"))
            scans = tl.max((m_i[:, None] & ~(b_rest < b_reached)).to(tl.int32)) > 0
            last = tl.minimum((i_s + 1) * steps_per_range, steps)
            first = tl.minimum(i_s * steps_per_range + i_p % parts * length, last)
            last = tl.where(scans, tl.minimum(first + length, last), first)
            if (i_p % parts == 0) & (~scans):
                b_k = tl.load(winner + o_bin, mask=m_i[:, None], other=0)
                b_best = tl.load(best + o_bin, mask=m_i[:, None], other=float("-inf"))
                b_named = m_i[:, None] & (b_k < K) & ~(b_best < b_reached)
                one = tl.full([BM, LANES], 1, tl.int32)
                b_slot = tl.atomic_add(p_found[:, None] + (one - 1), one, mask=b_named, sem="relaxed")
                tl.store(p_candidate[:, None] + b_slot, b_k, mask=b_named & (b_slot < CANDIDATES))
            p_e = codes + (i_h * KP + first * BN) * D
            p_e2 = codes_low + (i_h * KP + first * BN) * D
            p_bound = fine + (i_h * K_bias + first * BN + o_n) * 2
            for t in tl.range(first, last, num_stages=STAGES if RESIDENT else 1):
                b_u = tl.zeros([BM, BN], tl.float32)
                if RESIDENT:
                    for j in tl.static_range(D // BD):
                        b_e = tl.load(p_e + o_e + j * BD)  # [BN, BD]
                        b_e2 = b_e if SPLIT else tl.load(p_e2 + o_e + j * BD)
                        b_u = three_products(b_u, b_xs[j], b_x2s[j], b_e, b_e2, SPLIT)
                else:
                    for d in tl.range(0, D, BD, num_stages=STAGES):
                        b_x = tl.load(p_x + d, mask=m_i[:, None], other=0.0)  # [BM, BD]
                        b_x2 = tl.load(p_x2 + d, mask=m_i[:, None], other=0.0)
                        b_e, b_e2 = tl.load(p_e + o_e + d), tl.load(p_e2 + o_e + d)  # [BN, BD]
                        b_u = three_products(b_u, b_x, b_x2, b_e, b_e2, SPLIT)
                b_B, b_G = tl.load(p_bound), tl.load(p_bound + 1)
                b_u += b_c[:, None] * b_B[None, :] + b_w[:, None] * b_G[None, :] - b_threshold[:, None]
                # As one reduction: of the maxima of rows, the compiler for sm_100 fails. And not as the condition
                # of the loop below alone, which would keep this loop from being pipelined.
                if tl.max(b_u) >= 0.0:
                    # One code of each token at a time, from the last column down.
                    b_n = tl.full([BM], BN, tl.int32)
                    while tl.max(b_n, axis=0) > 0:
                        reaches = (b_u >= 0.0) & (o_n[None, :] < b_n[:, None])
                        b_n = tl.max(tl.where(reaches, o_n[None, :], -1), axis=1)
                        hit = b_n >= 0
                        b_slot = tl.atomic_add(p_found, 1, mask=hit, sem="relaxed")
                        has_room = hit & (b_slot < CANDIDATES)
                        tl.store(p_candidate + b_slot, t * BN + b_n, mask=has_room)
                        b_threshold = tl.where(hit & (~has_room), float("inf"), b_threshold)
                        b_n = tl.where(has_room, b_n, 0)
                p_e += BN * D
                p_e2 += BN * D
                p_bound += 2 * BN


@triton.jit(do_not_specialize=["N", "K", "S", "steps_per_range", "steps"])
def rescan_kernel(
    rows, low, codes, codes_low, fine, best, rest, winner, counts, open_tokens, factors, found, candidates,
    N, N_pad, K, KP, K_bias, S, steps_per_range, steps,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FEW_N: tl.constexpr, LANES: tl.constexpr,
    CANDIDATES: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program walks over its share of the codes for tiles of BM open tokens, with the stride of the grid.

    The number of open tokens is read here, on the device. Few tokens in tiles of BN codes would leave programs without
    work: they are scanned in tiles of FEW_N.
    """
    n_open = tl.load(counts + tl.program_id(1))
    if FEW_N < BN:
        few = tl.cdiv(n_open, BM) * steps < tl.num_programs(0)
        rescan_tiles(
            rows, low, codes, codes_low, fine, best, rest, winner, open_tokens, factors, found, candidates,
            tl.where(few, n_open, 0), N, N_pad, K, KP, K_bias, S,
            steps_per_range * (BN // FEW_N), steps * (BN // FEW_N),
            D, BD, BM, FEW_N, LANES, CANDIDATES, SPLIT, RESIDENT, STAGES,
        )  # fmt: skip
        n_open = tl.where(few, 0, n_open)
    rescan_tiles(
        rows, low, codes, codes_low, fine, best, rest, winner, open_tokens, factors, found, candidates,
        n_open, N, N_pad, K, KP, K_bias, S, steps_per_range, steps,
        D, BD, BM, BN, LANES, CANDIDATES, SPLIT, RESIDENT, STAGES,
    )  # fmt: skip


def rescan(packed: PackedCodebook, tokens: PackedTokens, bins: Bins, open_list: Open) -> Tensor:
    """Candidates [H, N, CANDIDATES] int32 of the open tokens; how many there are is added to open_list.found."""
    H, N_pad, DP = tokens.rows.shape
    config = rescan_config(DP)
    N = open_list.tokens.shape[1]
    KP = packed.half.shape[1]
    device = tokens.rows.device
    candidates = torch.empty(H, N, CANDIDATES, dtype=torch.int32, device=device)
    programs = config.programs * multiprocessors(device) if device.type == "cuda" else 2
    rescan_kernel[(cdiv(programs, H), H)](
        tokens.rows, open_list.low, packed.half, packed.low, packed.fine, bins.best, bins.rest, bins.winner,
        open_list.counts, open_list.tokens, open_list.factors, open_list.found, candidates,
        N, N_pad, packed.codes.shape[1], KP, packed.fine.shape[1],
        bins.ranges, bins.steps * packed.config.block_n // config.block_n, KP // config.block_n,
        D=DP, BD=min(DP, bounds.CHUNK), BM=config.block_m, BN=config.block_n, FEW_N=config.columns[-1],
        LANES=packed.config.lanes, CANDIDATES=CANDIDATES,
        SPLIT=packed.split, RESIDENT=DP <= config.resident, STAGES=config.num_stages,
        num_warps=config.num_warps, **all_registers(),
    )  # fmt: skip
    return candidates
