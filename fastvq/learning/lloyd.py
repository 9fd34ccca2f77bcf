"""Lloyd's iterations over the tokens of all ranks, from seeds to codes that no longer move."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.backends.operators import backend_for
from fastvq.common import distributed
from fastvq.common.devices import float64_device
from fastvq.common.directions import directions_or
from fastvq.learning.assignment import Assignment, Tokens
from fastvq.learning.batches import TokenBatches
from fastvq.learning.greedy import pick_codes

# Rounds that draw candidates with odds of their squared distance, after one that draws evenly.
_ROUNDS = 2
# Candidates of a round where there are fewer codes: a few codes need a choice, too.
_LEAST_CANDIDATES = 64
Report = Callable[[int, float], None]


def no_report(iteration: int, inertia: float) -> None:
    """Shows nothing."""


class Clusters(NamedTuple):
    """Codes ``[K, D]`` in the dtype of the tokens, with what belongs to them, and how often codes moved."""

    codes: Tensor
    found: Assignment
    iterations: int


@torch.no_grad()
def cluster(
    batches: TokenBatches,
    n_codes: int,
    max_iterations: int,
    metric: str,
    backend: str,
    sync: bool,
    *,
    init: str | Tensor = "k-means++",
    weights: Tensor | None = None,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
    report: Report = no_report,
) -> Clusters | None:
    """:func:`fastvq.kmeans` of flattened ``batches``; None where no rank has a token of positive weight.

    ``init`` may hold the start ``[K, D]``; ``weights [n]`` float64 belong to the only batch.
    """
    first = next(tokens for tokens, _ in batches)
    device = float64_device(first.device)
    tokens = Tokens(batches, weights, backend_for(first.to(device), backend), device, sync)
    drawn = torch.randint(2**62, (1,), generator=generator, device="cpu").to(device)
    seed = int(distributed.broadcast_from_rank_0(drawn, sync))
    own = torch.Generator(device).manual_seed(seed + 1 + distributed.rank(sync))
    together = torch.Generator(device).manual_seed(seed)

    n = max(n_codes, _LEAST_CANDIDATES) if init == "k-means++" else n_codes
    seeds = tokens.draw(n, own)
    if len(seeds) == 0:
        return None
    if init == "k-means++":
        seeds = pick_codes(*tokens.spread(seeds, n, _ROUNDS, own), n_codes, together)
    elif isinstance(init, Tensor):
        seeds = init.to(device)
    # Fewer distinct tokens than codes: the codes repeat.
    seeds = seeds[torch.arange(n_codes, device=device) % len(seeds)]
    seeds = distributed.broadcast_from_rank_0(seeds, sync)
    codes, found, iterations = _iterate(tokens, seeds, max_iterations, metric, tolerance, own, report)
    labels = [of_batch.to(first.device) for of_batch in found.labels]
    found = found._replace(labels=labels, counts=found.counts.to(first.device))
    return Clusters(codes.to(first.device), found, iterations)


def _iterate(
    tokens: Tokens,
    codes: Tensor,
    max_iterations: int,
    metric: str,
    tolerance: float,
    generator: torch.Generator,
    report: Report,
) -> Clusters:
    best = Clusters(codes, tokens.assign(codes), 0)
    found, had_converged = best.found, False
    report(0, found.inertia)
    for iteration in range(1, max_iterations + 1):
        codes, previous = _moved(codes, found, metric), found.inertia
        if (found.mass == 0).any():
            empty = (found.mass == 0).nonzero()[:, 0]
            rows = tokens.draw_far(len(empty), codes, generator)
            codes[empty[: len(rows)]] = rows
        found = tokens.assign(codes)
        report(iteration, found.inertia)
        # Rounded directions are not quite the best ones: the inertia may rise by a rounding.
        is_best = found.inertia < best.found.inertia
        best = Clusters(codes, found, iteration) if is_best else best._replace(iterations=iteration)
        has_converged = found.inertia >= (1 - tolerance) * previous
        # Restarts may go on for ever: rounded directions leave distances to restart from.
        if has_converged and (had_converged or not (found.mass == 0).any()):
            break
        had_converged = has_converged
    return best


def _moved(codes: Tensor, found: Assignment, metric: str) -> Tensor:
    """Codes at the means of their tokens, rounded once; where there is no mean, where they are."""
    means = codes.double() + found.pulls / found.mass[:, None]
    if metric == "cosine":
        means = directions_or(means, codes.double())
    return torch.where(torch.isfinite(means).all(1, keepdim=True), means, codes).to(codes.dtype)
