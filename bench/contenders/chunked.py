"""``argmin ½|E|² - x·Eᵀ`` by ``addmm`` into one reused block: what a careful user writes in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.contenders.base import Contender, Prepared, searching, torch_version
from bench.harness.problems import Problem

# Values of a block: 16 MiB of float32 on a CPU. A GPU is not full with so few.
_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 26}


def search(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """In float32; half precision is converted in the call."""
    chunk = max(1, min(problem.tokens, _BLOCK[codebook.device.type] // problem.codes))

    def call(x: Tensor) -> Tensor:
        codes = codebook.float()
        halves = codes.square().sum(1).mul_(0.5)
        block = torch.empty(chunk, len(codes), device=x.device)
        found = []
        for part in x.float().split(chunk):
            found.append(torch.addmm(halves, part, codes.t(), alpha=-1, out=block[: len(part)]).argmin(1))
        return torch.cat(found)

    return searching(batches, call)


CONTENDER = Contender(torch_version, search)
