"""Modelled cost, on an H100, of the steps after the scan: refinement, second scan, decision and third scan.

The second scan costs the instructions and matrix products of its tiles of open tokens, or its reading of the codes
where that takes longer; a tile scans the ranges that one of its tokens needs. Both scans wait for the busiest
multiprocessor. The third scan costs its products. The other steps cost memory traffic alone: an operand moves at the
rate of L2 if it fits there, else of device memory. Nothing overlaps. `bench/results/open_tokens.json` has the number of
tokens of each step. Left out: launches, the latency of dependent loads, hits in L1.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

from bench.gpu.problems import MODELS, PUBLISHED
from bench.harness.problems import Problem
from bench.static.issue_model import H100, PairCost, modelled_time
from fastvq_kernels.configs import SPLIT_D, ScanConfig, packed_width, rescan_config, scan_config
from fastvq_kernels.search.scan import splits

COUNTS = Path(__file__).parents[1] / "results" / "open_tokens.json"
# Bytes per second and bytes. L2: reading up to 33 MB was measured at 6.8 to 7.1 TB/s on an H100 PCIe and at 9.5 to
# 10 TB/s on an H200 (github.com/te42kyfo/gpu-benches, gpu-l2-cache/h100_pcie.txt and h200.txt); less is assumed, since
# rows of a few sectors are not the whole lines of a benchmark. Device memory and size: NVIDIA's H100 SXM data sheet.
L2_RATE, MEMORY_RATE, L2_BYTES = 5.5e12, 3.35e12, 50e6
SECTOR = 32  # bytes, the smallest piece that L2 delivers
BIN = 12  # bytes: best, rest and winner
# Float64 operations per second of the matrix units: the same data sheet.
FLOAT64_RATE = 66.9e12


def sm_90_config(dim: int) -> ScanConfig:
    """The shipped configuration of the scan for ``dim`` columns on Hopper."""
    return scan_config(packed_width(dim), "sm_90")


def ranges_on_gpu(problem: Problem, config: ScanConfig) -> int:
    """Ranges of codes that the scan takes for this problem on an H100."""
    programs = problem.heads * triton.cdiv(problem.tokens, config.block_m)
    steps = triton.cdiv(problem.codes, config.block_n)
    with patch("fastvq_kernels.search.scan.multiprocessors", return_value=H100.sms):
        per_range = triton.cdiv(steps, splits(programs, steps, config.lanes, torch.device("cuda")))
    return triton.cdiv(steps, per_range)


def same_counts(problem: Problem) -> tuple[int, int, str, int]:
    """What the shares of tokens in `open_tokens.json` depend on: codes, dim, metric and ranges."""
    return problem.codes, problem.dim, problem.metric, ranges_on_gpu(problem, sm_90_config(problem.dim))


def waiting(programs: float) -> float:
    """How many times as long equal programs take as on multiprocessors that all have the same to do."""
    return math.ceil(programs / H100.sms) * H100.sms / programs if programs else 1.0


def products(dim: int) -> int:
    """Columns that the second scan multiplies for tokens of ``dim`` columns."""
    return packed_width(dim) * (1 if dim <= SPLIT_D else 3)


def seconds_after_scan(problem: Problem, counts: Mapping[str, Any], costs: Mapping[int, PairCost]) -> dict[str, float]:
    """Modelled seconds by step, for float32 tokens and codes.

    counts: a row of `open_tokens.json` of this codebook size. costs: instructions of the second scan by codes per tile.
    """
    tokens = problem.heads * problem.tokens
    config = sm_90_config(problem.dim)
    width, depth = packed_width(problem.dim), products(problem.dim)
    tiles = rescan_config(width, "sm_90")
    bins = BIN * config.lanes * ranges_on_gpu(problem, config)  # bytes per token
    row = SECTOR * triton.cdiv(4 * problem.dim, SECTOR)  # bytes of a token or code
    half = 2 * width  # bytes of one fp16 part of it
    n_open = tokens * counts["open"] / counts["tokens"]
    n_two = tokens * counts["by_two"] / counts["tokens"] + n_open
    n_crowded = tokens * counts["crowded"] / counts["tokens"]
    candidates = tokens * counts["candidates"] / counts["tokens"]
    of_bins, of_x, of_codes = (
        operand_rate(tokens * bins),
        operand_rate(tokens * row),
        operand_rate(problem.heads * problem.codes * row),
    )
    per_head = n_open / problem.heads
    row_tiles = math.ceil(per_head / tiles.block_m)
    programs = triton.cdiv(tiles.programs * H100.sms, problem.heads)
    has_few = row_tiles * triton.cdiv(problem.codes, tiles.block_n) < programs
    block_n = tiles.columns[-1] if has_few else tiles.block_n
    scanned = 0.0  # steps of all tiles
    if row_tiles:
        # A tile needs a range if one of its tokens does. Few open tokens were counted: one range more than they need.
        needed = (counts["again"] + 1) / (counts["open"] * counts["ranges"] + 1)
        share = 1 - (1 - needed) ** (per_head / row_tiles)
        scanned = problem.heads * row_tiles * share * triton.cdiv(problem.codes, block_n)
    parts = min(2, depth // width)
    rows_read = block_n
    if width > tiles.resident:
        rows_read += per_head / max(1, row_tiles)
    read = scanned * rows_read * parts * half / L2_RATE
    multiplied = modelled_time(tiles.block_m, block_n, depth, costs[block_n]).seconds * scanned
    return {
        "bins": tokens * bins / of_bins,
        # norm in, G_k of the best code in, index out
        "norm, G, index": tokens * (4 + SECTOR + 8) / L2_RATE,
        "two codes": n_two * (row / of_x + 2 * (row + 2 * SECTOR) / of_codes),
        "second parts": n_open * (row / of_x + 2 * half / L2_RATE),
        "second scan": max(read, multiplied * waiting(scanned)),
        "candidates": n_open * (row / of_x + SECTOR / L2_RATE) + candidates * (row + SECTOR) / of_codes,
        "third scan": 2 * n_crowded * problem.codes * problem.dim / FLOAT64_RATE,
    }


def operand_rate(operand_bytes: float) -> float:
    """Bytes per second of an operand of that size."""
    return L2_RATE if operand_bytes <= L2_BYTES else MEMORY_RATE


def traffic_rows(
    costs: Mapping[int, PairCost], rescan_costs: Mapping[int, Mapping[int, PairCost]]
) -> Iterator[dict[str, Any]]:
    """A row per shape: modelled scan, and what follows it, on Gaussian data; then the photographs.

    costs: instructions per pair of the scan on sm_90, by width of the packed rows. rescan_costs: of the second scan,
    by a dimension for each width and number of products, and by codes per tile.
    """
    counted = json.loads(COUNTS.read_text())["rows"]
    keys = ("codes", "dim", "metric", "ranges")
    gaussian = {tuple(row[key] for key in keys): row for row in counted if row["data"] == "gaussian"}
    second = {(packed_width(dim), products(dim)): by_tile for dim, by_tile in rescan_costs.items()}
    cases = [(problem, gaussian[same_counts(problem)]) for problem in (*PUBLISHED, *MODELS)]
    for row in counted:
        if row["data"] == "photos":
            cases.append((Problem(row["name"], row["batch"], row["codes"], row["dim"]), row))
    for problem, counts in cases:
        config, width = sm_90_config(problem.dim), packed_width(problem.dim)
        row_tiles = problem.heads * triton.cdiv(problem.tokens, config.block_m)
        codes = triton.cdiv(problem.codes, config.block_n) * config.block_n
        scan = modelled_time(row_tiles * config.block_m, codes, width, costs[width]).seconds
        scan *= waiting(row_tiles * ranges_on_gpu(problem, config))
        terms = seconds_after_scan(problem, counts, second[width, products(problem.dim)])
        yield {
            "kernel": "after-scan model",
            "target": "sm_90",
            "shape": problem.name,
            "size": problem.size,
            "codes": problem.codes,
            "D": problem.dim,
            "data": counts["data"],
            "scan_modelled_us": 1e6 * scan,
            "after_scan_modelled_us": 1e6 * sum(terms.values()),
            "share_of_scan": sum(terms.values()) / scan,
            "largest_term": max(terms, key=lambda term: terms[term]),
        }
