"""Are the indices right on this device? Equality with the float64 oracle and with other ways to run the search."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

import fastvq
from bench.gpu.problems import MODELS, PUBLISHED, tiny
from bench.gpu.stage import Stage
from bench.gpu.sweep import packed_search, variations
from bench.harness.problems import Problem, make_inputs
from bench.harness.store import Row
from fastvq.testing.cases import adversarial_cases
from fastvq.testing.judge import judge_all
from fastvq.testing.measure import synchronize
from fastvq_kernels.configs import packed_width

# Terms x_j, e_kj that the oracle evaluates per problem: about a second on one core.
_ORACLE_TERMS = 5 * 10**8
# Not a multiple of any tile.
_MOST_TOKENS = 200_003
_CASES_PER_TASK = 4


def smoke(stage: Stage) -> None:
    """The first search on this device: its kernels compile, run, and are right."""
    problem = Problem("first search", 12 if stage.dry else 300, 500, 64)
    for name in ("first search", "second search"):
        stage.add(*judge_sample(replace(problem, name=name), "gaussian", stage.device, 0))


def exactness(stage: Stage) -> None:
    """Adversarial cases of ``fastvq verify``, then the timed sizes with a sample of tokens for the oracle."""
    n_cases = sum(1 for _ in adversarial_cases())
    places = range(0, n_cases, 40) if stage.dry else range(n_cases)
    # Neighbours often share a width. Spread over tasks, they let other processes compile other widths.
    n_tasks = max(1, len(places) // _CASES_PER_TASK)
    cases = [("cases " + ", ".join(map(str, places[i::n_tasks])), places[i::n_tasks]) for i in range(n_tasks)]
    tasks = {name: partial(judge_cases, taken, stage.device) for name, taken in cases}
    samples = {
        f"{problem.name} {problem.size} {kind}": partial(judge_sample, problem, kind, stage.device, n_configs)
        for problem, kind, n_configs in _samples(stage)
    }
    for outcome in stage.outcomes(dict([*list(samples.items())[:2], *tasks.items(), *samples.items()])):
        stage.add(*(outcome.result or []))
        if outcome.error.startswith("cut"):
            stage.note(f"{outcome.error}: {outcome.key}")
        elif outcome.error:
            stage.add({"name": outcome.key, "passed": False, "result": outcome.error})


def _samples(stage: Stage) -> Iterator[tuple[Problem, str, int]]:
    """Problems, kinds of data, and how many other launch configurations must give the same indices."""
    if stage.dry:
        yield tiny(replace(MODELS[0], name="heads", heads=2)), "near", 1
        return
    problems = [PUBLISHED[0], *MODELS, *PUBLISHED[1:]]
    for i, problem in enumerate(problems[:6] if stage.quick else problems):
        smaller = replace(problem, tokens=min(problem.tokens, _MOST_TOKENS))
        yield smaller, ("gaussian", "offset", "near")[i % 3], 2 if i % 3 == 0 else 0
    for metric, dtype in (("dot", torch.float16), ("cosine", torch.bfloat16), ("euclidean", torch.bfloat16)):
        yield Problem(f"heads, {metric}", 3001, 1000, 32, heads=3, metric=metric, dtype=dtype), "offset", 1
    yield PUBLISHED[2], "gaussian", 0


def judge_cases(places: Sequence[int], device: torch.device) -> list[Row]:
    """Rows of the adversarial cases at these places of their sequence."""
    rows = judge_all((case for i, case in enumerate(adversarial_cases()) if i in places), device)
    return [{"name": f"{row.case}, {row.backend}", **asdict(row)} for row in rows]


@torch.no_grad()
def judge_sample(problem: Problem, kind: str, device: torch.device, n_configs: int) -> list[Row]:
    """Indices of a sample against the oracle, and all indices against other batch splits and configurations."""
    (x,), codebook = make_inputs(problem, device, kind=kind, seed=7)
    start = time.perf_counter()
    found = _search(x, codebook, problem.metric)
    synchronize(device)
    seconds = time.perf_counter() - start
    differing = {name: int((other != found).sum()) for name, other in _other_ways(problem, x, codebook, n_configs)}
    n = max(16, min(512, _ORACLE_TERMS // codebook.numel()))
    sample = torch.linspace(0, problem.tokens - 1, min(n, problem.tokens)).long()
    expected = _oracle(x[..., sample.to(device), :], codebook, problem.metric)
    wrong = int((found.cpu()[..., sample] != expected).sum())
    unequal = [f"; {name}: {count} differ" for name, count in differing.items() if count]
    result = f"{wrong} wrong of {expected.numel()} in {seconds:.2f} s" + "".join(unequal)
    verdict = {"passed": wrong == 0 and not unequal, "result": result, "checks": ["oracle", *differing]}
    return [{**problem.describe(), "name": f"{problem.name}, {kind}", **verdict, "seconds": seconds}]


def _search(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return fastvq.nearest_code(x, codebook, metric=metric, backend="triton")


def _oracle(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return fastvq.nearest_code(x.cpu(), codebook.cpu(), metric=metric, backend="reference")


def _other_ways(problem: Problem, x: Tensor, codebook: Tensor, n_configs: int) -> Iterator[tuple[str, Tensor]]:
    """The same search in slices of the batch and with other launch configurations."""
    if problem.tokens > 3:
        sizes = [1, problem.tokens // 3, problem.tokens - 1 - problem.tokens // 3]
        slices = [_search(rows, codebook, problem.metric) for rows in x.split(sizes, dim=-2)]
        yield "batch splits", torch.cat(slices, -1)
    for config in variations(packed_width(problem.dim))[1 : 1 + n_configs]:
        with suppress(OutOfResources):  # not every variation fits the chip; the sweep says which
            yield f"{config}", packed_search(problem, codebook, config)(x)[0].view(x.shape[:-1])


def sanitize(device: torch.device) -> bool:
    """A few tiny searches that reach every kernel and branch, for ``compute-sanitizer``; whether all were right."""
    problems = [
        *(Problem("dim", 37, 70, dim) for dim in (3, 8, 64, 100, 192, 256, 512, 1024)),
        *(Problem("metric", 37, 70, 16, heads, metric) for metric in ("cosine", "dot") for heads in (1, 2)),
        Problem("split over codes", 5, 4096, 16),
        Problem("several token tiles", 600, 130, 16, heads=2),
    ]
    right = True
    for problem in problems:
        (x,), codebook = make_inputs(problem, torch.device("cpu"))
        x[..., 3, 0] = torch.nan
        codebook[..., 5, -1] = torch.inf
        codebook[..., 40:44, :] = codebook[..., 10:14, :]  # ties
        found = _search(x.to(device), codebook.to(device), problem.metric).cpu()
        wrong = int((found != _oracle(x, codebook, problem.metric)).sum())
        right &= wrong == 0
        print(f"{problem.size} {problem.metric}: {wrong} wrong", flush=True)
    return right
