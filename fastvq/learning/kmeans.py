"""k-means over a fixed set of tokens, on the exact search."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastvq.common.checks import check_choice, check_count, check_floating, check_mask, check_same_device
from fastvq.common.devices import float64_device
from fastvq.common.directions import directions
from fastvq.learning.batches import Batches, as_tensor, flatten
from fastvq.learning.lloyd import Report, cluster, no_report

Array: TypeAlias = Tensor | np.ndarray[Any, Any]
# What a DataLoader may give: a tensor, or one in a tuple or a list.
Batch: TypeAlias = Array | tuple[Array] | list[Array]


class _Codes(NamedTuple):
    codes: Tensor
    counts: Tensor
    inertia: float
    iterations: int


class KMeans(_Codes):
    """Result of :func:`kmeans`: a tuple ``(codes, counts, inertia, iterations)`` with one more attribute, ``labels``.

    ``codes [K, D]``, float64 for float64 tokens and float32 for others; ``counts [K]`` int64 of the tokens of each
    code; ``inertia = Σ w |x - e|²`` over tokens and their codes; the number of ``iterations`` that moved the codes; and
    ``labels [...]`` int64, the code of every token of this rank, -1 for a token that was left out. All belong to the
    ``codes``. Of an iterable of batches ``labels`` is a list with a tensor for each, in the order in which the last
    pass read them. With heads all tensors begin with H, the inertia is the sum, and the iterations are the most.
    """

    labels: Tensor | list[Tensor]

    def __new__(
        cls,
        codes: Tensor,
        counts: Tensor,
        inertia: float,
        iterations: int,
        labels: Tensor | list[Tensor] | tuple[()] = (),  # pickled results of earlier versions have none
    ) -> "KMeans":
        """A tuple of the first four."""
        self = super().__new__(cls, codes, counts, inertia, iterations)
        self.labels = list(labels) if isinstance(labels, tuple) else labels
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.labels)  # what a copy is made from


def kmeans(
    x: Array | Iterable[Batch],
    n_codes: int,
    *,
    metric: str = "euclidean",
    mask: Array | None = None,
    sample_weight: Array | None = None,
    heads: bool = False,
    init: str | Array = "k-means++",
    n_init: int = 1,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    sync: bool = True,
    progress: bool = False,
) -> KMeans:
    """K codes that make ``Σ_i w_i min_k |x_i - e_k|²`` small, by Lloyd's iterations; no ``[tokens, codes]`` matrix.

    An iteration moves every code to the mean of its tokens, ``e_k ← Σ w_i x_i / Σ w_i``, added in float64 and rounded
    once. A code without tokens restarts from a token, drawn with odds of weight times squared distance to its code.
    The best codes seen are returned. ``metric="cosine"`` clusters ``x / |x|`` (spherical k-means).

    ``init="k-means++"`` draws candidates as k-means|| does (Bahmani et al. 2012, arXiv 1203.6402): three rounds of K
    and at least 64, the first evenly, the others with odds of the squared distance to the candidates so far. Of these,
    weighted by their tokens, greedy k-means++ picks K (Arthur and Vassilvitskii 2007), each the best of ``2 + log K``
    trials; above 1,024 codes a turn picks several, each the best of four. ``"random"`` takes K tokens.

    Every rank of a process group passes its tokens and gets the same codes, bit for bit.

    Args:
        x: tokens ``[..., D]``, floating, or an iterable of batches that can be iterated more than once (a list, a
            DataLoader), at least one on every rank; a batch may be empty, and may be a tuple or list of one tensor.
            NumPy arrays will do. Float64 tokens are clustered in float64. Tokens that are not finite are left out, and
            for the cosine tokens that are zero.
        n_codes: K ≥ 1. With fewer distinct tokens the last codes repeat the first.
        metric: ``"euclidean"`` or ``"cosine"``.
        mask: bool ``[...]``, True for a real token, where ``x`` is one tensor. Default: all.
        sample_weight: ``w [...]``, floating, finite and not negative, where ``x`` is one tensor. Default: 1. A token of
            weight 0 gets a label and moves nothing.
        heads: ``x [H, ..., D]``, one tensor, has one codebook ``[K, D]`` for each head.
        init: ``"k-means++"``, ``"random"``, or the codes to start from, ``[K, D]`` (``[H, K, D]`` with heads), floating
            and finite; those of rank 0 count.
        n_init: that many starts, of which the one with the least inertia is returned.
        max_iterations: the codes move at most this often.
        tolerance: stop when an iteration lowers the inertia by this share or less; 0: when it no longer falls.
        generator: a CPU generator; that of rank 0 decides. Default: PyTorch's own.
        backend: as in :func:`fastvq.nearest_code`.
        sync: cluster the tokens of all ranks.
        progress: show a progress bar; needs rich, which the extra ``cli`` installs.

    Returns:
        :class:`KMeans`; ``counts``, ``inertia`` and ``labels`` belong to the ``codes`` returned.

    Raises:
        TypeError: ``x`` is an iterator, which can be read only once, or holds other things than floating tensors.
        ValueError: there is no finite token, or an argument is out of its range.
        ModuleNotFoundError: ``progress`` without rich.
    """
    check_choice("metric", metric, ("euclidean", "cosine"))
    for name, count, least in (("n_codes", n_codes, 1), ("n_init", n_init, 1), ("max_iterations", max_iterations, 0)):
        check_count(name, count, least)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    parts: list[Any] = [as_tensor(part) for part in (x, mask, sample_weight, init)]
    _check_start(parts[3], n_init)
    _check_weights(parts[2], parts[0])
    if heads:
        _check_heads(parts[0], parts[1], parts[3])

    def learn(x: Any, mask: Tensor | None, weights: Tensor | None, init: str | Tensor) -> KMeans:
        def prepare(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            check_floating("x", tokens)
            check_mask(mask, tokens)
            return flatten(tokens, mask, metric, torch.promote_types(tokens.dtype, torch.float32))

        batches = Batches(x, mask, prepare)
        start = init if isinstance(init, str) else _start_codes(init, n_codes, metric, batches)
        flat = None if weights is None else weights.reshape(-1).to(float64_device(weights.device)).double()
        runs = (
            cluster(
                batches, n_codes, max_iterations, metric, backend, sync,
                init=start, weights=flat, tolerance=tolerance, generator=generator, report=report,
            )
            for _ in range(n_init)
        )  # fmt: skip
        best = min((run for run in runs if run is not None), key=lambda run: run.found.inertia, default=None)
        if best is None:
            weighing = "" if weights is None else " of positive weight"
            raise ValueError(f"x must hold at least one finite token{weighing}, got none on any rank")
        labels = [found.view(shape) for found, shape in zip(best.found.labels, best.found.shapes, strict=True)]
        return KMeans(
            best.codes, best.found.counts, best.found.inertia, best.iterations,
            labels[0] if isinstance(x, Tensor) else labels,
        )  # fmt: skip

    with _shown(max_iterations) if progress else nullcontext(no_report) as report:
        if not heads:
            return learn(*parts)
        of_head = ([part[h] if isinstance(part, Tensor) else part for part in parts] for h in range(len(parts[0])))
        return _together([learn(*head) for head in of_head])


def _together(heads: list[KMeans]) -> KMeans:
    codes, counts, inertia, iterations = zip(*heads, strict=True)
    labels = torch.stack([head.labels for head in heads if isinstance(head.labels, Tensor)])
    return KMeans(torch.stack(codes), torch.stack(counts), sum(inertia), max(iterations), labels)


def _check_start(init: Any, n_init: int) -> None:
    if not isinstance(init, Tensor):
        check_choice("init", init, ("k-means++", "random"))
        return
    check_floating("init", init)
    if n_init != 1:
        raise ValueError(f"n_init must be 1 with start codes, which leave nothing to chance, got {n_init}")
    if not torch.isfinite(init).all():
        raise ValueError("init must be finite, got NaN or an infinity")


def _start_codes(init: Tensor, n_codes: int, metric: str, batches: Batches) -> Tensor:
    """Codes to start from, in the dtype of the tokens."""
    first, _ = next(iter(batches))
    if init.shape != (n_codes, first.shape[1]):
        raise ValueError(f"init must be [{n_codes}, {first.shape[1]}] to match n_codes and x, got {list(init.shape)}")
    check_same_device("init", init, first)
    codes = init.detach().to(first.dtype)
    return directions(codes) if metric == "cosine" else codes


def _check_weights(weights: Any, x: Any) -> None:
    if weights is None:
        return
    if not isinstance(x, Tensor):
        raise ValueError("sample_weight must be None where x is an iterable of batches")
    check_floating("sample_weight", weights)
    if weights.shape != x.shape[:-1]:
        expected = f"{list(x.shape[:-1])}, the leading shape of x"
        raise ValueError(f"sample_weight must be {expected}, got {list(weights.shape)}")
    check_same_device("sample_weight", weights, x)
    if not ((weights >= 0) & (weights < torch.inf)).all():
        raise ValueError(f"sample_weight must be finite and at least 0, got {float(weights.amin())}")


def _check_heads(x: Any, mask: Any, init: Any) -> None:
    if not isinstance(x, Tensor) or x.dim() < 2 or len(x) == 0:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be one tensor [heads, ..., D] with heads, got {got}")
    check_mask(mask, x)
    if isinstance(init, Tensor) and (init.dim() != 3 or len(init) != len(x)):
        raise ValueError(f"init must be [{len(x)}, n_codes, D] to match the heads of x, got {list(init.shape)}")


@contextmanager
def _shown(max_iterations: int) -> Iterator[Report]:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('progress=True needs rich: pip install "fastvq-triton[cli]"') from error

    columns = TextColumn("k-means"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns) as bar:
        task = bar.add_task("", total=max_iterations)
        yield lambda iteration, inertia: bar.update(task, completed=iteration, description=f"inertia {inertia:.6g}")
