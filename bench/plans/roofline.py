"""Upper bounds of this machine, measured in the same run: the rates of a matrix product and of a copy."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.gpu.device import ceilings
from bench.harness.options import Options
from bench.harness.run import Group
from bench.harness.store import Row, Store
from fastvq.cpu.matmul import product
from fastvq.testing.measure import Clock

# Three float32 matrices of 1 MiB: they fit the cache of every processor of the last ten years.
_PRODUCT = 512
_PRODUCTS = 10
# Far larger than any cache.
_COPY_BYTES = 1 << 28
_REPEATS = 40


def plan(options: Options) -> list[Group]:
    """One group: the copy, and the float32 product in the cache of a CPU or the float16 product of a GPU."""
    row = {"benchmark": "limits", "device": options.device.type}
    rows = [{**row, "name": name} for name in ("product", "copy")]
    return [Group("limits of the machine", rows, lambda: measure(rows, options.device))]


def measure(rows: list[Row], device: torch.device) -> list[Row]:
    """Fill ``rate``: FLOP/s of the product, bytes/s (read and written) of the copy."""
    product, copy = _on_gpu(device) if device.type == "cuda" else _on_cpu(device)
    return [{**rows[0], "rate": product, "unit": "FLOP/s"}, {**rows[1], "rate": copy, "unit": "B/s"}]


def _on_gpu(device: torch.device) -> tuple[float, float]:
    found = ceilings(device, dry=False)
    product = max(row["tflops"] for row in found if "float16 product" in row["name"])
    return 1e12 * product, 1e12 * max(row["tbps"] for row in found if "tbps" in row)


def _on_cpu(device: torch.device) -> tuple[float, float]:
    """The best of the repeats: other load on the machine must not lower an upper bound."""
    a, b = torch.randn(2, _PRODUCT, _PRODUCT)
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source)

    def products(_: int) -> None:
        for _ in range(_PRODUCTS):
            product(a, b)

    calls: dict[str, Callable[[int], Any]] = {"product": products, "copy": lambda _: target.copy_(source)}
    timings = Clock(device).interleaved(calls, _REPEATS)
    flop = 2 * _PRODUCT**3 * _PRODUCTS
    return flop / min(timings["product"].seconds), 2 * _COPY_BYTES / min(timings["copy"].seconds)


def limits_of(store: Store, rows: Sequence[Row]) -> dict[str, float]:
    """Rates by name, measured on the machine of ``rows`` with the same versions; empty if there are none."""
    heads = {row["head"] for row in rows}
    return {row["name"]: row["rate"] for row in store.rows if row["benchmark"] == "limits" and row["head"] in heads}


def flop(row: Row) -> float:
    """Floating-point operations of the matrix product that a search contains, ``2 N K D``."""
    return 2.0 * row["tokens"] * row["codes"] * row["dim"]


def least_bytes(row: Row) -> float:
    """Bytes that any search moves: tokens and codes read once, indices written."""
    size = {"float32": 4, "float16": 2, "bfloat16": 2}[row["dtype"]]
    return float(size * row["dim"] * (row["tokens"] + row["codes"]) + 8 * row["tokens"])


def share_of_limit(row: Row, limits: dict[str, float]) -> float | None:
    """A row's rate over the limit ``min(product, copy · 2NKD / bytes)``; None if the row has no time."""
    if not limits or row.get("seconds") is None:
        return None
    limit = min(limits["product"], limits["copy"] * flop(row) / least_bytes(row))
    return flop(row) / row["seconds"] / limit
