"""Everything that is measured beside fastvq, one adapter per file; :mod:`bench.contenders.base` is their interface."""

from __future__ import annotations

from bench.contenders import (
    cdist,
    chunked,
    faiss_flat,
    flash_kmeans,
    formula,
    keops,
    lucidrains,
    moshi,
    ours,
    product,
    scikit_learn,
)
from bench.contenders.base import Contender

CONTENDERS: dict[str, Contender] = {
    "fastvq": ours.CONTENDER,
    "expanded formula": formula.CONTENDER,
    "expanded compiled": formula.COMPILED,
    "cdist": cdist.CONTENDER,
    "chunked addmm": chunked.CONTENDER,
    "moshi": moshi.CONTENDER,
    "lucidrains": lucidrains.CONTENDER,
    "faiss": faiss_flat.CONTENDER,
    "scikit-learn": scikit_learn.CONTENDER,
    "keops": keops.CONTENDER,
    "flash-kmeans": flash_kmeans.CONTENDER,
}

# Not side by side with the others by default: half precision, where exactness is lost, and the GPU pack's ceilings.
SPECIAL: dict[str, Contender] = {
    "expanded in half": formula.AS_GIVEN,
    "half product": formula.HALF_PRODUCT,
    "fastvq packed": ours.PACKED,
    "product": product.CONTENDER,
}


def offering(operation: str) -> list[str]:
    """Names of the contenders with a ``"search"`` or a ``"train"`` step."""
    return [name for name, contender in CONTENDERS.items() if getattr(contender, operation) is not None]
