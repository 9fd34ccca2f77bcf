"""flash-kmeans at its best: the launch configurations of its tuning grid, tried for every published size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.contenders import flash_kmeans
from bench.contenders.base import Prepare, Prepared
from bench.gpu.problems import PUBLISHED, tiny
from bench.gpu.rows import RIVALS, measure
from bench.gpu.stage import Stage
from bench.gpu.workers import Workers
from bench.harness.problems import Problem, make_inputs
from fastvq.testing.measure import Clock


def flash(stage: Stage) -> None:
    """Each published size at flash-kmeans' best configuration, in turns with fastvq and with it as shipped."""
    problems = [tiny(PUBLISHED[0])] if stage.dry else list(PUBLISHED)
    clock = Clock(stage.device)
    with Workers(stage.workers) as workers:
        for problem in stage.while_time(problems, lambda problem: problem.name):
            with stage.guarded(problem.name):
                _time_flash(stage, workers, clock, problem)


def _time_flash(stage: Stage, workers: Workers, clock: Clock, problem: Problem) -> None:
    best, note = _best_flash(stage, workers, clock, problem)
    if best is None:
        stage.add({**problem.describe(), "contender": "flash-kmeans best", "status": "failed", "note": note})
        return

    def prepare_best(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
        return flash_kmeans.search(problem, batches, codebook, best)

    rivals: dict[str, Prepare] = {
        **{name: RIVALS[name] for name in ("fastvq", "fastvq packed", "flash-kmeans")},
        "flash-kmeans best": prepare_best,
    }
    for row in measure(stage, clock, problem, rivals):
        stage.add({**row, "note": f"{best}; {note}"} if row["contender"] == "flash-kmeans best" else row)


class _FlashTask(NamedTuple):
    problem: Problem
    config: tuple[tuple[str, int], ...]
    device: torch.device


def flash_configs(dim: int) -> list[dict[str, int]]:
    """What flash-kmeans' own tuning grid has of tiles of at least 64 by 64, without those beyond shared memory."""
    grid = [
        {"BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for n in (128, 64)
        for k in (128, 64)
        for warps in (4, 8)
        for stages in (1, 2, 4)
    ]
    return [
        config for config in grid if 2 * dim * (config["BLOCK_N"] + config["num_stages"] * config["BLOCK_K"]) < 230_000
    ]


def run_flash(task: _FlashTask) -> None:
    """Compile and run flash-kmeans once; its number of tokens is compiled in, so all of them are there."""
    (x,), codebook = make_inputs(task.problem, task.device)
    flash_kmeans.search(task.problem, [x], codebook, dict(task.config)).call(0)
    torch.cuda.synchronize()
    del x
    torch.cuda.empty_cache()


def _best_flash(stage: Stage, workers: Workers, clock: Clock, problem: Problem) -> tuple[dict[str, int] | None, str]:
    tasks = [_FlashTask(problem, tuple(config.items()), stage.device) for config in flash_configs(problem.dim)]
    outcomes = list(workers.run(run_flash, tasks[:1] if stage.dry else tasks, stage.deadline))
    good = [dict(outcome.task.config) for outcome in outcomes if not outcome.error]
    if not good:
        return None, outcomes[0].error
    batches, codebook = make_inputs(problem, stage.device, 2)
    calls = {str(config): flash_kmeans.search(problem, batches, codebook, config).call for config in good}
    timings = clock.interleaved(calls, 3)
    if not timings:
        return None, str(clock.errors)[:500]
    best = min((config for config in good if str(config) in timings), key=lambda config: timings[str(config)].median)
    return best, f"best of {len(good)} configurations, {len(tasks) - len(good)} did not run"
