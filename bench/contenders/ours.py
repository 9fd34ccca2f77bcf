"""fastvq itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

import fastvq
from bench.contenders.base import Prepared, searching, training, with_heads
from bench.harness.outcome import DoesNotApplyError
from bench.harness.problems import Problem
from fastvq.backends.triton import interpreting


def search(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The search as a user calls it, which picks the backend."""
    return searching(batches, lambda x: fastvq.nearest_code(x, codebook, metric=problem.metric))


def search_kernels(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The search with the kernels; without a GPU they are interpreted."""
    return searching(batches, lambda x: fastvq.nearest_code(x, codebook, metric=problem.metric, backend="triton"))


def search_packed(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The kernels alone, with the codebook packed beforehand, as in evaluation."""
    if not (codebook.is_cuda or interpreting()):
        raise DoesNotApplyError("needs a GPU")
    from fastvq_kernels.search.pack_codes import pack_codebook
    from fastvq_kernels.search.pipeline import certified_search

    packed = pack_codebook(codebook, problem.metric)
    return Prepared(
        lambda i: certified_search(with_heads(batches[i % len(batches)]), packed),
        indices=lambda result: result[0].view(batches[0].shape[:-1]),
    )


def train(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """``EMACodebook`` without random restart."""
    module = fastvq.EMACodebook(problem.codes, problem.dim, device=codebook.device)
    counts = torch.ones(problem.codes, device=codebook.device)
    module.load_state_dict({"embeddings": codebook, "N": counts, "z_avg": codebook})
    return training(batches, module)
