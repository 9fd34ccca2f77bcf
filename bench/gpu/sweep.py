"""The fastest launch configuration of the scan for each width of packed rows, found one change at a time."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from bench.contenders.base import with_heads
from bench.gpu.kernels import compiled_versions, kernels_of
from bench.gpu.problems import tiny
from bench.gpu.stage import Stage
from bench.harness.outcome import describe, seconds_row
from bench.harness.problems import Problem, make_inputs
from bench.harness.store import Row
from fastvq_kernels.configs import TOKEN_TILE, ScanConfig, scan_config
from fastvq_kernels.search.pack_codes import pack_codebook
from fastvq_kernels.search.pipeline import certified_search
from fastvq_kernels.search.scan import scan_kernel

# A dimension for each width, the most valuable widths first.
WIDTHS = {64: 64, 128: 128, 16: 4, 32: 8, 256: 256, 512: 512, 192: 192, 1024: 1024}
Changes = dict[str, Any]
Search = Callable[[Tensor], tuple[Tensor, Tensor]]

# Values tried for a field. Flags are flipped, block_d follows the width, lanes are fixed by the hardware.
_VALUES: dict[str, tuple[int, ...]] = {
    "block_m": (64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4),
}
# Changes that only make sense together.
_TOGETHER: tuple[Changes, ...] = (
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


def variations(width: int) -> list[ScanConfig]:
    """The default of a width, then its valid variations, without repetition."""
    changes: list[Changes] = [{}]
    for name, value in asdict(scan_config(width)).items():
        values = (not value,) if isinstance(value, bool) else _VALUES.get(name, ())
        changes += [{name: other} for other in values]
    changes += [{"block_d": size} for size in (32, 64, 128, 256) if size < width and width % size == 0]
    return _applied(width, [*changes, *_TOGETHER])


def _applied(width: int, changes: Iterable[Changes]) -> list[ScanConfig]:
    configs = dict.fromkeys(replace(scan_config(width), **change) for change in changes)
    return [config for config in configs if TOKEN_TILE % config.block_m == 0]


def sweep(stage: Stage) -> None:
    """Two rounds per width: single changes of the default, then combinations of the changes that helped."""
    widths = list(WIDTHS)[: 1 if stage.dry else None]
    # Compile the defaults of all widths at once: one search keeps one core busy.
    defaults = {width: partial(run_once, _problem(stage, width), scan_config(width), stage.device) for width in widths}
    list(stage.outcomes(defaults))
    for width in stage.while_time(widths, lambda width: f"width {width}"):
        with stage.guarded(f"width {width}"):
            configs = variations(width)[: 3 if stage.dry or stage.quick else None]
            rows = _measure(stage, width, configs)
            fresh = [config for config in _applied(width, _combinations(rows)) if config not in configs]
            if fresh and not stage.dry and stage.left() > 20:
                rows += _measure(stage, width, [configs[0], *fresh])[1:]
            rows.sort(key=lambda row: row["relative"] or float("inf"))
            stage.add(*({"width": width, **row} for row in rows))


def _problem(stage: Stage, width: int) -> Problem:
    problem = Problem(f"width {width}", 131_072, 8192, WIDTHS[width], dtype=torch.float16)
    return replace(tiny(problem), dim=WIDTHS[width]) if stage.dry else problem


def _combinations(rows: list[Row]) -> list[Changes]:
    """Unions of two of the changes that made the search at least one percent faster, the best first."""
    better = [row for row in rows if row["relative"] and row["relative"] < 0.99]
    changes = [row["change"] for row in sorted(better, key=lambda row: row["relative"])[:6]]
    return [second | first for first, second in combinations(changes, 2)][:_COMBINED]


def packed_search(problem: Problem, codebook: Tensor, config: ScanConfig | None = None) -> Search:
    """The search in a codebook packed for a configuration: indices ``[H, N]`` and the number of open tokens ``[H]``."""
    packed = pack_codebook(codebook, problem.metric, config)
    return lambda x: certified_search(with_heads(x), packed)


def run_once(problem: Problem, config: ScanConfig, device: torch.device) -> Row:
    """Compile and run one configuration; compare its indices with the default's."""
    (x,), codebook = make_inputs(problem, device)
    before = len(compiled_versions(scan_kernel))
    indices, n_open = packed_search(problem, codebook, config)(x)
    compiled = compiled_versions(scan_kernel)[before:]
    differ = int((indices != packed_search(problem, codebook)(x)[0]).sum())
    registers = {name: getattr(compiled[0], name, None) for name in ("n_regs", "n_spills")} if compiled else {}
    return {"differ": differ, "open": int(n_open.sum()), **registers}


def _measure(stage: Stage, width: int, configs: list[ScanConfig]) -> list[Row]:
    """One row per configuration: status, seconds of search and scan, and both relative to those of the first."""
    problem, default = _problem(stage, width), repr(configs[0])
    tasks = {config: partial(run_once, problem, config, stage.device) for config in configs}
    outcomes = {outcome.key: outcome for outcome in stage.outcomes(tasks)}
    rows = []
    for config in configs:
        row: Row = {"config": repr(config), "paste": paste(config), "change": _changes(config, configs[0])}
        row |= {"relative": None, "scan_relative": None, "status": outcomes[config].error or "ok"}
        row |= outcomes[config].result or {}
        if row.get("differ"):
            row |= {"status": f"WRONG: {row['differ']} indices differ from the default's", "passed": False}
        rows.append(row)
    if rows[0]["status"] != "ok":
        stage.note(f"{problem.name}: the default does not run: {rows[0]['status']}")
        return rows
    good = [config for config, row in zip(configs, rows, strict=True) if row["status"] == "ok"]
    batches, codebook = make_inputs(problem, stage.device, 3)

    def rotating(search: Search, i: int) -> Any:
        return search(batches[i % 3])

    searches = {repr(config): partial(rotating, packed_search(problem, codebook, config)) for config in good}
    timings = stage.clock.interleaved(searches, 2 if stage.dry else 9, stage.deadline)
    scans = _scan_seconds(stage, searches)
    if default not in timings:
        stage.note(f"{problem.name}: the default could not be timed: {stage.clock.errors.get(default)}")
        return rows
    for row in rows:
        if timing := timings.get(row["config"]):
            row |= {**seconds_row(timing), "relative": timing.median / timings[default].median}
            row["scan_seconds"] = scan = scans.get(row["config"])
            if scan and scans.get(default):
                row["scan_relative"] = scan / scans[default]
    return rows


def _changes(config: ScanConfig, base: ScanConfig) -> Row:
    """Fields in which ``config`` differs from ``base``."""
    return {name: value for name, value in asdict(config).items() if value != getattr(base, name)}


def paste(config: ScanConfig) -> str:
    """The configuration as a line for the table: what differs from the defaults of the class."""
    return f"ScanConfig({', '.join(f'{name}={value!r}' for name, value in _changes(config, ScanConfig()).items())})"


def _scan_seconds(stage: Stage, searches: Mapping[str, Callable[[int], Any]]) -> dict[str, float]:
    """Seconds of the scan kernel alone, from one profile of all searches in turns; empty where that fails."""
    rounds = 4

    def in_turns() -> None:
        for i, search in product(range(rounds), searches.values()):
            search(i)

    try:
        scans = [time for name, time in kernels_of(in_turns, stage.device) if name.startswith("scan_kernel")]
        durations = torch.tensor(scans).view(rounds, len(searches)).median(0).values / 1e6
    except Exception as error:  # the profiler is no part of the measurement
        if stage.device.type == "cuda":  # interpreted, the scan is no kernel
            stage.note(f"no times of the scan alone: {describe(error)}")
        return {}
    return dict(zip(searches, durations.tolist(), strict=True))
