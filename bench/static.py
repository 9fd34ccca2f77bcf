"""What the kernels occupy on GPUs that need not be there: `python -m bench.static [--json]`.

Every shipped configuration is compiled offline; nothing is run or timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.offline import TARGETS, Compiled, compile_offline
from fastvq_kernels.accumulate import accumulate_kernel
from fastvq_kernels.configs import ACCUMULATE, nearest_config
from fastvq_kernels.nearest import block_of_dimensions, nearest_code_kernel

# Dimensions in use, from a latent of three channels to speech tokens.
DIMENSIONS = (3, 8, 64, 128, 256, 1024)


class Row(NamedTuple):
    """One kernel for one dimension on one target."""

    dim: int
    multiplies: bool  # whether it is expected to use matrix instructions
    compiled: Compiled


def compile_all(targets: tuple[str, ...] = tuple(TARGETS), dimensions: tuple[int, ...] = DIMENSIONS) -> Iterator[Row]:
    """Compile every shipped kernel for ``targets``."""
    for target in targets:
        for dim in dimensions:
            yield Row(dim, True, _nearest(target, dim))
        yield Row(max(dimensions), False, _accumulate(target))


def _nearest(target: str, dim: int) -> Compiled:
    config = nearest_config(is_hip=target.startswith("gfx"))
    return compile_offline(
        nearest_code_kernel,
        signature={
            "p_x": "*fp32",
            "p_codes": "*fp32",
            "p_half_norms": "*fp32",
            "p_indices": "*i64",
            "N": "i32",
            "K": "i32",
        },
        constexprs={
            "D": dim,
            "BN": config.BN,
            "BK": config.BK,
            "BD": block_of_dimensions(dim, config),
            "PRECISION": config.precision,
        },
        target=target,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _accumulate(target: str) -> Compiled:
    return compile_offline(
        accumulate_kernel,
        signature={
            "p_x": "*fp32",
            "p_indices": "*i64",
            "p_counts": "*i32",
            "p_sums": "*fp32",
            "N": "i32",
            "D": "i32",
        },
        constexprs={"BN": ACCUMULATE.BN, "BD": ACCUMULATE.BD},
        target=target,
        num_warps=ACCUMULATE.num_warps,
        num_stages=1,
        divisible=("p_x", "p_indices", "p_counts", "p_sums", "D"),
    )


def main() -> None:
    """Print the table, or JSON for a test."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable, one list of objects")
    as_json = parser.parse_args().json
    rows = list(compile_all())
    if as_json:
        json.dump([_record(row) for row in rows], sys.stdout)
        return
    table = Table(title="compiled offline; nothing was run")
    for column in ("kernel", "target", "D", "registers", "spilled bytes", "shared / limit", "matrix instructions"):
        table.add_column(column)
    for record in map(_record, rows):
        matrix = ", ".join(f"{name} {count}" for name, count in record["matrix_instructions"].items())
        table.add_row(
            record["kernel"],
            record["target"],
            str(record["D"]),
            str(record["registers"]),
            str(record["spill_bytes"]),
            f"{record['shared_bytes']} / {record['shared_limit_bytes']}",
            matrix or "-",
        )
    Console().print(table)


def _record(row: Row) -> dict[str, Any]:
    kernel = row.compiled
    return {
        "kernel": kernel.name,
        "target": kernel.target,
        "D": row.dim,
        "multiplies": row.multiplies,
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "shared_bytes": kernel.shared_bytes,
        "shared_limit_bytes": kernel.shared_limit_bytes,
        "matrix_instructions": dict(kernel.matrix_instructions),
    }


if __name__ == "__main__":
    main()
