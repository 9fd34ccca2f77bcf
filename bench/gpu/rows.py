"""Stages that time whole searches: fastvq beside the matrix product, flash-kmeans, cdist and the formula in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.contenders import CONTENDERS, SPECIAL, ours
from bench.contenders.base import Prepare, Prepared
from bench.gpu.device import ceilings, clocks
from bench.gpu.kernels import stage_seconds
from bench.gpu.problems import MODELS, PUBLISHED, published, tiny
from bench.gpu.stage import Stage
from bench.harness.outcome import describe
from bench.harness.problems import Problem, dtype_name, make_inputs
from bench.harness.store import Row
from bench.harness.timed import BATCH_BYTES, fill_times, first_calls
from fastvq.testing.measure import peak_extra_memory

_REPEATS = 25
# Of Gaussian tokens a few in a hundred are; an error bound that has come out infinite leaves all.
_MOST_OPEN = 0.5
# Timed in float32, in which they compute.
_SLOW_CONTENDERS = ("cdist", "expanded formula")
_COMPARED = {"product", "flash-kmeans", "flash-kmeans best"}
_EVERY = {**CONTENDERS, **SPECIAL}
RIVALS: dict[str, Prepare] = {"fastvq": ours.search_kernels} | {
    name: prepare
    for name in ("fastvq packed", "product", "flash-kmeans", "cdist", "expanded formula")
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
    for problem in stage.while_time(problems, _label):
        contenders = dict(RIVALS)
        if problem.dtype != torch.float32 and problem.name != PUBLISHED[0].name:
            contenders = {name: make for name, make in contenders.items() if name not in _SLOW_CONTENDERS}
        with stage.guarded(_label(problem)):
            for row in measure(stage, problem, contenders, broken.get(problem, "")):
                stage.add(row)
        torch.cuda.empty_cache()


def _label(problem: Problem) -> str:
    return f"{problem.name} {dtype_name(problem.dtype)}"


def _compile(stage: Stage, problems: list[Problem]) -> dict[Problem, str]:
    """Compile fastvq's kernels for all problems at once; errors by problem, which this process then does not run."""
    outcomes = list(stage.outcomes({problem: partial(warm, problem, stage.device) for problem in problems}))
    stage.workers.end()
    return {outcome.key: outcome.error for outcome in outcomes if not outcome.error.startswith("cut")}


def warm(problem: Problem, device: torch.device) -> None:
    """One search with fewer tokens: kernels do not depend on their number."""
    smaller = replace(problem, tokens=min(problem.tokens, 65_536))
    (x,), codebook = make_inputs(smaller, device)
    ours.search_kernels(smaller, [x], codebook).call(0)


def measure(stage: Stage, problem: Problem, contenders: Mapping[str, Prepare], broken: str = "") -> list[Row]:
    """Time contenders in turns on one problem; fastvq cannot run if ``broken`` says why.

    Returns:
        One row per contender; ``status`` is ``"ok"`` or that of :func:`bench.harness.outcome.failure`, with ``note``.
    """
    buffers = 2 if stage.dry else max(2, min(4, BATCH_BYTES // (problem.heads * problem.tokens * problem.dim * 4)))
    batches, codebook = make_inputs(problem, stage.device, buffers)
    expected: list[Tensor] = []

    def make(row: Row) -> Prepared:
        if broken and row["contender"].startswith("fastvq"):
            raise RuntimeError(broken)
        return contenders[row["contender"]](problem, batches, codebook)

    def check(row: Row, prepared: Prepared, result: Any) -> None:
        name = row["contender"]
        if prepared.indices is not None:
            found = prepared.indices(result)
            if name == "fastvq":
                expected.append(found)
            row["differs"] = int((found != expected[0]).sum()) if expected else None
            if name.startswith("fastvq"):
                row |= {"passed": row["differs"] == 0, "result": f"{row['differs']} indices differ"}
        if name == "fastvq packed" and isinstance(result, tuple):
            row["open_share"] = share = int(result[1].sum()) / (problem.heads * problem.tokens)
            if share > _MOST_OPEN:  # indices are right all the same, at the speed of float64
                row |= {"passed": False, "result": f"the first scan leaves {share:.0%} of the tokens open"}
        del result
        row["peak_extra_bytes"] = peak_extra_memory(lambda: prepared.call(1), stage.device)

    rows: list[Row] = [{**problem.describe(), "contender": name, "seconds": None} for name in contenders]
    calls = first_calls(rows, make, check)
    before = clocks(stage.device)
    timings = fill_times(rows, calls, stage.clock, 2 if stage.dry else _REPEATS, stage.deadline)
    for row in rows:
        if timed := timings.get(row["contender"]):
            row["tflops"], row["tera_pairs"] = (n / timed.median / 1e12 for n in (problem.flop, problem.pairs))
            for other in _COMPARED & set(timings):
                row[f"times_{other}"] = timed.median / timings[other].median
            if row["contender"] == "fastvq":
                row |= _under_load(stage, lambda: calls["fastvq"](0), timed.median, problem.name)
                row["clocks_before"] = before
    return rows


def _under_load(stage: Stage, search: Callable[[], object], seconds: float, name: str) -> Row:
    """Clocks of the device while it searches, and the seconds of each stage of the search."""
    found: Row = {"clocks": clocks(stage.device, search, 1 if stage.dry else max(1, min(200, int(0.2 / seconds))))}
    try:
        found["stages"] = stage_seconds(search, 1 if stage.dry else 5, stage.device)
    except Exception as error:  # the profiler is no part of the measurement
        stage.note(f"{name}: no times of the stages: {describe(error)}")
    return found
