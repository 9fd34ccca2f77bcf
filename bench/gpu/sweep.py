"""Which launch configuration of the scan is fastest for each width of packed rows, measured one change at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bench.contenders.base import with_heads
from bench.gpu.kernels import compiled_versions, kernels_of
from bench.gpu.problems import tiny
from bench.gpu.stage import Row, Stage
from bench.gpu.workers import Outcome, Workers
from bench.harness.outcome import describe, seconds_row
from bench.harness.problems import Problem, make_inputs
from fastvq.testing.measure import Clock
from fastvq_kernels.configs import TOKEN_TILE, ScanConfig, scan_config

# A dimension for each width, the most valuable widths first.
WIDTHS = {64: 64, 128: 128, 16: 4, 32: 8, 256: 256, 512: 512, 192: 192, 1024: 1024}
_TOKENS, _CODES = 131_072, 8192

# Values tried for a field; what is true or false is tried the other way round.
_VALUES: dict[str, tuple[Any, ...]] = {
    "block_m": (64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "block_d": (),  # follows the width; see _block_d
    "lanes": (),  # what the hardware's accumulator layout gives
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4),
}
# Changes that only make sense together.
_TOGETHER: tuple[dict[str, Any], ...] = (
    {"block_m": 256, "num_warps": 8},
    {"block_m": 256, "num_warps": 8, "num_stages": 3},
    {"block_m": 256, "block_n": 64, "num_warps": 8},
    {"block_m": 128, "block_n": 256, "num_warps": 8},
    {"block_m": 128, "block_n": 256, "num_warps": 8, "num_stages": 3},
    {"block_m": 64, "block_n": 256},
    {"block_m": 64, "block_n": 256, "num_stages": 3},
    {"block_m": 64, "num_stages": 3},
    {"block_n": 64, "num_stages": 3},
    {"block_n": 64, "num_stages": 4},
    {"block_n": 32, "num_stages": 4},
    {"block_m": 256, "block_n": 32, "num_warps": 8, "num_stages": 4},
    {"block_m": 256, "num_warps": 8, "resident": False, "num_stages": 3},
    {"resident": False, "num_stages": 3},
    {"resident": False, "num_stages": 4},
    {"tma": False, "num_stages": 3},
)
_COMBINED = 8


class _Task(NamedTuple):
    """One configuration at one width, to be compiled and run once."""

    problem: Problem
    config: ScanConfig
    device: torch.device


def variations(width: int) -> list[ScanConfig]:
    """The default of a width and its valid variations, without repetition."""
    default = scan_config(width)
    changes = [*_single(default), *({"block_d": size} for size in _block_d(width)), *_TOGETHER]
    return _applied(default, [{}, *changes])


def _single(default: ScanConfig) -> Iterator[dict[str, Any]]:
    for field in dataclasses.fields(ScanConfig):
        now = getattr(default, field.name)
        values = (not now,) if isinstance(now, bool) else _VALUES[field.name]
        yield from ({field.name: value} for value in values)


def _block_d(width: int) -> list[int]:
    return [size for size in (32, 64, 128, 256) if size < width and width % size == 0]


def _applied(default: ScanConfig, changes: list[dict[str, Any]]) -> list[ScanConfig]:
    configs = [replace(default, **change) for change in changes]
    return [config for config in dict.fromkeys(configs) if TOKEN_TILE % config.block_m == 0]


def sweep(stage: Stage) -> None:
    """Two rounds per width: single changes of the default, then combinations of those that helped."""
    widths = dict(list(WIDTHS.items())[:1]) if stage.dry else WIDTHS
    clock = Clock(stage.device)
    with Workers(stage.workers) as workers:
        # All widths at once: one search of a width keeps one core busy.
        defaults = [_Task(_problem(stage, width), scan_config(width), stage.device) for width in widths]
        for outcome in workers.run(run_once, defaults, stage.deadline):
            if outcome.error:
                stage.note(f"{outcome.task.problem.name}: the default does not run: {outcome.error}")
        for width in stage.while_time(widths, lambda width: f"width {width}"):
            with stage.guarded(f"width {width}"):
                for row in _sweep_width(stage, workers, clock, width):
                    stage.add({"width": width, **row})


def _sweep_width(stage: Stage, workers: Workers, clock: Clock, width: int) -> list[Row]:
    """Rows of all configurations tried at one width, the fastest search first."""
    problem, default = _problem(stage, width), scan_config(width)
    configs = variations(width)
    rows = _measure(stage, workers, clock, problem, configs[:3] if stage.dry or stage.quick else configs)
    if not stage.dry and stage.left() > 20:
        tried = {row["config"] for row in rows}
        combined = _applied(default, _combinations(rows))
        fresh = [config for config in combined if repr(config) not in tried]
        if fresh:
            rows += _measure(stage, workers, clock, problem, [default, *fresh])[1:]
    return sorted(rows, key=lambda row: row["relative"] or float("inf"))


def _problem(stage: Stage, width: int) -> Problem:
    problem = Problem(f"width {width}", _TOKENS, _CODES, WIDTHS[width], dtype=torch.float16)
    return replace(tiny(problem), dim=WIDTHS[width]) if stage.dry else problem


def _combinations(rows: list[Row]) -> list[dict[str, Any]]:
    """Unions of two of the changes that made the search at least one percent faster, the best first."""
    better = sorted(
        (row for row in rows if row["relative"] and row["relative"] < 0.99), key=lambda row: row["relative"]
    )
    changes = [row["change"] for row in better[:6]]
    return [{**second, **first} for i, first in enumerate(changes) for second in changes[i + 1 :]][:_COMBINED]


def run_once(task: _Task) -> Row:
    """Compile and run one configuration; compare its indices with the default's."""
    from fastvq_kernels.search.pack_codes import pack_codebook
    from fastvq_kernels.search.pipeline import certified_search

    (x,), codebook = make_inputs(task.problem, task.device)
    before = len(_compiled_scans())
    found = certified_search(with_heads(x), pack_codebook(codebook, task.problem.metric, task.config))
    compiled = _compiled_scans()[before:]
    expected = certified_search(with_heads(x), pack_codebook(codebook, task.problem.metric))
    row: Row = {"differ": int((found[0] != expected[0]).sum()), "open": int(found[1].sum())}
    if compiled:
        row |= {name: getattr(compiled[0], name, None) for name in ("n_regs", "n_spills")}
    if task.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _compiled_scans() -> list[Any]:
    """The compiled versions of the scan in this process, the oldest first."""
    from fastvq_kernels.search import scan

    return compiled_versions(scan.scan_kernel)


def _measure(stage: Stage, workers: Workers, clock: Clock, problem: Problem, configs: list[ScanConfig]) -> list[Row]:
    """One row per configuration: status, seconds of search and scan, and the search relative to the first's."""
    default = configs[0]
    tasks = [_Task(problem, config, stage.device) for config in configs]
    outcomes = {outcome.task: outcome for outcome in workers.run(run_once, tasks, stage.deadline)}
    if any(outcome.error.startswith("cut") for outcome in outcomes.values()):
        stage.document["status"] = "cut"
    rows = [_row(default, outcomes[task]) for task in tasks]
    good = {row["config"]: config for row, config in zip(rows, configs, strict=True) if row["status"] == "ok"}
    if repr(default) not in good:
        stage.note(f"{problem.name}: the default does not run: {rows[0]['status']}")
        return rows
    searches = _searches(problem, good, stage)
    timings = clock.interleaved(searches, 2 if stage.dry else 9, stage.deadline)
    scans = _scan_seconds(stage, searches)
    if repr(default) not in timings:
        stage.note(f"{problem.name}: the default could not be timed: {clock.errors.get(repr(default))}")
        return rows
    for row in rows:
        if row["config"] in timings:
            row |= seconds_row(timings[row["config"]])
            row["relative"] = timings[row["config"]].median / timings[repr(default)].median
            row["scan_seconds"] = scans.get(row["config"])
            if scans.get(repr(default)) and row["scan_seconds"]:
                row["scan_relative"] = row["scan_seconds"] / scans[repr(default)]
    return rows


def _row(default: ScanConfig, outcome: Outcome) -> Row:
    config = outcome.task.config
    change = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    }
    row: Row = {
        "config": repr(config),
        "paste": paste(config),
        "change": change,
        "relative": None,
        "scan_relative": None,
    }
    row |= {"status": outcome.error or "ok", **(outcome.result or {})}
    if row.get("differ"):
        row |= {"status": f"WRONG: {row['differ']} indices differ from the default's", "passed": False}
    return row


def paste(config: ScanConfig) -> str:
    """The configuration as a line for the table: what differs from the defaults of the class."""
    fields = [(field, getattr(config, field.name)) for field in dataclasses.fields(config)]
    named = [f"{field.name}={value!r}" for field, value in fields if value != field.default]
    return f"ScanConfig({', '.join(named)})"


def _searches(problem: Problem, configs: dict[str, ScanConfig], stage: Stage) -> dict[str, Any]:
    from fastvq_kernels.search.pack_codes import pack_codebook
    from fastvq_kernels.search.pipeline import certified_search

    batches, codebook = make_inputs(problem, stage.device, 3)
    searches = {}
    for name, config in configs.items():
        packed = pack_codebook(codebook, problem.metric, config)
        searches[name] = lambda i, packed=packed: certified_search(with_heads(batches[i % 3]), packed)
    return searches


def _scan_seconds(stage: Stage, searches: dict[str, Any]) -> dict[str, float]:
    """Seconds of the scan kernel alone, from one profile of all configurations in turns; empty where that fails."""
    rounds = 4

    def all_of_them() -> None:
        for i in range(rounds):
            for search in searches.values():
                search(i)

    try:
        scans = [kernel for kernel in kernels_of(all_of_them, stage.device) if kernel.name.startswith("scan_kernel")]
        if len(scans) != rounds * len(searches):
            if stage.device.type == "cuda":
                stage.note(
                    f"{len(scans)} scans profiled, expected {rounds * len(searches)}: no times of the scan alone"
                )
            return {}
        durations = torch.tensor([kernel.duration for kernel in scans]).view(rounds, -1).median(0).values / 1e6
        return dict(zip(searches, durations.tolist(), strict=True))
    except Exception as error:  # the profiler is no part of the measurement
        stage.note(f"no times of the scan alone: {describe(error)}")
        return {}
