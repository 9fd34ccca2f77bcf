"""Modelled worst case of a search on an H100, every token crowded, beside the expanded formula.

Every token is scanned, scanned again, and scanned in float64, with all codes: as with codes that agree to nearly
float32 precision, most of a codebook and nearest to all tokens. The instructions of a tile come from the machine code;
pipes overlap, the three scans do not. The formula costs a float32 product and a matrix written and read once, which do
not overlap either. Left out: launches, and steps whose cost does not grow with the number of codes.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from bench.static.issue_model import ALU_PIPE, H100, PairCost
from bench.static.main_loop import main_loop
from bench.static.offline import Compiled
from bench.static.refine_model import MEMORY_RATE, products
from fastvq_kernels.configs import float64_config, packed_width

# Lanes per SM and clock, CUDA C++ Programming Guide (9.0): float64 64, conversions from and to 64-bit types 16, float32
# multiply-adds 128; 32 load-store units per SM: NVIDIA H100 whitepaper. Shuffles and shared memory pass through these.
_PIPES: Mapping[str, tuple[int, frozenset[str]]] = {
    "alu": (H100.alu_lanes, frozenset(ALU_PIPE)),
    "float64": (64, frozenset({"DADD", "DMUL", "DFMA", "DSETP"})),
    "conversion": (16, frozenset({"F2F"})),
    "load-store": (32, frozenset({"LDG", "STG", "LDS", "STS", "LDSM", "SHFL"})),
}
_FLOAT32_LANES = 128
# Float64 multiply-adds per SM and clock: 66.9 TFLOPS of the matrix units in NVIDIA's H100 SXM data sheet.
_FLOAT64_MATRIX = 128


def float64_clocks(kernel: Compiled, dim: int) -> float:
    """Clocks per (token, code) pair and SM of the third scan: its slowest pipe."""
    tiles = float64_config(kernel.target)
    chunks = -(-dim // tiles.block_d)
    loop = main_loop(kernel, inner_passes=chunks) if chunks > 1 else main_loop(kernel)
    share = kernel.threads / (tiles.block_m * tiles.block_n)
    return max(_clocks(loop.counts) * share, chunks * tiles.block_d / _FLOAT64_MATRIX)


def _clocks(counts: Counter[str]) -> float:
    pipes = [sum(n for op, n in counts.items() if op in ops) / lanes for lanes, ops in _PIPES.values()]
    return max(sum(counts.values()) / H100.issue_lanes, *pipes)


def _scan_clocks(cost: PairCost, depth: int) -> float:
    return max(2 * depth / H100.tensor_flop, cost.slots / H100.issue_lanes, cost.alu / H100.alu_lanes)


def worst_case_row(third: Compiled, dim: int, scan: PairCost, rescan: PairCost) -> dict[str, Any]:
    """Clocks per (token, code) pair and SM of the three scans and of the formula, and their ratio."""
    clocks = {
        "scan": _scan_clocks(scan, packed_width(dim)),
        "second": _scan_clocks(rescan, products(dim)),
        "third": float64_clocks(third, dim),
    }
    formula = dim / _FLOAT32_LANES + 2 * 4 / MEMORY_RATE * H100.sms * H100.clock_hz
    return {
        "kernel": "worst-case model",
        "target": "sm_90",
        "D": dim,
        **{f"{step}_clocks": value for step, value in clocks.items()},
        "formula_clocks": formula,
        "ratio_to_formula": sum(clocks.values()) / formula,
        "ratio_to_product": sum(clocks.values()) / (dim / _FLOAT32_LANES),
    }
