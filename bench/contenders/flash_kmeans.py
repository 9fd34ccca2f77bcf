"""The assignment step of flash-kmeans (svg-project/flash-kmeans), a Triton kernel."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders.base import Prepared, with_heads
from bench.harness.outcome import DoesNotApplyError
from bench.harness.problems import Problem


def search(
    problem: Problem, batches: Sequence[Tensor], codebook: Tensor, config: Mapping[str, int] | None = None
) -> Prepared:
    """As shipped, or with a launch configuration; the kernel uses TF32 for float32.

    Prepared beforehand: token norms (Euclidean) or unit vectors (cosine). Code norms are computed in the call.
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
