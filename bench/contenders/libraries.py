"""Libraries that search, or quantize, on their own: faiss, scikit-learn, KeOps, vector-quantize-pytorch."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.contenders.base import Prepared, searching, searching_float32, training
from bench.harness.outcome import DoesNotApplyError
from bench.harness.problems import Problem


def faiss(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """Exhaustive: ``IndexFlatL2`` with as many threads as PyTorch on the CPU, ``knn_gpu`` on a GPU."""
    module = importlib.import_module("faiss")
    if codebook.is_cuda:
        if not hasattr(module, "StandardGpuResources"):
            raise DoesNotApplyError("this faiss was built without GPU support")
        importlib.import_module("faiss.contrib.torch_utils")
        resources = module.StandardGpuResources()
        return searching_float32(batches, codebook, lambda x, codes: module.knn_gpu(resources, x, codes, 1)[1][:, 0])

    def search(x: Tensor, codes: Tensor) -> Tensor:
        module.omp_set_num_threads(torch.get_num_threads())
        index = module.IndexFlatL2(problem.dim)
        index.add(codes.numpy())
        return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])

    return searching_float32(batches, codebook, search)


def scikit_learn(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """``pairwise_distances_argmin`` with as many threads as PyTorch."""
    if codebook.is_cuda:
        raise DoesNotApplyError("CPU only")
    metrics = importlib.import_module("sklearn.metrics")
    threads = importlib.import_module("threadpoolctl").ThreadpoolController()

    def search(x: Tensor, codes: Tensor) -> Tensor:
        with threads.limit(limits=torch.get_num_threads()):
            return torch.from_numpy(metrics.pairwise_distances_argmin(x.numpy(), codes.numpy()))

    return searching_float32(batches, codebook, search)


def keops(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """``argmin`` of a symbolic ``[N, K]`` matrix. KeOps compiles its own C++ or CUDA at the first call."""
    lazy = importlib.import_module("pykeops.torch").LazyTensor

    def search(x: Tensor, codes: Tensor) -> Tensor:
        return ((lazy(x[:, None]) - lazy(codes[None])) ** 2).sum(-1).argmin(1)[:, 0]

    return searching_float32(batches, codebook, search)


def lucidrains(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """``VectorQuantize`` in evaluation; it always looks the codes up, too."""
    module = _vector_quantize(problem, codebook).eval()

    @torch.no_grad()
    def search(x: Tensor) -> Tensor:
        return module(x[None])[1][0]

    return searching(batches, search)


def train_lucidrains(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """``VectorQuantize`` with the decay and commitment weight of the others, without dead-code replacement."""
    module = _vector_quantize(problem, codebook)

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = module(x[None])
        return quantized[0], indices[0], loss

    return training(batches, forward)


def _vector_quantize(problem: Problem, codebook: Tensor) -> Any:
    package = importlib.import_module("vector_quantize_pytorch")
    module = package.VectorQuantize(problem.dim, codebook_size=problem.codes, decay=0.99, commitment_weight=0.25)
    state = module.state_dict()
    for name in ("embed", "embed_avg"):
        state[f"_codebook.{name}"] = codebook[None].float()
    state["_codebook.cluster_size"] = torch.ones_like(state["_codebook.cluster_size"])
    module.load_state_dict(state)
    return module.to(codebook.device)
