"""faiss: exhaustive search, on the CPU by ``IndexFlatL2``, on a GPU by ``knn_gpu``."""

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
    return f"faiss {importlib.import_module('faiss').__version__}"


def search(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """In float32, with as many threads as PyTorch; half precision is converted in the call."""
    faiss = importlib.import_module("faiss")
    if codebook.is_cuda:
        if not hasattr(faiss, "StandardGpuResources"):
            raise DoesNotApplyError("this faiss was built without GPU support")
        importlib.import_module("faiss.contrib.torch_utils")
        resources = faiss.StandardGpuResources()
        return searching(batches, lambda x: faiss.knn_gpu(resources, x.float(), codebook.float(), 1)[1][:, 0])

    def call(x: Tensor) -> Tensor:
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(problem.dim)
        index.add(codebook.float().numpy())
        return torch.from_numpy(index.search(x.float().numpy(), 1)[1][:, 0])

    return searching(batches, call)


CONTENDER = Contender(version, search)
