"""`python -m bench kmeans`: inertia and time of k-means, with the same tokens and at most as many iterations."""

import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvq
from bench.contenders import CONTENDERS
from bench.harness.options import Options
from bench.harness.outcome import DoesNotApplyError, failure
from bench.harness.run import Group
from bench.harness.store import Row
from fastvq.testing.measure import synchronize

_SEEDS, _ITERATIONS, _QUICK_ITERATIONS = 3, 25, 10
# Distances are added up so many tokens at a time.
_BLOCK = 8192
Make = Callable[[], Tensor]


def blobs(sizes: Sequence[int], dim: int, spread: float) -> Tensor:
    """Standard normal clusters of these sizes around centres drawn evenly from a cube ``[0, spread]^dim``."""
    generator = torch.Generator().manual_seed(0)
    centres = spread * torch.rand(len(sizes), dim, generator=generator)
    x = centres.repeat_interleave(torch.tensor(sizes), 0)
    return x + torch.randn(x.shape, generator=generator)


def gaussian(n: int, dim: int) -> Tensor:
    """Standard normal tokens."""
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0))


def digits() -> Tensor:
    """The 1,797 pictures of 8 × 8 pixels that scikit-learn bundles."""
    return torch.from_numpy(importlib.import_module("sklearn.datasets").load_digits().data).float()


def patches(stride: int) -> Tensor:
    """Patches of 4 × 4 pixels of the two photographs that scikit-learn bundles, with ICA's learned features.

    48 values of a patch become the 32 responses of filters that FastICA has learned from these patches, edge detectors
    as those of a network's first layer.
    """
    images = torch.from_numpy(np.stack(importlib.import_module("sklearn.datasets").load_sample_images().images))
    x = F.unfold(images.movedim(-1, 1).float() / 255, 4, stride=stride).movedim(1, -1).flatten(0, 1)
    ica = importlib.import_module("sklearn.decomposition").FastICA(
        32, random_state=0, max_iter=50, whiten_solver="eigh"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it need not have converged
        return torch.from_numpy(ica.fit_transform(x.numpy())).float().contiguous()


_IMBALANCED = [int(10_000 * 0.75**i) + 10 for i in range(20)]
CASES: dict[str, tuple[Make, int]] = {
    "50 blobs": (lambda: blobs([400] * 50, 8, 20), 50),
    "256 blobs": (lambda: blobs([100] * 256, 16, 20), 256),
    "20 imbalanced clusters": (lambda: blobs(_IMBALANCED, 8, 10), 20),
    "Gaussian": (lambda: gaussian(50_000, 32), 256),
    "Gaussian, large": (lambda: gaussian(200_000, 64), 1024),
    "digits": (digits, 64),
    "learned features of patches": (lambda: patches(4), 512),
}
_QUICK_CASES: dict[str, tuple[Make, int]] = {
    "50 blobs": (lambda: blobs([100] * 50, 8, 20), 50),
    "Gaussian": (lambda: gaussian(8000, 16), 64),
    "digits": (digits, 32),
    "learned features of patches": (lambda: patches(12), 64),
}


def plan(options: Options) -> Iterator[Group]:
    """Inertia and time of k-means beside other libraries; one group per set of tokens.

    Every contender gets the same tokens, three seeds and at most as many iterations, and stops early only where nothing
    changes. The inertia is that of its codes in float64. The shapes asked for are those of Gaussian tokens.
    """
    cases = _QUICK_CASES if options.quick else CASES
    if options.shapes:
        cases = {shape.name: (partial(gaussian, shape.tokens, shape.dim), shape.codes) for shape in options.shapes}
    names = options.contenders or [name for name, contender in CONTENDERS.items() if contender.cluster]
    for name, (make, codes) in cases.items():
        row = {"benchmark": "kmeans", "name": name, "codes": codes, "dtype": "float32", "device": options.device.type}
        row["operation"] = f"{_QUICK_ITERATIONS if options.quick else _ITERATIONS} iterations"
        rows: list[Row] = [{**row, "contender": contender} for contender in names]
        yield Group(name, rows, partial(measure, rows, make, options))


def measure(rows: Sequence[Row], make: Make, options: Options) -> list[Row]:
    """Fill rows: sizes, status, note, version, inertia of every seed, and the median of their seconds."""
    x = make().to(options.device)
    rows = [{**row, "dim": x.shape[1], "n_tokens": len(x), "status": "ok", "note": "", "inertias": []} for row in rows]
    seconds: dict[str, list[float]] = {row["contender"]: [] for row in rows}
    for seed in range(_SEEDS):
        for row in rows:  # in turns, so that other load meets all alike
            if row["status"] != "ok":
                continue
            try:
                codes, spent = _clustered(row, x, seed, _QUICK_ITERATIONS if options.quick else _ITERATIONS)
            except Exception as error:  # other libraries raise anything, and it belongs into the table
                row |= failure(error)
                continue
            seconds[row["contender"]].append(spent)
            row["inertias"].append(inertia(x, codes.to(x.device)))
    for row in rows:
        if row["status"] == "ok":
            row |= {"seconds": statistics.median(seconds[row["contender"]])}
            row |= {"inertia": statistics.median(row["inertias"])}
    return rows


def _clustered(row: Row, x: Tensor, seed: int, iterations: int) -> tuple[Tensor, float]:
    contender = CONTENDERS[row["contender"]]
    row["version"] = contender.version()
    if contender.cluster is None:
        raise DoesNotApplyError("offers no k-means")
    if seed == 0:
        contender.cluster(x[: 4 * row["codes"]], row["codes"], 1, seed)  # loads what a library loads once
    synchronize(x.device)
    start = time.perf_counter()
    codes = contender.cluster(x, row["codes"], iterations, seed)
    synchronize(x.device)
    return codes, time.perf_counter() - start


def inertia(x: Tensor, codes: Tensor) -> float:
    """``Σ_i min_k |x_i - e_k|²`` in float64."""
    indices = fastvq.nearest_code(x, codes)
    blocks = zip(x.split(_BLOCK), indices.split(_BLOCK), strict=True)
    return sum(float((block.double() - codes.double()[found]).square().sum()) for block, found in blocks)
