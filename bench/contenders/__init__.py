"""Everything that is measured beside fastvq; :mod:`bench.contenders.base` is the interface."""

from __future__ import annotations

from bench.contenders import flash_kmeans, libraries, ours, pytorch
from bench.contenders.base import Contender

CONTENDERS: dict[str, Contender] = {
    "fastvq": ours.CONTENDER,
    "expanded formula": pytorch.EXPANDED,
    "expanded compiled": pytorch.COMPILED,
    "cdist": pytorch.CDIST,
    "chunked addmm": pytorch.CHUNKED,
    "moshi": pytorch.MOSHI,
    "lucidrains": libraries.LUCIDRAINS,
    "faiss": libraries.FAISS,
    "scikit-learn": libraries.SCIKIT_LEARN,
    "keops": libraries.KEOPS,
    "flash-kmeans": flash_kmeans.CONTENDER,
}

# Measured only on request: half precision, where exactness is lost, and the upper bounds of the GPU benchmark.
SPECIAL: dict[str, Contender] = {
    "expanded in half": pytorch.EXPANDED_IN_HALF,
    "half product": pytorch.HALF_PRODUCT,
    "fastvq packed": ours.PACKED,
    "product": pytorch.PRODUCT,
}


def offering(operation: str) -> list[str]:
    """Names of the contenders with a ``"search"`` or a ``"train"`` step."""
    return [name for name, contender in CONTENDERS.items() if getattr(contender, operation) is not None]
