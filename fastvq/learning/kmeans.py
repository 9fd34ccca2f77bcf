"""k-means over a fixed set of tokens, on the exact search."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.backends.operators import backend_for
from fastvq.common import distributed
from fastvq.common.checks import check_choice, check_count, check_floating, check_mask
from fastvq.common.devices import float64_device
from fastvq.common.directions import directions_or
from fastvq.functional import search_codes
from fastvq.learning.batches import Batches, Moved, TokenBatches, flatten
from fastvq.learning.seeding import draw_rows, pick_codes

# Rounds that draw candidates with odds of their squared distance, after one that draws evenly.
_ROUNDS = 2
_Report = Callable[[int, float], None]


def _no_report(iteration: int, inertia: float) -> None:
    """Shows nothing."""


class KMeans(NamedTuple):
    """Result of :func:`kmeans`.

    ``codes [K, D]`` float32, ``counts [K]`` int64 of the tokens of each code, ``inertia``, the sum of the squared
    distances of tokens and codes, and the number of ``iterations`` that moved the codes.
    """

    codes: Tensor
    counts: Tensor
    inertia: float
    iterations: int


def kmeans(
    x: Tensor | Iterable[Tensor],
    n_codes: int,
    *,
    metric: str = "euclidean",
    mask: Tensor | None = None,
    init: str = "k-means++",
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    sync: bool = True,
    progress: bool = False,
) -> KMeans:
    """K codes that make ``Σ_i min_k |x_i - e_k|²`` small, by Lloyd's iterations, without a ``[tokens, codes]`` matrix.

    An iteration moves every code to the mean of its tokens. A code without tokens restarts from a token, drawn with
    odds of the squared distance to its code. ``metric="cosine"`` clusters ``x / |x|`` (spherical k-means).

    ``init="k-means++"`` is k-means|| of Bahmani et al. 2012 (arXiv 1203.6402). Three rounds draw K candidates each, the
    first evenly, the others with odds of the squared distance to the candidates so far. K of them, weighted by their
    tokens, are picked in at most 256 turns; up to 256 codes that is k-means++ (Arthur and Vassilvitskii 2007).
    ``"random"`` takes K tokens. Every rank of a process group passes its tokens and gets the same codes, bit for bit.

    Args:
        x: tokens ``[..., D]``, floating, or an iterable of batches that can be iterated more than once (a list, a
            DataLoader), at least one on every rank; a batch may be empty. Tokens that are not finite are left out.
        n_codes: K ≥ 1. With fewer distinct tokens the last codes repeat the first.
        metric: ``"euclidean"`` or ``"cosine"``.
        mask: bool ``[...]``, True for a real token, where ``x`` is one tensor. Default: all.
        init: ``"k-means++"`` or ``"random"``.
        max_iterations: the codes move at most this often.
        tolerance: stop when an iteration lowers the inertia by this share or less; 0: when it no longer falls.
        generator: a CPU generator; that of rank 0 decides. Default: PyTorch's own.
        backend: as in :func:`fastvq.nearest_code`.
        sync: cluster the tokens of all ranks.
        progress: show a progress bar; needs rich, which the extra ``cli`` installs.

    Returns:
        :class:`KMeans`; ``counts`` and ``inertia`` belong to the ``codes`` returned.

    Raises:
        TypeError: ``x`` is an iterator, which can be read only once, or holds other things than floating tensors.
        ValueError: there is no finite token, or an argument is out of its range.
        ModuleNotFoundError: ``progress`` without rich.
    """
    check_choice("metric", metric, ("euclidean", "cosine"))
    check_choice("init", init, ("k-means++", "random"))
    check_count("n_codes", n_codes, 1)
    check_count("max_iterations", max_iterations, 0)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")

    def prepare(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        check_floating("x", tokens)
        check_mask(mask, tokens)
        return flatten(tokens, mask, metric)

    with _shown(max_iterations) if progress else nullcontext(_no_report) as report:
        found = cluster(
            Batches(x, mask, prepare), n_codes, max_iterations, metric, backend, sync,
            init=init, tolerance=tolerance, generator=generator, report=report,
        )  # fmt: skip
    if found is None:
        raise ValueError("x must hold at least one finite token, got none on any rank")
    return found


@torch.no_grad()
def cluster(
    batches: TokenBatches,
    n_codes: int,
    max_iterations: int,
    metric: str,
    backend: str,
    sync: bool,
    *,
    init: str = "k-means++",
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
    report: _Report = _no_report,
) -> KMeans | None:
    """:func:`kmeans` of flattened ``batches``; None where no rank has a token."""
    first = next(tokens for tokens, _ in batches)
    device = float64_device(first.device)
    batches, chosen = Moved(batches, device), backend_for(first.to(device), backend)
    drawn = torch.randint(2**62, (1,), generator=generator, device="cpu").to(device)
    seed = int(distributed.broadcast_from_rank_0(drawn, sync))
    together = torch.Generator(device).manual_seed(seed)
    own = torch.Generator(device).manual_seed(seed + 1 + distributed.rank(sync))

    def distances(tokens: Tensor, codes: Tensor, real: Tensor) -> Tensor:
        """Squared distance to the nearest code, 0 for a token that is not real."""
        indices = search_codes(tokens, codes, "euclidean", real, chosen)
        return torch.where(indices < 0, 0, (tokens - codes[indices.clamp(min=0)]).square().sum(1))

    def draw_far(n: int, codes: Tensor) -> Tensor:
        return draw_rows(((tokens, distances(tokens, codes, real)) for tokens, real in batches), n, own, sync)

    def assign(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts ``[K]``, sums ``[K, D]`` and inertia of all ranks' tokens, float64."""
        counts, sums, inertia = (codes.new_zeros(s, dtype=torch.float64) for s in ((len(codes),), codes.shape, (1,)))
        for tokens, real in batches:
            indices = search_codes(tokens, codes, "euclidean", real, chosen)
            batch_counts, batch_sums = chosen.code_statistics(tokens, indices, len(codes), None)
            counts += batch_counts
            sums += batch_sums
            apart = (tokens - codes[indices.clamp(min=0)]).double().square().sum(1)
            inertia += torch.where(indices < 0, 0, apart).sum()
        counts, sums, inertia = distributed.start_sums((counts, sums, inertia), sync)()
        return counts, sums, inertia

    codes = draw_rows(((tokens, real.float()) for tokens, real in batches), n_codes, own, sync)
    if len(codes) == 0:
        return None
    if init == "k-means++":
        for _ in range(_ROUNDS):
            codes = torch.cat([codes, draw_far(n_codes, codes)])
        codes = pick_codes(codes, assign(codes)[0], n_codes, distances, together)
    # Fewer distinct tokens than codes: the codes repeat.
    codes = codes[torch.arange(n_codes, device=device) % len(codes)]
    codes = distributed.broadcast_from_rank_0(codes, sync)

    previous, had_converged = float("inf"), False
    for iteration in range(max_iterations + 1):
        counts, sums, inertia = assign(codes)
        report(iteration, float(inertia))
        has_converged = float(inertia) >= (1 - tolerance) * previous
        is_empty = counts == 0
        # Restarts may go on for ever: means of equal tokens are rounded, and leave distances to restart from.
        is_done = has_converged and (had_converged or not is_empty.any())
        if iteration == max_iterations or is_done:
            break
        means = (sums / counts.clamp(min=1)[:, None]).float()
        moved = torch.where(is_empty[:, None], codes, directions_or(means, codes) if metric == "cosine" else means)
        if is_empty.any():
            empty = is_empty.nonzero()[:, 0]
            rows = draw_far(len(empty), moved)
            moved[empty[: len(rows)]] = rows
        codes, previous, had_converged = moved, float(inertia), has_converged
    return KMeans(codes.to(first.device), counts.long().to(first.device), float(inertia), iteration)


@contextmanager
def _shown(max_iterations: int) -> Iterator[_Report]:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('progress=True needs rich: pip install "fastvq-triton[cli]"') from error

    columns = TextColumn("k-means"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns) as bar:
        task = bar.add_task("", total=max_iterations)
        yield lambda iteration, inertia: bar.update(task, completed=iteration, description=f"inertia {inertia:.6g}")
