"""Costs of the kernels on GPUs that need not be there: `python -m bench.static [--json]`.

Every shipped configuration is compiled offline; nothing is run or timed. For NVIDIA chips the instructions of the
scan's main loop are counted, and a model turns them into a time, which is a floor and not a measurement. A second model
gives the cost of the steps after the scan at the shapes of models and in the worst case; a third gives the cost of the
statistics of a training step beside reading its tokens.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from bench.harness.store import Row
from bench.report.grid import Grid, as_table
from bench.static import launches
from bench.static.issue_model import H100, PairCost, modelled_time, slots_per_pair
from bench.static.main_loop import code_tile_loop, flat_loop, main_loop
from bench.static.offline import TARGETS, Compiled, Launch, compile_offline
from bench.static.refine_model import COUNTS, products, traffic_rows
from bench.static.statistics_model import statistics_rows
from bench.static.worst_case_model import worst_case_row
from fastvq_kernels.configs import packed_width, rescan_config, scan_config
from fastvq_kernels.search.bounds import CHUNK

# Dimensions at which kernels are compiled: one for each width of packed rows, for the second scan also one for each
# number of products, few for kernels that hardly depend on it.
DIMS = {
    "scan_kernel": (4, 8, 64, 128, 192, 256, 512, 1024),
    "rescan_kernel": (4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 1024),
}
OTHER_DIMS = (8, 64, 256, 1024)
TRAINING_DIMS = (3, 64)  # loads of one column, and of four
COSINE_DIM = 8
TOKENS, CODES = 65536, 16384
FLOAT32_FMA = re.compile(r"\bFFMA|\bv_(?:pk_)?fmac?_f32")


def records(targets: tuple[str, ...] = tuple(TARGETS)) -> Iterator[Row]:
    """One record per kernel, dimension and target; then those of the models on sm_90."""
    scans: dict[int, PairCost] = {}
    rescans: dict[int, dict[int, PairCost]] = {}
    thirds: dict[int, Compiled] = {}
    for target in targets:
        for dim, launch in _searches(target):
            kernel = compile_offline(launch, target)
            if launch.name == "scan_kernel":
                costs = _scan_costs(kernel, dim)
                if target == "sm_90":
                    scans[packed_width(dim)] = PairCost(costs["slots_per_pair"], costs["alu_per_pair"])
                yield {**_resources(kernel, packed_width(dim)), **costs}
            elif launch.name == "rescan_kernel":
                few, many = _rescan_costs(kernel, dim)
                if target == "sm_90":
                    by_tile = {**few, **many}
                    rescans[dim] = {n: PairCost(c["slots_per_pair"], c["alu_per_pair"]) for n, c in by_tile.items()}
                yield {**_resources(kernel, dim), **next(iter(many.values()))}
                yield from ({"kernel": "rescan_kernel, few", "target": target, "D": dim, **c} for c in few.values())
            else:
                if target == "sm_90" and launch.name == "scan_float64_kernel":
                    thirds[dim] = kernel
                yield _resources(kernel, dim)
        for dim in TRAINING_DIMS:
            yield from (_resources(compile_offline(each, target), dim) for each in launches.training(target, dim))
        for launch in launches.search(target, COSINE_DIM, "cosine"):
            if launch.name not in ("scan_kernel", "rescan_kernel"):
                yield {**_resources(compile_offline(launch, target), COSINE_DIM), "metric": "cosine"}
        if target != "gfx942":
            kernel = compile_offline(launches.plain(target), target)
            yield {**_resources(kernel, 64), **_costs(kernel, 64, launches.PLAIN_TILE**2, 1)}
    if scans:
        yield from traffic_rows(scans, rescans)
        yield from statistics_rows()
    for dim, kernel in thirds.items():
        tile = rescan_config(packed_width(dim), "sm_90").block_n
        yield worst_case_row(kernel, dim, scans[packed_width(dim)], rescans[dim][tile])


def _searches(target: str) -> Iterator[tuple[int, Launch]]:
    """The launches of searches at all dimensions, each kernel at its own."""
    for dim in sorted({*OTHER_DIMS, *(dim for dims in DIMS.values() for dim in dims)}):
        for launch in launches.search(target, dim):
            if dim in DIMS.get(launch.name, OTHER_DIMS):
                yield dim, launch


def _scan_costs(kernel: Compiled, dim: int) -> Row:
    width = packed_width(dim)
    config = scan_config(width, kernel.target)
    chunks = 1 if config.resident else width // config.block_d
    return _costs(kernel, width, config.block_m * config.block_n, chunks, flat=not config.resident)


def _rescan_costs(kernel: Compiled, dim: int) -> tuple[dict[int, Row], dict[int, Row]]:
    """Costs by codes per tile, of the tiles for few tokens, if any, and of the others."""
    width = packed_width(dim)
    tiles = rescan_config(width, kernel.target)
    chunks = 1 if width <= tiles.resident else width // CHUNK
    costs = {n: _costs(kernel, products(dim), tiles.block_m * n, chunks) for n in tiles.columns}
    return {n: c for n, c in costs.items() if n != tiles.block_n}, {tiles.block_n: costs[tiles.block_n]}


def _resources(kernel: Compiled, dim: int) -> Row:
    return {
        "kernel": kernel.name,
        "target": kernel.target,
        "D": dim,
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "shared_bytes": kernel.shared_bytes,
        "shared_limit_bytes": kernel.shared_limit_bytes,
        "matrix_instructions": dict(kernel.matrix_instructions),
        "vector_atomics": "ADD.F32x4" in kernel.assembly,
        "float32_fma": len(FLOAT32_FMA.findall(kernel.assembly)),
    }


def _costs(kernel: Compiled, width: int, pairs: int, chunks: int, flat: bool = False) -> Row:
    """Instructions per (token, code) pair and the modelled time; AMD's code is not counted.

    Chunks of D are passes of one ``flat`` loop, or may stay a loop inside the loop over codes.
    """
    if not kernel.target.startswith("sm_"):
        return {}
    if flat:
        loop = flat_loop(kernel, pairs=pairs, depth=width, chunks=chunks)
    elif kernel.target == "sm_100":  # tcgen05 does not show its shape, and so not which loop is a whole tile
        try:
            loop = main_loop(kernel, inner_passes=chunks)
        except ValueError:  # the compiler has unrolled the chunks
            loop = main_loop(kernel)
    else:
        loop = code_tile_loop(kernel, pairs=pairs, depth=width, chunks=chunks)
    cost = slots_per_pair(loop.counts, pairs, kernel.threads)
    model = modelled_time(TOKENS, CODES, width, cost)
    return {
        "slots_per_pair": round(cost.slots, 2),
        "alu_per_pair": round(cost.alu, 2),
        "modelled_us": round(1e6 * model.seconds),
        "modelled_serial_us": round(1e6 * model.serial_seconds),
        "limiter": model.limiter,
    }


def main() -> None:
    """Print the tables, or JSON for a test."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable, one list of objects")
    as_json = parser.parse_args().json
    rows = list(records())
    if as_json:
        json.dump(rows, sys.stdout)
        return
    console = Console(width=120)
    for title, columns, left, remark in _TABLES:
        lines = [[show(row[name]) for name, _, show in columns] for row in rows if columns[-1][0] in row]
        console.print(as_table(Grid(title, [remark], [heading for _, heading, _ in columns], lines, left)))


# Name in a row, heading, and how a value is shown; the last name tells the rows of the table.
_Column = tuple[str, str, Callable[[Any], str]]
_KERNEL: list[_Column] = [("kernel", "kernel", str), ("target", "target", str), ("D", "D", str)]


def _counts(by_name: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in by_name.items()) or "-"


def _fixed(digits: int, unit: str = "") -> Callable[[Any], str]:
    return lambda value: f"{value:.{digits}f}{unit}"


_TABLES: list[tuple[str, Sequence[_Column], int, str]] = [
    (
        f"main loop per (token, code) pair; modelled for {TOKENS} tokens, {CODES} codes on an H100",
        [
            *_KERNEL,
            ("slots_per_pair", "issue slots", _fixed(2)),
            ("alu_per_pair", "ALU pipe", _fixed(2)),
            ("modelled_us", "overlapped", _fixed(0, " µs")),
            ("modelled_serial_us", "serial", _fixed(0, " µs")),
            ("limiter", "limiter", str),
        ],
        8,
        f"Model, not a measurement: {H100}. Overlapped: product and maxima at once; serial: one after the other.",
    ),
    (
        "compiled offline; nothing was run",
        [
            *_KERNEL,
            ("registers", "registers", str),
            ("spill_bytes", "spilled", str),
            ("shared_bytes", "shared KiB", lambda count: f"{count / 1024:.1f}"),
            ("shared_limit_bytes", "limit", lambda count: f"{count // 1024}"),
            ("matrix_instructions", "matrix instructions", _counts),
        ],
        8,
        "",
    ),
    (
        "modelled time of the scan, and of all that follows it, on an H100, fp32 tokens",
        [
            ("shape", "shape", str),
            ("size", "N×K×D", str),
            ("data", "data", str),
            ("scan_modelled_us", "scan µs", _fixed(1)),
            ("after_scan_modelled_us", "after it µs", _fixed(1)),
            ("largest_term", "most of it", str),
            ("share_of_scan", "% of scan", lambda share: f"{100 * share:.0f}"),
        ],
        3,
        f"Model, not a measurement; open tokens as counted in {COUNTS.name}.",
    ),
    (
        "modelled traffic of a training step's statistics, on an H100",
        [
            ("shape", "shape", str),
            ("size", "H×N×K×D", str),
            ("read_modelled_us", "x once µs", _fixed(1)),
            ("atomics_modelled_us", "atomics µs", _fixed(1)),
            ("atomics_launches", "launches", str),
            ("ordered_modelled_us", "ordered µs", _fixed(1)),
            ("ordered_launches", "launches", str),
            ("chosen", "chosen", str),
            ("largest_term", "most of it", str),
            ("ema_modelled_us", "EMA µs", _fixed(1)),
            ("reads_of_x", "times x once", _fixed(1)),
        ],
        2,
        "",
    ),
    (
        "modelled worst case on an H100, every token crowded: clocks per (token, code) pair and SM",
        [
            ("D", "D", str),
            ("scan_clocks", "scan", _fixed(2)),
            ("second_clocks", "second", _fixed(2)),
            ("third_clocks", "third", _fixed(2)),
            ("formula_clocks", "formula", _fixed(2)),
            ("ratio_to_product", "of product", _fixed(2)),
            ("ratio_to_formula", "of formula", _fixed(2)),
        ],
        0,
        "Formula: a float32 product, and a matrix of distances written and read once.",
    ),
]


if __name__ == "__main__":
    main()
