"""The shipped kernels with the arguments of a real launch, for offline compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.static.offline import Compiled, compile_offline
from bench.static.plain_kernels import max_with_index
from fastvq_kernels.configs import (
    ACCUMULATE,
    ALL_REGISTERS,
    EMA,
    ORDERED,
    SPLIT_D,
    TOKEN_TILE,
    RescanConfig,
    ScanConfig,
    column_chunk,
    packed_width,
    rescan_config,
    scan_config,
)
from fastvq_kernels.search import bounds, decide, frame, norms, refine
from fastvq_kernels.search import exhaustive as settle
from fastvq_kernels.search import pack_codes as pack
from fastvq_kernels.search import pack_tokens as tokens
from fastvq_kernels.search.open_tokens import CANDIDATES
from fastvq_kernels.search.rescan import rescan_kernel
from fastvq_kernels.search.scan import scan_kernel
from fastvq_kernels.update import accumulate, ema, ordered

# Every argument that is not a float32 pointer.
_TYPES = {
    **dict.fromkeys(("N", "N_pad", "K", "KP", "K_bias", "S", "n_bins", "D", "width", "parts"), "i32"),
    **dict.fromkeys(("steps", "all_steps", "steps_per_split", "steps_per_range"), "i32"),
    "log_unit": "i32",
    **dict.fromkeys(("indices", "open_tokens", "hard_tokens", "winners", "p_indices", "p_order", "p_starts"), "*i64"),
    **dict.fromkeys(("winner", "winners_of_bins", "candidates", "found"), "*i32"),
    **dict.fromkeys(("counts", "p_counts"), "*i32"),
    **dict.fromkeys(("norms", "out"), "*fp64"),
    **dict.fromkeys(("decay", "gain", "smoothing", "all_smoothing", "threshold", "threshold_per_token"), "fp32"),
    **dict.fromkeys(("half", "rows", "low", "codes_low"), "*fp16"),
    "p_found": "*i1",
}
# Padded sizes are multiples of 16 for the dimensions compiled here.
_DIVISIBLE = {"N_pad", "KP", "K_bias"}
PLAIN_TILE = 128


def scan(target: str, width: int) -> tuple[Compiled, ScanConfig]:
    """The scan for packed rows of ``width`` columns."""
    config = scan_config(width, target)
    types = {"tokens": "*fp16", "codes": "*fp16"}
    if config.tma:
        types = {
            "tokens": f"tensordesc<fp16[{config.block_m},{config.block_d}]>",
            "codes": f"tensordesc<fp16[{config.block_n},{config.block_d}]>",
        }
    constexprs = {
        "D": width,
        "BD": config.block_d,
        "BM": config.block_m,
        "BN": config.block_n,
        "LANES": config.lanes,
        "TILE": TOKEN_TILE,
        "INT_MAX": config.int_max,
        "ASM": config.int_max,
        "TMA": config.tma,
        "RESIDENT": config.resident,
        "BIAS_FIRST": config.bias_first,
        "STAGES": config.num_stages,
    }
    return _compile(scan_kernel, target, constexprs, config.num_warps, types=types), config


def plain(target: str) -> Compiled:
    """A search that keeps the maximum with its index for every pair: what the scan is compared with."""
    return _compile(
        max_with_index,
        target,
        {"D": 64, "BN": PLAIN_TILE, "BK": PLAIN_TILE, "LOWEST": True},
        # Four warps spill on sm_100.
        8 if target == "sm_100" else 4,
        types={"x": "*fp16", "codebook": "*fp16", "out": "*i32"},
        divisible={"N", "K"},
    )


def rescan(target: str, dim: int) -> tuple[Compiled, RescanConfig]:
    """The second scan for tokens of ``dim`` columns."""
    width = packed_width(dim)
    config = rescan_config(width, target)
    constexprs = {
        "D": width,
        "BD": min(width, bounds.CHUNK),
        "BM": config.block_m,
        "BN": config.block_n,
        "FEW_N": config.columns[-1],
        "LANES": scan_config(width, target).lanes,
        "CANDIDATES": CANDIDATES,
        "SPLIT": dim <= SPLIT_D,
        "RESIDENT": width <= config.resident,
        "STAGES": config.num_stages,
    }
    options = {} if target == "gfx942" else ALL_REGISTERS
    compiled = _compile(rescan_kernel, target, constexprs, config.num_warps, types={"codes": "*fp16"}, options=options)
    return compiled, config


def search_kernels(
    target: str, dims: tuple[int, ...] = (8, 64, 256, 1024), metric: str = "euclidean"
) -> Iterator[tuple[int, Compiled]]:
    """The search but for the two scans, for tokens and codes in float32."""
    unit, euclidean = metric == "cosine", metric == "euclidean"
    unit_error = bounds.UNIT if unit else 0.0
    unfused = {"enable_fp_fusion": False}
    for dim in dims:
        split = dim <= SPLIT_D
        width = packed_width(dim)
        config = scan_config(width, target)
        chunk = {"D": dim, "BD": column_chunk(dim)}
        packing = {"D": dim, "DP": width, "BD": min(width, 32), "SPLIT": split, "WIDE": False}
        measured = {"INFLATE": bounds.norm_inflation(dim), "TINY": bounds.TINY, "UP": bounds.UP}
        float32 = {"WIDE_X": False, "WIDE_E": False, "CERTIFIED": dim <= bounds.MAX_CERTIFIED_D}
        errors = {
            "E": bounds.refinement(dim, 32) * bounds.UP,
            "UNIT_ERROR": unit_error,
            "ORACLE": 2 * bounds.ORACLE,
            "UP": bounds.UP,
        }
        given = {"D": dim, "WIDE": False, "UNIT": unit, "EUCLIDEAN": euclidean}
        columns = {"BK": 64, "BD": column_chunk(dim, 64), **given}
        yield dim, _compile(frame.measure_columns_kernel, target, columns, 4)
        parts = {"D": dim, "ROOT_D": dim**0.5 * bounds.UP, "PARTS": frame.MOST_PARTS, "BD": 32, "UP": bounds.UP}
        yield dim, _compile(frame.frame_kernel, target, parts, 4)
        balances = {"LAMBDA": bounds.balance(split), "LAMBDA_FINE": bounds.balance(True)}
        slacks = {"ORACLE": bounds.ORACLE * bounds.UP, "UNIT_ERROR": unit_error, "LONGEST": bounds.LONGEST, **balances}
        bias_errors = bounds.bias_error(dim, width), bounds.fine_bias_error(dim, width, split)
        slacks |= dict(zip(("ERROR", "FINE_ERROR"), bias_errors if euclidean else (0.0, 0.0), strict=True))
        slacks["REFINEMENT"] = bounds.refinement(dim, 32)
        codes = {"BK": 64, "UNIT": unit, "EUCLIDEAN": euclidean, **slacks}
        yield dim, _compile(pack.pack_codes_kernel, target, {**codes, **packing, **measured}, 4)
        scale = {"A": bounds.accumulation(width), "LAMBDA": bounds.balance(split)}
        rows = {"BT": TOKEN_TILE, "SHIFT": euclidean, **packing, **measured, **scale}
        yield dim, _compile(tokens.pack_tokens_kernel, target, rows, 8)
        layout = {"LANES": config.lanes, "TILE": TOKEN_TILE}
        slack = {"SLACK": (2.0 + bounds.accumulation(width)) * bounds.UP}
        slack["BIAS_ERROR"] = 4.0 * bounds.bias_error(dim, width) * bounds.UP
        two = {"BT": refine.TOKENS, "BINS": refine.BINS, "TILE": TOKEN_TILE, "SHIFT": euclidean, "UNIT": unit, **slack}
        fine = {"A_FINE": bounds.fine_accumulation(width), "LAMBDA_FINE": bounds.balance(True)}
        left = {"DP": width, "CANDIDATES": CANDIDATES, "SPLIT": split, **fine, **measured}
        refined = {**chunk, **two, **left, **float32, **errors}
        registers = {} if target == "gfx942" else ALL_REGISTERS
        yield dim, _compile(refine.refine_kernel, target, refined, 4, options=registers)
        options = unfused | registers
        few = {"BT": decide.TOKENS, "CANDIDATES": CANDIDATES, "METRIC": metric}
        yield dim, _compile(decide.decide_kernel, target, few, 4, options=options)
        shares = {"LEAD": settle.LEAD, "SHARES": settle.SHARES, "METRIC": metric, "BN": config.block_n}
        constexprs = {"BK": settle.BLOCK_K, **chunk, **shares, **layout, **float32, **errors}
        yield dim, _compile(settle.settle_kernel, target, constexprs, 4, types={"values": "*fp64"}, options=options)
    shares = {"LEAD": settle.LEAD, "SHARES": settle.SHARES}
    yield 0, _compile(settle.merge_kernel, target, shares, 1, types={"values": "*fp64"})
    yield (
        0,
        _compile(
            norms.code_norms_kernel, target, {"BK": 128, "LONGEST": 2.0**126}, 4, options={"enable_fp_fusion": False}
        ),
    )


def training_kernels(target: str, dims: tuple[int, ...] = (3, 64)) -> Iterator[tuple[int, Compiled]]:
    """Statistics and update of the codebook, for tokens in float32: loads of one column, and of four."""
    for dim in dims:
        block_n, block_d = ACCUMULATE.blocks(dim)
        scatter = {"D": dim, "BN": block_n, "BD": block_d}
        yield dim, _compile(accumulate.accumulate_kernel, target, scatter, ACCUMULATE.num_warps)
        block_r, block_d = ORDERED.blocks(dim)
        runs = {"D": dim, "BR": block_r, "BD": block_d, "LOG_RUN": ORDERED.log_run}
        for of_tokens in (True, False):
            yield dim, _compile(ordered.sum_runs_kernel, target, {**runs, "TOKENS": of_tokens}, ORDERED.num_warps)
        block_k, block_d = EMA.blocks(dim)
        average = {"D": dim, "BK": block_k, "BD": block_d, "RESETS": True}
        unfused = {"enable_fp_fusion": False}
        yield dim, _compile(ema.ema_kernel, target, average, EMA.num_warps, options=unfused)


def _compile(
    kernel: Any,
    target: str,
    constexprs: dict[str, Any],
    num_warps: int,
    *,
    types: dict[str, str] | None = None,
    divisible: set[str] = _DIVISIBLE,
    options: dict[str, Any] | None = None,
) -> Compiled:
    known = {**_TYPES, **(types or {})}
    signature = {name: known.get(name, "*fp32") for name in kernel.arg_names if name not in constexprs}
    marked = [name for name, kind in signature.items() if kind.startswith("*") or name in divisible]
    return compile_offline(
        kernel,
        signature=signature,
        constexprs=constexprs,
        target=target,
        num_warps=num_warps,
        num_stages=constexprs.get("STAGES", 3),
        divisible=marked,
        options=options,
    )
