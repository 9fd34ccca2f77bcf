"""k-means of the libraries, each as it starts by default, with as many threads as PyTorch."""

import importlib

import torch
from torch import Tensor

import fastvq
from bench.harness.outcome import DoesNotApplyError


def ours(x: Tensor, n_codes: int, iterations: int, seed: int) -> Tensor:
    """Codes of ``fastvq.kmeans``."""
    generator = torch.Generator().manual_seed(seed)
    return fastvq.kmeans(x, n_codes, max_iterations=iterations, tolerance=0, generator=generator).codes


def faiss(x: Tensor, n_codes: int, iterations: int, seed: int) -> Tensor:
    """Codes of ``faiss.Kmeans``, which starts from random tokens, on all tokens."""
    if x.is_cuda:
        raise DoesNotApplyError("CPU only")
    module = importlib.import_module("faiss")
    module.omp_set_num_threads(torch.get_num_threads())
    few = {"min_points_per_centroid": 1, "max_points_per_centroid": len(x)}
    found = module.Kmeans(x.shape[1], n_codes, niter=iterations, seed=seed, **few)
    found.train(x.numpy())
    return torch.from_numpy(found.centroids)


def scikit_learn(x: Tensor, n_codes: int, iterations: int, seed: int) -> Tensor:
    """Codes of ``KMeans`` with ``n_init=1``, greedy k-means++."""
    if x.is_cuda:
        raise DoesNotApplyError("CPU only")
    cluster = importlib.import_module("sklearn.cluster")
    threads = importlib.import_module("threadpoolctl").ThreadpoolController()
    estimator = cluster.KMeans(n_codes, n_init=1, max_iter=iterations, tol=0, random_state=seed)
    with threads.limit(limits=torch.get_num_threads()):
        return torch.from_numpy(estimator.fit(x.numpy()).cluster_centers_).float()
