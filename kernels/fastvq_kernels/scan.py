"""The scan: fp16 tensor-core upper bounds of all codes, of which only the best groups per token are kept."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import TOKEN_TILE
from .pack import PackedCodebook
from .tokens import ratio


@triton.jit
def scan_kernel(
    tokens, codes, bias, tile_scale, tile_weight, code_scale, values, groups,
    N_pad, KP, H, steps_per_split,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr,
    TILE: tl.constexpr, INT_MAX: tl.constexpr, TMA: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program scans one range of codes for BM tokens of one head.

    Writes per token the upper bounds of the best group, of the best group of any other slot and of everything else
    (values [S, H, 3, N_pad]) and the first two groups' ids (groups [S, H, 2, N_pad]). A slot is what one thread sees of
    a token: one of LANES column pairs, one block of 2 LANES PAIRS columns. It keeps its best group with the
    step, and the value alone of its second: the two best groups of a token share a slot only once in BN / (2 PAIRS)
    times, and then the bound says so. Never writes anything of size tokens x codes, and masks nothing: padding has a
    bias of -inf.
    """
    NB: tl.constexpr = BN // (2 * LANES * PAIRS)
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
    b_xs = ()
    if RESIDENT:
        for d in tl.static_range(0, D, BD):
            b_xs = b_xs + (tokens.load([row, d]) if TMA else tl.load(p_x + o_x + d),)  # type: ignore[assignment]  # D / BD times [BM, BD]

    KIND: tl.constexpr = tl.int32 if INT_MAX else tl.float32
    b_v1 = tl.full([BM, NB, LANES], float("-inf"), tl.float32).to(KIND, bitcast=True)
    b_v2 = b_v1
    b_t1 = tl.zeros([BM, NB, LANES], tl.int32)
    first = (i_s * steps_per_split).to(tl.int32)
    last = tl.minimum(first + steps_per_split, KP // BN)
    col = (i_h * KP).to(tl.int32)
    p_e = codes if TMA else codes + (i_h * KP + first * BN) * D
    for t in tl.range(first, last, num_stages=STAGES if RESIDENT else 1):
        o_n = i_h * KP + t * BN + tl.arange(0, BN)
        # As a reduction: one product per code and program, shared through shared memory. As c B + w G the
        # compiler would repeat both products in every thread that owns the column (0.6 slots per pair).
        b_bias = tl.sum(tl.load(bias + o_n[:, None] * 2 + o_two[None, :]) * b_two[None, :], axis=1)  # [BN]
        b_u = tl.zeros([BM, BN], tl.float32)
        if BD < D:  # one product: added after it, which the compiler turns into the accumulator's start
            b_u += b_bias[None, :]
        if RESIDENT:
            for i in tl.static_range(D // BD):
                b_e = codes.load([col + t * BN, i * BD]) if TMA else tl.load(p_e + o_e + i * BD)  # [BN, BD]
                b_u = tl.dot(b_xs[i], b_e.T, b_u, input_precision="ieee")
        else:
            for d in tl.range(0, D, BD, num_stages=STAGES):
                b_x = tokens.load([row, d]) if TMA else tl.load(p_x + o_x + d)  # [BM, BD]
                b_e = codes.load([col + t * BN, d]) if TMA else tl.load(p_e + o_e + d)  # [BN, BD]
                b_u = tl.dot(b_x, b_e.T, b_u, input_precision="ieee")
        if BD == D:
            b_u += b_bias[None, :]
        if not TMA:
            p_e += BN * D
        b_u = b_u.to(KIND, bitcast=True)
        # [BM, NB, LANES, 2 PAIRS]: the reduced axis as one chain, which the assembler folds into three-input maxima.
        b_u = tl.permute(tl.reshape(b_u, [BM, NB, PAIRS, LANES, 2]), [0, 1, 3, 2, 4])
        b_u = tl.reshape(b_u, [BM, NB, LANES, 2 * PAIRS])
        b_g = tl.max(b_u, axis=3)  # [BM, NB, LANES]
        b_v2 = tl.maximum(b_v2, tl.minimum(b_v1, b_g))
        b_t1 = tl.where(b_g > b_v1, t, b_t1)
        b_v1 = tl.maximum(b_v1, b_g)

    SLOTS: tl.constexpr = NB * LANES
    o_slot = tl.arange(0, SLOTS)[None, :]
    b_v1 = tl.reshape(b_v1, [BM, SLOTS])
    b_second = tl.max(tl.reshape(b_v2, [BM, SLOTS]), axis=1)  # [BM]
    b_t1 = tl.reshape(b_t1, [BM, SLOTS])
    o_out = i_m * BM + tl.arange(0, BM)
    p_values = values + (i_s * H + i_h) * 3 * N_pad + o_out
    p_groups = groups + (i_s * H + i_h) * 2 * N_pad + o_out
    nothing = tl.full([BM, SLOTS], float("-inf"), tl.float32).to(KIND, bitcast=True)
    for rank in tl.static_range(2):
        b_top = tl.max(b_v1, axis=1)
        b_slot = tl.max(tl.where(b_v1 == b_top[:, None], o_slot, 0), axis=1)  # [BM]
        b_hit = o_slot == b_slot[:, None]
        b_step = tl.sum(tl.where(b_hit, b_t1, 0), axis=1)
        tl.store(p_values + rank * N_pad, b_top.to(tl.float32, bitcast=True))
        tl.store(p_groups + rank * N_pad, b_step * SLOTS + b_slot)
        b_v1 = tl.where(b_hit, nothing, b_v1)
    b_rest = tl.maximum(b_second, tl.max(b_v1, axis=1))
    tl.store(p_values + 2 * N_pad, b_rest.to(tl.float32, bitcast=True))


def splits(programs: int, steps: int, device: torch.device) -> int:
    """Ranges of codes per token tile: enough programs to fill the device twice, at least 4 steps each."""
    if device.type != "cuda":
        return min(2, steps)  # the interpreter takes the same path
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(steps // 4, 2 * units // programs))


def scan(
    packed: PackedCodebook, half: Tensor, tile_scale: Tensor, tile_weight: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """Values [S, H, 3, N_pad] fp32 and groups [S, H, 2, N_pad] int32 for the first n tokens of half [H, N_pad, DP].

    What lies beyond the tiles of these tokens stays unwritten.
    """
    config = packed.config
    H, N_pad, DP = half.shape
    KP = packed.half.shape[1]
    BD = config.block_d
    BM, BN = config.block_m, config.block_n
    steps = KP // BN
    tiles = triton.cdiv(n, BM)
    S = splits(H * tiles, steps, half.device)
    per_split = triton.cdiv(steps, S)
    S = triton.cdiv(steps, per_split)
    values = torch.empty(S, H, 3, N_pad, dtype=torch.float32, device=half.device)
    groups = torch.empty(S, H, 2, N_pad, dtype=torch.int32, device=half.device)
    tokens, codes = half.view(H * N_pad, DP), packed.half.view(H * KP, DP)
    if config.tma:
        tokens, codes = TensorDescriptor.from_tensor(tokens, [BM, BD]), TensorDescriptor.from_tensor(codes, [BN, BD])
    scan_kernel[(tiles, S, H)](
        tokens, codes, packed.bias, tile_scale, tile_weight, packed.scale, values, groups,
        N_pad, KP, H, per_split,
        D=DP, BD=BD, BM=BM, BN=BN, PAIRS=config.pairs, LANES=config.lanes, TILE=TOKEN_TILE,
        INT_MAX=config.int_max, TMA=config.tma, RESIDENT=config.resident,
        STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    return values, groups
