"""What the kernels cost on GPUs that need not be there: `python -m bench.static [--json]`.

Every shipped configuration is compiled offline; nothing is run or timed. For NVIDIA chips the instructions of the
scan's main loop are counted and a model turns them into a time, which is a floor and not a measurement. A second model
says what the steps after the scan add at the shapes of models, and in the worst case; a third, what the statistics of a
training step cost beside reading its tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.static.issue_model import H100, PairCost, modelled_time, slots_per_pair
from bench.static.main_loop import code_tile_loop, flat_loop, main_loop
from bench.static.offline import TARGETS, Compiled
from bench.static.refine_model import COUNTS, products, traffic_rows
from bench.static.shipped import PLAIN_TILE, plain, rescan, scan, search_kernels, training_kernels
from bench.static.statistics_model import statistics_rows
from bench.static.worst_case_model import worst_case_row
from fastvq_kernels.configs import packed_width
from fastvq_kernels.search.bounds import CHUNK

# Widths of packed rows, with a dimension that has them.
SCANS = {16: 4, 32: 8, 64: 64, 128: 128, 192: 192, 256: 256, 512: 512, 1024: 1024}
# Dimensions for each width and number of products of the second scan.
RESCANS = (4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 1024)
TOKENS, CODES = 65536, 16384
FLOAT32_FMA = re.compile(r"\bFFMA|\bv_(?:pk_)?fmac?_f32")


def records(targets: tuple[str, ...] = tuple(TARGETS)) -> Iterator[dict[str, Any]]:
    """One record per kernel, width and target; then those of the models of traffic on sm_90."""
    scan_costs: dict[int, PairCost] = {}
    rescan_costs: dict[int, dict[int, PairCost]] = {}
    settles: dict[int, Compiled] = {}
    for target in targets:
        for width in SCANS:
            compiled, config = scan(target, width)
            pairs = config.block_m * config.block_n
            chunks = 1 if config.resident else width // config.block_d
            costs = _costs(compiled, width, pairs, chunks, flat=not config.resident)
            if target == "sm_90":
                scan_costs[width] = PairCost(costs["slots_per_pair"], costs["alu_per_pair"])
            yield {**_resources(compiled, width), **costs}
        for dim in RESCANS:
            compiled, tiles = rescan(target, dim)
            depth, width = products(dim), packed_width(dim)
            chunks = 1 if width <= tiles.resident else width // CHUNK
            by_tile = {n: _costs(compiled, depth, tiles.block_m * n, chunks) for n in tiles.columns}
            if target == "sm_90":
                rescan_costs[dim] = {n: PairCost(c["slots_per_pair"], c["alu_per_pair"]) for n, c in by_tile.items()}
            yield {**_resources(compiled, dim), **by_tile[tiles.block_n]}
            if tiles.few_n:
                yield {"kernel": "rescan_kernel, few", "target": target, "D": dim, **by_tile[tiles.few_n]}
        if target != "gfx942":
            compiled = plain(target)
            yield {**_resources(compiled, 64), **_costs(compiled, 64, PLAIN_TILE**2, 1)}
        for dim, compiled in chain(search_kernels(target), training_kernels(target)):
            if target == "sm_90" and compiled.name == "settle_kernel":
                settles[dim] = compiled
            yield _resources(compiled, dim)
        for dim, compiled in search_kernels(target, (8,), "cosine"):
            yield {**_resources(compiled, dim), "metric": "cosine"}
    if scan_costs:
        yield from traffic_rows(scan_costs, rescan_costs)
        yield from statistics_rows()
    for dim, compiled in settles.items():
        yield worst_case_row(compiled, dim)


def _resources(kernel: Compiled, width: int) -> dict[str, Any]:
    return {
        "kernel": kernel.name,
        "target": kernel.target,
        "D": width,
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "shared_bytes": kernel.shared_bytes,
        "shared_limit_bytes": kernel.shared_limit_bytes,
        "matrix_instructions": dict(kernel.matrix_instructions),
        "vector_atomics": "ADD.F32x4" in kernel.assembly,
        "float32_fma": len(FLOAT32_FMA.findall(kernel.assembly)),
    }


def _costs(kernel: Compiled, width: int, pairs: int, chunks: int, flat: bool = False) -> dict[str, Any]:
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
    console.print(_cost_table([row for row in rows if "slots_per_pair" in row]))
    console.print(
        f"Model, not a measurement: {H100}. Overlapped: product and maxima at once; serial: one after the other."
    )
    console.print(_resource_table([row for row in rows if "registers" in row]))
    console.print(_traffic_table([row for row in rows if "share_of_scan" in row]))
    console.print(f"Model, not a measurement; open tokens as counted in {COUNTS.name}.")
    console.print(_statistics_table([row for row in rows if "reads_of_x" in row]))
    for row in rows:
        if "ratio_overlapped" in row:
            console.print(
                f"All codes equal, D {row['D']}: settling in modelled clocks of a plain float64 scan: "
                f"{row['ratio_overlapped']:.2f} with pipes overlapped, {row['ratio_serial']:.2f} phase after phase."
            )


def _cost_table(rows: list[dict[str, Any]]) -> Table:
    title = f"main loop per (token, code) pair; modelled for {TOKENS} tokens, {CODES} codes on an H100"
    table = _table(title, "issue slots", "ALU pipe", "overlapped", "serial", "limiter")
    for row in rows:
        table.add_row(
            *_kernel_cells(row),
            f"{row['slots_per_pair']:.2f}",
            f"{row['alu_per_pair']:.2f}",
            f"{row['modelled_us']} µs",
            f"{row['modelled_serial_us']} µs",
            row["limiter"],
        )
    return table


def _traffic_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="modelled time of the scan, and of all that follows it, on an H100, fp32 tokens")
    for column in ("shape", "N×K×D", "data"):
        table.add_column(column, no_wrap=True)
    for column in ("scan µs", "after it µs", "% of scan", "most of it"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(row[key] for key in ("shape", "size", "data")),
            f"{row['scan_modelled_us']:.1f}",
            f"{row['after_scan_modelled_us']:.1f}",
            f"{100 * row['share_of_scan']:.0f}",
            row["largest_term"],
        )
    return table


def _statistics_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="modelled traffic of a training step's statistics, in µs + launches, on an H100")
    for column in ("shape", "H×N×K×D"):
        table.add_column(column, no_wrap=True)
    for column in ("x once", "atomics", "ordered", "chosen", "times x once", "most of it", "EMA"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(row[key] for key in ("shape", "size")),
            f"{row['read_modelled_us']:.1f}",
            *(f"{row[f'{form}_modelled_us']:.1f} + {row[f'{form}_launches']}" for form in ("atomics", "ordered")),
            row["chosen"],
            f"{row['reads_of_x']:.1f}",
            row["largest_term"],
            f"{row['ema_modelled_us']:.1f}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in ("kernel", "target", "D", *columns):
        table.add_column(column, no_wrap=True)
    return table


def _kernel_cells(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["kernel"], row["target"], str(row["D"])


def _resource_table(rows: list[dict[str, Any]]) -> Table:
    title = "compiled offline; nothing was run"
    table = _table(title, "registers", "spilled", "shared KiB", "limit", "matrix instructions")
    for row in rows:
        table.add_row(
            *_kernel_cells(row),
            str(row["registers"]),
            str(row["spill_bytes"]),
            f"{row['shared_bytes'] / 1024:.1f}",
            f"{row['shared_limit_bytes'] // 1024}",
            ", ".join(f"{name} {count}" for name, count in row["matrix_instructions"].items()) or "-",
        )
    return table


if __name__ == "__main__":
    main()
