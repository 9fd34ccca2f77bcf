"""Are the indices right on this device? Equality with the float64 oracle and with other ways to run the search."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvq
from bench.contenders.base import with_heads
from bench.gpu.problems import MODELS, PUBLISHED, tiny
from bench.gpu.stage import Row, Stage
from bench.gpu.sweep import variations
from bench.gpu.workers import Workers
from bench.harness.problems import Problem, make_inputs
from fastvq.testing.cases import adversarial_cases
from fastvq.testing.judge import judge_all

# Terms x_j, e_kj that the oracle evaluates per problem: about a second on one core.
_ORACLE_TERMS = 5 * 10**8
# Not a multiple of any tile.
_MOST_TOKENS = 200_003
_CASES_PER_TASK = 4


class _Cases(NamedTuple):
    """Adversarial cases by their place in the sequence, judged on one device."""

    places: tuple[int, ...]
    device: torch.device


class _Sampled(NamedTuple):
    """A problem of which some tokens are judged by the oracle."""

    problem: Problem
    kind: str
    device: torch.device
    configs: int  # so many other launch configurations must give the same indices


def smoke(stage: Stage) -> None:
    """The first search on this device: its kernels compile, run, and are right."""
    device = stage.device
    x, codebook = torch.randn(300, 64, device=device), torch.randn(500, 64, device=device)
    for call in ("first", "second"):
        start = time.perf_counter()
        found = fastvq.nearest_code(x[:12] if stage.dry else x, codebook, backend="triton").cpu()
        seconds = time.perf_counter() - start
        expected = fastvq.reference.nearest_code(x.cpu(), codebook.cpu())[: len(found)]
        wrong = int((found != expected).sum())
        stage.add({"name": f"{call} search, 300×500×64", "seconds": seconds, "wrong": wrong, "passed": wrong == 0})


def exactness(stage: Stage) -> None:
    """Adversarial cases of ``fastvq verify``, then the timed sizes with a sample of tokens for the oracle."""
    n_cases = sum(1 for _ in adversarial_cases())
    places = range(0, n_cases, 40) if stage.dry else range(n_cases)
    # Neighbours are spread: they often share a width, which one process then compiles while others do other widths.
    n_tasks = max(1, len(places) // _CASES_PER_TASK)
    tasks: list[Any] = [_Cases(tuple(places[i::n_tasks]), stage.device) for i in range(n_tasks)]
    sampled = list(_sampled(stage))
    with Workers(stage.workers) as workers:
        for outcome in workers.run(_judge, [*sampled[:2], *tasks, *sampled[2:]], stage.deadline):
            for row in outcome.result or []:
                stage.add(row)
            if outcome.error.startswith("cut"):
                stage.document["status"] = "cut"
                stage.note(f"{outcome.error}: {_label(outcome.task)}")
            elif outcome.error:
                stage.add({"name": _label(outcome.task), "passed": False, "result": outcome.error})


def _label(task: Any) -> str:
    if isinstance(task, _Cases):
        return f"cases {', '.join(map(str, task.places))}"
    return f"{task.problem.name} {task.problem.size} {task.kind}"


def _sampled(stage: Stage) -> Iterator[_Sampled]:
    kinds = ("gaussian", "offset", "near")
    if stage.dry:
        yield _Sampled(tiny(replace(MODELS[0], name="heads", heads=2)), "near", stage.device, 1)
        return
    problems = [PUBLISHED[0], *MODELS, *PUBLISHED[1:]]
    for i, problem in enumerate(problems[:6] if stage.quick else problems):
        tokens = min(problem.tokens, _MOST_TOKENS)
        yield _Sampled(replace(problem, tokens=tokens), kinds[i % 3], stage.device, 2 if i % 3 == 0 else 0)
    for metric, dtype in (("dot", torch.float16), ("cosine", torch.bfloat16), ("euclidean", torch.bfloat16)):
        problem = Problem(f"heads, {metric}", 3001, 1000, 32, heads=3, metric=metric, dtype=dtype)
        yield _Sampled(problem, "offset", stage.device, 1)
    yield _Sampled(PUBLISHED[2], "gaussian", stage.device, 0)


def _judge(task: _Cases | _Sampled) -> list[Row]:
    if isinstance(task, _Sampled):
        return [_judge_sampled(task)]
    wanted = (case for i, case in enumerate(adversarial_cases()) if i in task.places)
    rows = [asdict(row) for row in judge_all(wanted, task.device)]
    return [{"name": f"{row['case']}, {row['backend']}", **row} for row in rows]


@torch.no_grad()
def _judge_sampled(task: _Sampled) -> Row:
    """Indices of a sample against the oracle, and all indices against other batch splits and configurations."""
    start = time.perf_counter()
    problem, metric = task.problem, task.problem.metric
    (x,), codebook = make_inputs(problem, task.device, kind=task.kind, seed=7)
    found = fastvq.nearest_code(x, codebook, metric=metric, backend="triton")
    differing = {name: int((other != found).sum()) for name, other in _other_ways(task, x, codebook)}
    n = max(16, min(512, _ORACLE_TERMS // (codebook.numel())))
    some = torch.linspace(0, problem.tokens - 1, min(n, problem.tokens)).long()
    sample = x[..., some.to(x.device), :].cpu()
    expected = fastvq.nearest_code(sample, codebook.cpu(), metric=metric, backend="reference")
    wrong = int((found.cpu()[..., some] != expected).sum())
    unequal = {name: count for name, count in differing.items() if count}
    result = f"{wrong} wrong of {expected.numel()}" + "".join(f"; {name}: {n} differ" for name, n in unequal.items())
    if task.device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        **problem.describe(),
        "name": f"{problem.name}, {task.kind}",
        "passed": wrong == 0 and not unequal,
        "result": result,
        "checks": ["oracle", *differing],
        "seconds": time.perf_counter() - start,
    }


def _other_ways(task: _Sampled, x: Tensor, codebook: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same search in parts of the batch and with other launch configurations."""
    from triton.runtime.errors import OutOfResources

    from fastvq_kernels.configs import packed_width
    from fastvq_kernels.search.pack_codes import pack_codebook
    from fastvq_kernels.search.pipeline import certified_search

    problem = task.problem
    if problem.tokens > 3:
        cuts = [1, problem.tokens // 3, problem.tokens - 1 - problem.tokens // 3]
        parts = [
            fastvq.nearest_code(part, codebook, metric=problem.metric, backend="triton")
            for part in x.split(cuts, dim=-2)
            if part.shape[-2]
        ]
        yield "batch splits", torch.cat(parts, -1)
    for config in variations(packed_width(problem.dim))[1 : 1 + task.configs]:
        packed = pack_codebook(codebook, problem.metric, config)
        try:
            found = certified_search(with_heads(x), packed)[0]
        except OutOfResources:  # not every variation fits the chip; the sweep says which
            continue
        yield f"{config}", found.view(x.shape[:-1])


def sanitize(device: torch.device) -> bool:
    """A few tiny searches that reach every kernel and branch, for ``compute-sanitizer``; whether all were right."""
    searches = [
        *((37, 70, dim, "euclidean", 1) for dim in (3, 8, 64, 100, 192, 256, 512, 1024)),
        *((37, 70, 16, metric, heads) for metric in ("cosine", "dot") for heads in (1, 2)),
        (5, 4096, 16, "euclidean", 1),  # few tokens, many codes: split over codes
        (600, 130, 16, "euclidean", 2),  # several token tiles
    ]
    right = True
    for tokens, codes, dim, metric, heads in searches:
        problem = Problem("sanitize", tokens, codes, dim, heads=heads, metric=metric)
        (x,), codebook = make_inputs(problem, torch.device("cpu"))
        x[..., 3, 0] = torch.nan
        codebook[..., 5, -1] = torch.inf
        codebook[..., 40:44, :] = codebook[..., 10:14, :]  # ties: left for the last stage
        found = fastvq.nearest_code(x.to(device), codebook.to(device), metric=metric, backend="triton").cpu()
        wrong = int((found != fastvq.nearest_code(x, codebook, metric=metric, backend="reference")).sum())
        right &= wrong == 0
        print(f"{problem.size} {metric}: {wrong} wrong", flush=True)
    return right
