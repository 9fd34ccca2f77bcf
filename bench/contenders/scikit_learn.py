"""scikit-learn: ``pairwise_distances_argmin``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.contenders.base import Contender, Prepared, searching
from bench.harness.outcome import DoesNotApplyError
from bench.harness.problems import Problem


def version() -> str:
    """Of the module."""
    return f"scikit-learn {importlib.import_module('sklearn').__version__}"


def search(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """In float32, with as many threads as PyTorch; half precision is converted in the call."""
    if codebook.is_cuda:
        raise DoesNotApplyError("CPU only")
    metrics = importlib.import_module("sklearn.metrics")
    threads = importlib.import_module("threadpoolctl").ThreadpoolController()

    def call(x: Tensor) -> Tensor:
        with threads.limit(limits=torch.get_num_threads()):
            return torch.from_numpy(metrics.pairwise_distances_argmin(x.float().numpy(), codebook.float().numpy()))

    return searching(batches, call)


CONTENDER = Contender(version, search)
