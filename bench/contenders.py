"""Tools that find the nearest code on a CPU, behind one signature: ``(x [N, D], codebook [K, D]) -> indices [N]``.

Each search starts from plain tensors, as in a training step, where the codebook is new every time: building an
index or packing the codebook is part of the call.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastvq
from fastvq import reference

Search = Callable[[Tensor, Tensor], Tensor]


class Contender(NamedTuple):
    """A search and the version of what it calls."""

    version: str
    search: Search
    materialises: bool = False  # writes [N, K], in chunks of tokens where that would not fit


def load_fastvq() -> Contender:
    """The search of this package, with the backend it picks itself."""
    return Contender(f"fastvq {fastvq.__version__}", lambda x, codebook: fastvq.nearest_code(x, codebook))


def load_seed_formula() -> Contender:
    """``argmin |x|² - 2 x·Eᵀ + |E|²``, as in the published modules."""
    return Contender(f"torch {torch.__version__}", _in_chunks(reference.nearest_code_expanded), materialises=True)


def load_cdist() -> Contender:
    """``torch.cdist`` and ``argmin``."""
    search = _in_chunks(lambda x, codebook: torch.cdist(x, codebook).argmin(1))
    return Contender(f"torch {torch.__version__}", search, materialises=True)


def load_faiss() -> Contender:
    """``IndexFlatL2``, with as many threads as PyTorch."""
    faiss = importlib.import_module("faiss")

    def search(x: Tensor, codebook: Tensor) -> Tensor:
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(codebook.shape[1])
        index.add(codebook.numpy())
        _, indices = index.search(x.numpy(), 1)
        return torch.from_numpy(indices[:, 0])

    return Contender(f"faiss {faiss.__version__}", search)


def load_scikit_learn() -> Contender:
    """``pairwise_distances_argmin``, with as many threads as PyTorch."""
    metrics = importlib.import_module("sklearn.metrics")
    threads = importlib.import_module("threadpoolctl").ThreadpoolController()

    def search(x: Tensor, codebook: Tensor) -> Tensor:
        with threads.limit(limits=torch.get_num_threads()):
            return torch.from_numpy(metrics.pairwise_distances_argmin(x.numpy(), codebook.numpy()))

    return Contender(f"scikit-learn {importlib.import_module('sklearn').__version__}", search)


# A loader raises ImportError where the tool is missing.
CONTENDERS: dict[str, Callable[[], Contender]] = {
    "fastvq": load_fastvq,
    "seed formula": load_seed_formula,
    "cdist": load_cdist,
    "faiss": load_faiss,
    "scikit-learn": load_scikit_learn,
}


def tokens_per_chunk(n_codes: int) -> int:
    """Tokens whose ``[n, K]`` float32 matrix, four times over for temporaries, takes half of the free memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, free // 2 // (4 * 4 * n_codes))


def _in_chunks(search: Search) -> Search:
    def chunked(x: Tensor, codebook: Tensor) -> Tensor:
        chunks = x.split(tokens_per_chunk(len(codebook)))
        return search(x, codebook) if len(chunks) == 1 else torch.cat([search(some, codebook) for some in chunks])

    return chunked
