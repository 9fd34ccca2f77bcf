"""`python -m bench means`: the error of a code's mean, over the offset and the number of its tokens."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

import fastvq
from bench.contenders import CONTENDERS
from bench.harness.options import Options
from bench.harness.outcome import DoesNotApplyError, failure
from bench.harness.problems import Problem
from bench.harness.run import Group
from bench.harness.store import Row
from bench.harness.timed import wanted

_DIM = 2
_OFFSETS = (0.0, 1e2, 1e4, 1e6)
_TOKENS = (10**3, 10**4, 10**5, 10**6, 10**7)
_QUICK_OFFSETS, _QUICK_TOKENS = (0.0, 1e6), (10**3, 10**5)


def plan(options: Options) -> Iterator[Group]:
    """Error of the mean of one code's tokens over their offset and number; one group per offset and number."""
    names = [name for name in MEANS if not options.contenders or name.partition(",")[0] in options.contenders]
    for offset in _QUICK_OFFSETS if options.quick else _OFFSETS:
        for tokens in _QUICK_TOKENS if options.quick else _TOKENS:
            rows = wanted("means", Problem("means", tokens, 1, _DIM), options, names, offset=offset)
            if names:
                yield Group(f"offset {offset:g}, {tokens} tokens", rows, partial(judge, rows, options.device))


def judge(rows: Sequence[Row], device: torch.device) -> list[Row]:
    """Fill rows: status, note, version and the largest error of a coordinate in units in the last place of float32."""
    first, rows = rows[0], [dict(row) for row in rows]
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.rand(first["tokens"], first["dim"], generator=generator, device=device).add_(first["offset"])
    # What float64 adds here lies between 0 and 1 and is a multiple of float32's spacing: nearly nothing is rounded.
    exact = (x.double() - first["offset"]).mean(0) + first["offset"]
    spacing = torch.exp2(exact.abs().log2().floor() - 23)
    for row in rows:
        row |= {"status": "ok", "note": "", "version": None}
        try:
            row["version"] = CONTENDERS.get(row["contender"].partition(",")[0], CONTENDERS["cdist"]).version()
            error = (MEANS[row["contender"]](x).double() - exact).abs() / spacing
            row["error_ulp"] = float(error.max())
        except Exception as error:  # other libraries raise anything, and it belongs into the table
            row |= failure(error)
    return rows


def _statistics(x: Tensor) -> Tensor:
    counts, sums = fastvq.code_statistics(x, x.new_zeros(len(x), dtype=torch.int64), 1)
    return (sums / counts[:, None])[0]


def _clustered(x: Tensor) -> Tensor:
    return fastvq.kmeans(x, 1, max_iterations=1).codes[0]


def _moved(x: Tensor) -> Tensor:
    """A step without memory of earlier ones."""
    module = fastvq.EMACodebook(1, x.shape[1], ema_decay=0.0, device=x.device)
    module.load_state_dict({"embeddings": x[:1], "N": torch.ones(1), "z_avg": x[:1]})
    with torch.no_grad():
        module(x)
    return module.embeddings[0]


def _float32(x: Tensor) -> Tensor:
    """As the published modules sum tokens that have their codes."""
    sums = x.new_zeros(1, x.shape[1]).index_add_(0, x.new_zeros(len(x), dtype=torch.int64), x)
    return sums[0] / len(x)


def _faiss(x: Tensor) -> Tensor:
    faiss = importlib.import_module("faiss")
    found = faiss.Kmeans(x.shape[1], 1, niter=1, max_points_per_centroid=len(x), seed=1)
    found.train(_on_cpu(x))
    return torch.from_numpy(found.centroids[0])


def _scikit_learn(x: Tensor) -> Tensor:
    tokens = _on_cpu(x)
    kmeans = importlib.import_module("sklearn.cluster").KMeans(1, init=tokens[:1], n_init=1, max_iter=1)
    return torch.from_numpy(kmeans.fit(tokens).cluster_centers_[0])


def _on_cpu(x: Tensor) -> np.ndarray:
    if x.is_cuda:
        raise DoesNotApplyError("CPU only")
    return x.numpy()


# The mean [D] of tokens [n, D] that have one code.
MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "fastvq": _statistics,
    "fastvq, k-means": _clustered,
    "fastvq, moving average": _moved,
    "float32 sums": _float32,
    "faiss": _faiss,
    "scikit-learn": _scikit_learn,
}
