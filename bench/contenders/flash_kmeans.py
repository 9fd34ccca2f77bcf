"""The assignment step of flash-kmeans (svg-project/flash-kmeans), a Triton kernel."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders.base import Contender, Prepared, with_heads
from bench.harness.outcome import DoesNotApplyError
from bench.harness.problems import Problem


def version() -> str:
    """Of the distribution, or of a checkout on the path, which has none."""
    importlib.import_module("flash_kmeans")
    try:
        return f"flash-kmeans {importlib.metadata.version('flash-kmeans')}"
    except importlib.metadata.PackageNotFoundError:
        return "flash-kmeans, a checkout"


def search(
    problem: Problem, batches: Sequence[Tensor], codebook: Tensor, config: Mapping[str, int] | None = None
) -> Prepared:
    """As shipped or with a launch configuration.

    Token norms (Euclidean) and unit vectors (cosine) are prepared beforehand; code norms are computed in the call, as
    shipped. The kernel uses TF32 for float32.
    """
    module = importlib.import_module("flash_kmeans.assign_euclid_triton")
    if problem.metric == "dot":
        raise DoesNotApplyError("no inner product")
    points = [with_heads(x) for x in batches]
    codes = with_heads(codebook)
    read = lambda result: result.view(batches[0].shape[:-1]).long()  # noqa: E731
    if problem.metric == "cosine":
        points = [F.normalize(x, dim=-1) for x in points]
        codes = F.normalize(codes, dim=-1)
        return Prepared(lambda i: module.cosine_assign_triton(points[i % len(points)], codes), indices=read)
    # Without a float32 copy of the points.
    squares = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square() for x in points]

    def call(i: int) -> Any:
        i %= len(points)
        chosen = {} if config is None else {"config": dict(config)}
        return module.euclid_assign_triton(points[i], codes, squares[i], **chosen)

    return Prepared(call, indices=read)


CONTENDER = Contender(version, search)
