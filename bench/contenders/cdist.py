"""``torch.cdist`` and ``argmin``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.contenders.base import Contender, Prepared, materialising, torch_version
from bench.harness.outcome import DoesNotApplyError
from bench.harness.problems import Problem


def search(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """In float32; half precision is converted in the call."""
    if problem.metric != "euclidean":
        raise DoesNotApplyError("Euclidean distances only")
    return materialising(problem, batches, codebook, lambda x, codes: torch.cdist(x, codes).argmin(-1))


CONTENDER = Contender(torch_version, search)
