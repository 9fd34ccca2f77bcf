"""KeOps: a symbolic ``[N, K]`` matrix and its ``argmin``. It compiles its own C++ or CUDA at the first call."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import Tensor

from bench.contenders.base import Contender, Prepared, searching
from bench.harness.problems import Problem


def version() -> str:
    """Of the module."""
    return f"pykeops {importlib.import_module('pykeops').__version__}"


def search(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """In float32; half precision is converted in the call."""
    lazy = importlib.import_module("pykeops.torch").LazyTensor

    def call(x: Tensor) -> Tensor:
        distances = ((lazy(x.float()[:, None]) - lazy(codebook.float()[None])) ** 2).sum(-1)
        return distances.argmin(1)[:, 0]

    return searching(batches, call)


CONTENDER = Contender(version, search)
