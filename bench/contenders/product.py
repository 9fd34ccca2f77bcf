"""``x @ Eᵀ`` alone: no search, but what every search with a matrix product contains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders.base import Contender, Prepared, chunk_note, tokens_per_chunk, torch_version
from bench.harness.problems import Problem


def search(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """In half precision (float32 is rounded to float16 beforehand), written in half precision.

    Rows are padded beforehand to a multiple of 16 bytes, without which the product would leave the tensor cores.
    """
    dtype = torch.float16 if problem.dtype == torch.float32 else problem.dtype
    halves = [F.pad(x.to(dtype), (0, -problem.dim % 8)) for x in batches]
    columns = F.pad(codebook.to(dtype), (0, -problem.dim % 8)).transpose(-1, -2)
    chunk = tokens_per_chunk(problem, codebook.device)
    shape = (*halves[0].shape[:-2], min(chunk, problem.tokens), problem.codes)
    out = torch.empty(shape, dtype=dtype, device=codebook.device)

    def call(i: int) -> None:
        for part in halves[i % len(halves)].split(chunk, dim=-2):
            torch.matmul(part, columns, out=out[..., : part.shape[-2], :])

    return Prepared(call, chunk_note(problem, chunk))


CONTENDER = Contender(torch_version, search)
