"""Times of whole searches: fastvq beside the matrix product, flash-kmeans, cdist and the expanded formula."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.contenders import CONTENDERS, SPECIAL, ours
from bench.contenders.base import Prepare, Prepared
from bench.gpu.device import clocks
from bench.gpu.kernels import stage_seconds
from bench.gpu.problems import PUBLISHED, tiny
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


def time_searches(stage: Stage, problems: Sequence[Problem]) -> None:
    """Compile for all problems, then time the contenders of each problem in turns."""
    if stage.dry:
        problems = [tiny(problems[0])]
    # A kernel that fails in a process of its own is not run in this one.
    outcomes = list(stage.outcomes({problem: partial(warm, problem, stage.device) for problem in problems}))
    broken = {outcome.key: outcome.error for outcome in outcomes if not outcome.error.startswith("cut")}
    stage.workers.end()
    for problem in stage.while_time(problems, _label):
        every = problem.dtype == torch.float32 or problem.name == PUBLISHED[0].name
        contenders = {name: make for name, make in RIVALS.items() if every or name not in _SLOW_CONTENDERS}
        with stage.guarded(_label(problem)):
            stage.add(*measure(stage, problem, contenders, broken.get(problem, "")))
        torch.cuda.empty_cache()


def _label(problem: Problem) -> str:
    return f"{problem.name} {dtype_name(problem.dtype)}"


def warm(problem: Problem, device: torch.device) -> None:
    """One search with fewer tokens: kernels do not depend on their number."""
    smaller = replace(problem, tokens=min(problem.tokens, 65_536))
    (x,), codebook = make_inputs(smaller, device)
    ours.search_kernels(smaller, [x], codebook).call(0)


def measure(stage: Stage, problem: Problem, contenders: Mapping[str, Prepare], broken: str = "") -> list[Row]:
    """Time contenders in turns on one problem, a row for each; ``broken`` says why fastvq cannot run, if so."""
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
