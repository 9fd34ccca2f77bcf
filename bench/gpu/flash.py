"""flash-kmeans at its best: its tuning grid of launch configurations, tried for every published size."""

from functools import partial
from itertools import product

import torch

from bench.contenders import flash_kmeans
from bench.gpu.problems import PUBLISHED, tiny
from bench.gpu.rows import RIVALS, measure
from bench.gpu.stage import Stage
from bench.harness.problems import Problem, make_inputs

_BEST = "flash-kmeans best"


def flash(stage: Stage) -> None:
    """At each published size flash-kmeans at its best configuration and as shipped, in turns with fastvq."""
    for problem in stage.while_time([tiny(PUBLISHED[0])] if stage.dry else PUBLISHED, lambda problem: problem.name):
        with stage.guarded(problem.name):
            best, note = _best(stage, problem)
            if best is None:
                stage.add({**problem.describe(), "contender": _BEST, "status": "failed", "note": note})
                continue
            rivals = {name: RIVALS[name] for name in ("fastvq", "fastvq packed", "flash-kmeans")}
            rivals[_BEST] = partial(flash_kmeans.search, config=best)
            *others, row = measure(stage, problem, rivals)
            stage.add(*others, {**row, "note": f"{best}; {note}"})


def _best(stage: Stage, problem: Problem) -> tuple[dict[str, int] | None, str]:
    """The fastest configuration, or None, and a note."""
    configs = {str(config): config for config in flash_configs(problem.dim)[: 1 if stage.dry else None]}
    tasks = {name: partial(run_flash, problem, config, stage.device) for name, config in configs.items()}
    outcomes = list(stage.outcomes(tasks))
    good = [outcome.key for outcome in outcomes if not outcome.error]
    if not good:
        return None, outcomes[0].error
    batches, codebook = make_inputs(problem, stage.device, 2)
    calls = {name: flash_kmeans.search(problem, batches, codebook, configs[name]).call for name in good}
    timings = stage.clock.interleaved(calls, 3)
    if not timings:
        return None, str(stage.clock.errors)[:500]
    best = min(timings, key=lambda name: timings[name].median)
    return configs[best], f"best of {len(good)} configurations, {len(tasks) - len(good)} did not run"


def flash_configs(dim: int) -> list[dict[str, int]]:
    """flash-kmeans' own tuning grid from tiles of 64 by 64, as far as it fits into shared memory."""
    return [
        {"BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for n, k, warps, stages in product((128, 64), (128, 64), (4, 8), (1, 2, 4))
        if 2 * dim * (n + stages * k) < 230_000
    ]


def run_flash(problem: Problem, config: dict[str, int], device: torch.device) -> None:
    """Compile and run flash-kmeans once, with all tokens: it compiles their number in."""
    flash_kmeans.search(problem, *make_inputs(problem, device), config).call(0)
