"""Stages that time whole searches: fastvq beside the matrix product, flash-kmeans, cdist and the formula in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.contenders import CONTENDERS, SPECIAL, ours
from bench.contenders.base import Prepare, Prepared
from bench.gpu.device import ceilings, clocks
from bench.gpu.kernels import stage_seconds
from bench.gpu.problems import MODELS, PUBLISHED, published, tiny
from bench.gpu.stage import Row, Stage
from bench.gpu.workers import Workers
from bench.harness.outcome import describe, failure
from bench.harness.problems import Problem, make_inputs
from bench.harness.timing import Clock, seconds_row
from fastvq.testing.measure import peak_extra_memory

_REPEATS = 25
# Rotated batches take at most this much memory.
_BATCH_BYTES = 4 << 30
# Of Gaussian tokens a few in a hundred are; an error bound that has come out infinite leaves all.
_MOST_OPEN = 0.5
# Timed in float32, in which they compute.
_SLOW_CONTENDERS = ("cdist", "seed formula")
_EVERY = {**CONTENDERS, **SPECIAL}
RIVALS: dict[str, Prepare] = {"fastvq": ours.search_kernels} | {
    name: prepare
    for name in ("fastvq packed", "product", "flash-kmeans", "cdist", "seed formula")
    if (prepare := _EVERY[name].search) is not None
}


def device_stage(stage: Stage) -> None:
    """The two ceilings."""
    for row in ceilings(stage.device, stage.dry):
        stage.add(row)


def timing(stage: Stage) -> None:
    """Sizes of published benchmarks."""
    _time_all(stage, published(stage.quick))


def models(stage: Stage) -> None:
    """Sizes of models."""
    _time_all(stage, list(MODELS[:4] if stage.quick else MODELS))


def _time_all(stage: Stage, problems: list[Problem]) -> None:
    if stage.dry:
        problems = [tiny(problems[0])]
    broken = _compile(stage, problems)
    clock = Clock(stage.device)
    for problem in stage.while_time(problems, lambda problem: f"{problem.name} {problem.describe()['dtype']}"):
        contenders = dict(RIVALS)
        if problem.dtype != torch.float32 and problem.name != PUBLISHED[0].name:
            contenders = {name: make for name, make in contenders.items() if name not in _SLOW_CONTENDERS}
        with stage.guarded(f"{problem.name} {problem.describe()['dtype']}"):
            for row in measure(stage, clock, problem, contenders, broken.get(problem, "")):
                stage.add(row)
        if stage.device.type == "cuda":
            torch.cuda.empty_cache()


class _Warm(NamedTuple):
    problem: Problem
    device: torch.device


def _compile(stage: Stage, problems: list[Problem]) -> dict[Problem, str]:
    """Compile fastvq's kernels for all problems at once; errors by problem, which then is not run in this process."""
    if not stage.workers:
        return {}
    with Workers(stage.workers) as workers:
        outcomes = list(workers.run(warm, [_Warm(problem, stage.device) for problem in problems], stage.deadline))
    return {outcome.task.problem: outcome.error for outcome in outcomes if not outcome.error.startswith("cut")}


def warm(task: _Warm) -> None:
    """One search of the kind, with fewer tokens: their number is no part of what is compiled."""
    problem = task.problem
    smaller = replace(problem, tokens=min(problem.tokens, 65_536))
    (x,), codebook = make_inputs(smaller, task.device)
    ours.search_kernels(smaller, [x], codebook).call(0)
    if task.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure(
    stage: Stage, clock: Clock, problem: Problem, contenders: Mapping[str, Prepare], broken: str = ""
) -> list[Row]:
    """Time all contenders of one problem in turns.

    Args:
        stage: device, deadline and mode.
        clock: of the device.
        problem: what is searched.
        contenders: preparations by name; one that raises becomes a row that says so.
        broken: why fastvq cannot run, if so.

    Returns:
        One row per contender; ``status`` is ``"ok"`` or what :func:`bench.harness.outcome.failure` says, with ``note``.
    """
    buffers = 2 if stage.dry else max(2, min(4, _BATCH_BYTES // (problem.heads * problem.tokens * problem.dim * 4)))
    batches, codebook = make_inputs(problem, stage.device, buffers)
    rows: dict[str, Row] = {}
    ready: dict[str, Prepared] = {}
    expected: Tensor | None = None
    for name, prepare in contenders.items():
        row = rows[name] = {**problem.describe(), "contender": name, "status": "ok", "note": "", "seconds": None}
        if broken and name.startswith("fastvq"):
            row |= {"status": "failed", "note": broken}
            continue
        try:
            contender = prepare(problem, batches, codebook)
            result = contender.call(0)
            row["note"] = contender.note
            if contender.indices is not None:
                found = contender.indices(result)
                expected = found if name == "fastvq" else expected
                row["differs"] = None if expected is None else int((found != expected).sum())
                if name.startswith("fastvq"):
                    row |= {"passed": row["differs"] == 0, "result": f"{row['differs']} indices differ"}
            if name == "fastvq packed" and isinstance(result, tuple):
                row["open_share"] = share = int(result[1].sum()) / (problem.heads * problem.tokens)
                if share > _MOST_OPEN:  # indices are right all the same, at the speed of float64
                    row |= {"passed": False, "result": f"the first scan leaves {share:.0%} of the tokens open"}
            del result
            row["peak_extra_bytes"] = peak_extra_memory(lambda call=contender.call: call(1), stage.device)  # type: ignore[misc]
            ready[name] = contender
        except Exception as error:  # whatever another library raises belongs into the table
            row |= failure(error)
    _fill(stage, clock, problem, rows, ready)
    return list(rows.values())


def _fill(stage: Stage, clock: Clock, problem: Problem, rows: dict[str, Row], ready: dict[str, Prepared]) -> None:
    """Times, rates and ratios of the contenders that run; the stages of fastvq; clocks."""
    calls = {name: contender.call for name, contender in ready.items()}
    before = clocks(stage.device)
    timings = clock.interleaved(calls, 2 if stage.dry else _REPEATS, stage.deadline)
    for name, error in clock.errors.items():
        rows[name] |= error
    for name, timed in timings.items():
        rates = {"tflops": problem.flop / timed.median / 1e12, "tera_pairs": problem.pairs / timed.median / 1e12}
        rows[name] |= {**seconds_row(timed), **rates}
        for other in ("product", "flash-kmeans"):
            if other in timings:
                rows[name][f"times_{other}"] = timed.median / timings[other].median
    fastvq = calls.get("fastvq")
    if fastvq is None or "fastvq" not in timings:
        return
    calls_for_clocks = max(1, min(200, int(0.2 / timings["fastvq"].median)))
    under_load = clocks(stage.device, lambda: fastvq(0), 1 if stage.dry else calls_for_clocks)
    rows["fastvq"] |= {"clocks_before": before, "clocks": under_load}
    try:
        rows["fastvq"]["stages"] = stage_seconds(lambda: fastvq(0), 1 if stage.dry else 5, stage.device)
    except Exception as error:  # the profiler is no part of the measurement
        stage.note(f"{problem.name}: no times of the stages: {describe(error)}")
