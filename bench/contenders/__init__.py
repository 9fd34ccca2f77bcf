"""Everything that is measured beside fastvq; :mod:`bench.contenders.base` is the interface."""

import torch

import fastvq
from bench.contenders import clustering, flash_kmeans, libraries, ours, pytorch
from bench.contenders.base import Contender, version_of


def _fastvq() -> str:
    return f"fastvq {fastvq.__version__}"


def _torch() -> str:
    return f"torch {torch.__version__}"


_lucidrains = version_of("vector_quantize_pytorch", "vector-quantize-pytorch")

CONTENDERS: dict[str, Contender] = {
    "fastvq": Contender(_fastvq, ours.search, ours.train, clustering.ours),
    "expanded formula": Contender(_torch, pytorch.expanded, pytorch.train_expanded),
    "expanded compiled": Contender(_torch, pytorch.expanded_compiled),
    "cdist": Contender(_torch, pytorch.cdist),
    "chunked addmm": Contender(_torch, pytorch.chunked),
    "moshi": Contender(_torch, train=pytorch.train_moshi),
    "lucidrains": Contender(_lucidrains, libraries.lucidrains, libraries.train_lucidrains),
    "faiss": Contender(version_of("faiss", "faiss"), libraries.faiss, cluster=clustering.faiss),
    "scikit-learn": Contender(
        version_of("sklearn", "scikit-learn"), libraries.scikit_learn, cluster=clustering.scikit_learn
    ),
    "keops": Contender(version_of("pykeops", "pykeops"), libraries.keops),
    "flash-kmeans": Contender(version_of("flash_kmeans", "flash-kmeans"), flash_kmeans.search),
}

# Measured only on request: half precision, where exactness is lost, and the upper bounds of the GPU benchmark.
SPECIAL: dict[str, Contender] = {
    "expanded in half": Contender(_torch, pytorch.expanded_in_half),
    "half product": Contender(_torch, pytorch.half_product),
    "fastvq packed": Contender(_fastvq, ours.search_packed),
    "product": Contender(_torch, pytorch.product),
}


def offering(operation: str) -> list[str]:
    """Names of the contenders with a ``"search"`` or a ``"train"`` step."""
    return [name for name, contender in CONTENDERS.items() if getattr(contender, operation) is not None]
