"""The scan: fp16 tensor-core upper bounds of all codes, of which only the best code of each bin is kept."""

# Tuples of tensors grow in loops that the compiler unrolls.
# mypy: disable-error-code="assignment, misc"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..configs import CODE_TILE, TOKEN_TILE
from ..launch import cdiv, is_interpreted, multiprocessors
from .pack_codes import PackedCodebook
from .pack_tokens import PackedTokens
from .powers import ratio
from .scan_maxima import keep


@triton.jit
def code_at(step, member, lane, BN: tl.constexpr, LANES: tl.constexpr):
    """The code that thread `lane` meets in `step` as `member` (eight times the row, plus the place) of its columns."""
    place = member % 8
    return step * BN + (member // 8) * (8 * LANES) + (place // 2) * (2 * LANES) + 2 * lane + place % 2


@triton.jit(do_not_specialize=["steps_per_split"])
def scan_kernel(
    tokens, codes, bias, tile_scale, tile_weight, code_scale, best, rest, winner,
    N_pad, KP, steps_per_split,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
    INT_MAX: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr, RESIDENT: tl.constexpr, BIAS_FIRST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program scans one range of codes for BM tokens of one head.

    A bin is the set of codes that one thread sees of a token in one range: ROWS rows of eight codes in every step.
    Writes for each bin the largest upper bound of a score, its code, and the largest bound of all other codes in
    the bin (best, winner and rest [H, N_pad, S, LANES]). Never writes anything of size tokens x codes, and masks
    nothing: padding has a bias of -inf.

    The code is found without an index per pair. Maxima are kept over three partitions of the bin: by step, by row
    and by place in a row. The largest value names one class of each, and the three meet in one code; every other
    code lies outside one of them, so the largest maximum among the other classes is that of all other codes.
    """
    ROWS: tl.constexpr = BN // (8 * LANES)
    i_m, i_s, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (i_h * N_pad + i_m * BM).to(tl.int32)
    i_tile = (i_h * N_pad + i_m * BM) // TILE
    o_two = tl.arange(0, 2)
    b_c = ratio(tl.load(tile_scale + i_tile), tl.load(code_scale + i_h))
    b_two = tl.where(o_two == 0, b_c, tl.load(tile_weight + i_tile))  # [2]
    o_d = tl.arange(0, BD)
    o_x = tl.arange(0, BM)[:, None] * D + o_d[None, :]
    o_e = tl.arange(0, BN)[:, None] * D + o_d[None, :]
    p_x = tokens if TMA else tokens + (i_h * N_pad + i_m * BM) * D

    KIND: tl.constexpr = tl.int32 if INT_MAX else tl.float32
    b_step1 = tl.full([BM, LANES], float("-inf"), tl.float32).to(KIND, bitcast=True)  # best step and its number
    b_step2 = b_step1  # second-best step
    b_t = tl.zeros([BM, LANES], tl.int32)
    b_rows = ()
    for _ in tl.static_range(ROWS):
        b_rows = b_rows + (b_step1,)
    b_place = tl.full([BM, LANES, 8], float("-inf"), tl.float32).to(KIND, bitcast=True)
    first = (i_s * steps_per_split).to(tl.int32)
    last = tl.minimum(first + steps_per_split, KP // BN)
    col = (i_h * KP).to(tl.int32)
    p_e = codes if TMA else codes + (i_h * KP + first * BN) * D
    p_bias = bias + (i_h * (KP + BN) + first * BN + tl.arange(0, BN)[:, None]) * 2 + o_two[None, :]
    # As a reduction: one product per code and program, shared through shared memory. As c B + w G the compiler would
    # repeat both products in every thread that owns the column (0.6 slots per pair).
    if RESIDENT:
        b_xs = ()
        for d in tl.static_range(0, D, BD):
            b_xs = b_xs + (tokens.load([row, d]) if TMA else tl.load(p_x + o_x + d),)  # D / BD times [BM, BD]
        b_next = tl.load(p_bias)  # [BN, 2], one step ahead in registers: through shared memory costs 0.06 slots
        for t in tl.range(first, last, num_stages=STAGES):
            b_bias = tl.sum(b_next * b_two[None, :], axis=1)  # [BN]
            p_bias += 2 * BN
            b_next = tl.load(p_bias)
            b_u = tl.zeros([BM, BN], tl.float32)
            if BD < D:  # one product: added after it, which the compiler turns into the accumulator's start
                b_u += b_bias[None, :]
            for i in tl.static_range(D // BD):
                b_e = codes.load([col + t * BN, i * BD]) if TMA else tl.load(p_e + o_e + i * BD)  # [BN, BD]
                b_u = tl.dot(b_xs[i], b_e.T, b_u, input_precision="ieee")
            if BD == D:
                b_u += b_bias[None, :]
            if not TMA:
                p_e += BN * D
            b_step1, b_step2, b_t, b_rows, b_place = keep(
                b_u, t, b_step1, b_step2, b_t, b_rows, b_place, BM, LANES, ROWS, ASM
            )
    else:
        # One loop over the chunks of all steps: the first chunks of a step are on their way while the maxima of the
        # one before are taken. With a loop inside of another each step would wait for them.
        b_u = tl.zeros([BM, BN], tl.float32)
        if BIAS_FIRST:
            b_u += tl.sum(tl.load(p_bias) * b_two[None, :], axis=1)[None, :]
            p_bias += 2 * BN
        t = first
        d = 0
        for _ in tl.range(0, (last - first) * (D // BD), num_stages=STAGES):
            b_x = tokens.load([row, d]) if TMA else tl.load(p_x + o_x + d)  # [BM, BD]
            b_e = codes.load([col + t * BN, d]) if TMA else tl.load(p_e + o_e + d)  # [BN, BD]
            b_u = tl.dot(b_x, b_e.T, b_u, input_precision="ieee")
            d += BD
            if d == D:
                b_bias = tl.sum(tl.load(p_bias) * b_two[None, :], axis=1)  # [BN], of the next step where it comes first
                p_bias += 2 * BN
                if not BIAS_FIRST:
                    b_u += b_bias[None, :]
                b_step1, b_step2, b_t, b_rows, b_place = keep(
                    b_u, t, b_step1, b_step2, b_t, b_rows, b_place, BM, LANES, ROWS, ASM
                )
                b_u = tl.zeros([BM, BN], tl.float32)
                if BIAS_FIRST:
                    b_u += b_bias[None, :]
                t += 1
                d = 0
                if not TMA:
                    p_e += BN * D

    nothing = tl.full([], float("-inf"), tl.float32).to(KIND, bitcast=True)
    o_place = tl.arange(0, 8)[None, None, :]
    b_p = tl.max(tl.where(b_place == b_step1[:, :, None], o_place, 0), axis=2)  # [BM, LANES]
    b_rest = tl.max(tl.where(o_place == b_p[:, :, None], nothing, b_place), axis=2)
    b_rest = tl.maximum(b_rest, b_step2)
    b_n = tl.zeros([BM, LANES], tl.int32)
    b_top = b_rows[0]
    for i in tl.static_range(1, ROWS):
        b_rest = tl.maximum(b_rest, tl.minimum(b_top, b_rows[i]))
        b_n = tl.where(b_rows[i] > b_top, i, b_n)
        b_top = tl.maximum(b_top, b_rows[i])
    o_lane = tl.arange(0, LANES)[None, :]
    b_code = code_at(b_t, 8 * b_n + b_p, o_lane, BN, LANES)
    bins = tl.num_programs(1).to(tl.int64) * LANES
    o_out = (i_h * N_pad + i_m * BM + tl.arange(0, BM)[:, None]) * bins + i_s * LANES + o_lane
    tl.store(best + o_out, b_step1.to(tl.float32, bitcast=True))
    tl.store(rest + o_out, b_rest.to(tl.float32, bitcast=True))
    tl.store(winner + o_out, b_code)


@dataclass(frozen=True)
class Bins:
    """The result of the scan: S `ranges` of `steps` tiles of codes, each in LANES bins per token.

    best, rest  [H, N_pad, S, LANES]  fp32: largest upper bound S_k + c M of a bin, and the largest but that one
    winner      [H, N_pad, S, LANES]  int32: the code of the largest
    """

    best: Tensor
    rest: Tensor
    winner: Tensor
    steps: int

    @property
    def ranges(self) -> int:
        """S."""
        return self.best.shape[2]

    @property
    def per_token(self) -> int:
        """S LANES."""
        return self.best.shape[2] * self.best.shape[3]


def splits(programs: int, steps: int, lanes: int, device: torch.device) -> int:
    """Ranges of codes per token tile.

    Enough programs to fill the device, and with at least 4 steps each to fill it twice. At least 16 bins of 16 steps:
    where the two best codes of a token share a bin, the second is unknown.
    """
    if device.type != "cuda":
        return min(2, steps)  # the interpreter takes the same path
    units = multiprocessors(device)
    once, twice = min(steps, units // programs), min(steps // 4, 2 * units // programs)
    return max(1, once, twice, min(steps // 16, 16 // lanes))


def scan(tokens: PackedTokens, n: int, packed: PackedCodebook) -> Bins:
    """Bins of the first n tokens of each head; the rest stays unwritten."""
    config = packed.config
    H, N_pad, DP = tokens.rows.shape
    KP = packed.half.shape[1]
    BD = config.block_d
    BM, BN = config.block_m, config.block_n
    steps = KP // BN
    tiles = cdiv(n, BM)
    per_split = cdiv(steps, splits(H * tiles, steps, config.lanes, tokens.rows.device))
    whole = max(1, CODE_TILE // BN)  # the second scan walks over the ranges in larger steps
    per_split = cdiv(per_split, whole) * whole
    S = cdiv(steps, per_split)
    best = torch.empty(H, N_pad, S, config.lanes, dtype=torch.float32, device=tokens.rows.device)
    rest, winner = torch.empty_like(best), torch.empty_like(best, dtype=torch.int32)
    rows, codes = tokens.rows.view(H * N_pad, DP), packed.half.view(H * KP, DP)
    if config.tma:
        rows, codes = TensorDescriptor.from_tensor(rows, [BM, BD]), TensorDescriptor.from_tensor(codes, [BN, BD])
    scan_kernel[(tiles, S, H)](
        rows, codes, packed.bias, tokens.scale, tokens.weight, packed.scale, best, rest, winner,
        N_pad, KP, per_split,
        D=DP, BD=BD, BM=BM, BN=BN, LANES=config.lanes, TILE=TOKEN_TILE,
        INT_MAX=config.int_max, ASM=config.int_max and not is_interpreted(), TMA=config.tma,
        RESIDENT=config.resident, BIAS_FIRST=config.bias_first, STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    return Bins(best, rest, winner, per_split)
