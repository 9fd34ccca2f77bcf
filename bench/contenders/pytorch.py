"""Searches and training steps in a few lines of PyTorch, as published modules and careful users write them."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders.base import Prepared, Search, materialising, searching_float32, tokens_per_chunk, training
from bench.harness.outcome import DoesNotApplyError
from bench.harness.problems import Problem
from fastvq import reference

# Values of a block of addmm: 16 MiB of float32 on a CPU. A GPU needs more to be full.
_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 26}
_DECAY = 0.99
_LEAST_USAGE = 1e-5


def expanded(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """``argmin |x|² - 2 x·Eᵀ + |E|²`` in float32, head by head: the formula of VideoGPT, TATS and ESM3."""

    def formula(x: Tensor, codes: Tensor) -> Tensor:
        if x.dim() == 2:
            return reference.nearest_code_expanded(x, codes, problem.metric)
        heads = zip(x, codes, strict=True)
        return torch.stack([reference.nearest_code_expanded(*head, problem.metric) for head in heads])

    return materialising(problem, batches, codebook, formula)


def expanded_compiled(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The formula under ``torch.compile``, for all sizes at once: compiling is not timed."""
    return materialising(problem, batches, codebook, _compiled())


@functools.cache
def _compiled() -> Search:
    return torch.compile(reference.nearest_code_expanded, dynamic=True)


def expanded_in_half(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The formula in the precision of its inputs, as a module in half precision computes it."""
    _needs_half(problem)
    return materialising(problem, batches, codebook, reference.nearest_code_expanded, convert=False)


def half_product(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The product in half precision and the norms in float32, as autocast computes it on a GPU."""
    _needs_half(problem)

    def formula(x: Tensor, codes: Tensor) -> Tensor:
        squares = x.float().square().sum(1, keepdim=True), codes.float().square().sum(1)
        return (squares[0] - 2 * (x @ codes.t()) + squares[1]).argmin(1)

    return materialising(problem, batches, codebook, formula, convert=False)


def _needs_half(problem: Problem) -> None:
    if problem.dtype == torch.float32:
        raise DoesNotApplyError("half precision only")


def cdist(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """``torch.cdist`` and ``argmin`` in float32."""
    if problem.metric != "euclidean":
        raise DoesNotApplyError("Euclidean distances only")
    return materialising(problem, batches, codebook, lambda x, codes: torch.cdist(x, codes).argmin(-1))


def chunked(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """``argmin ½|E|² - x·Eᵀ`` in float32 by ``addmm`` into one reused block: what a careful user writes."""
    chunk = max(1, min(problem.tokens, _BLOCK[codebook.device.type] // problem.codes))

    def search(x: Tensor, codes: Tensor) -> Tensor:
        halves = codes.square().sum(1).mul_(0.5)
        out = torch.empty(chunk, len(codes), device=x.device)
        found = []
        for block in x.split(chunk):
            found.append(torch.addmm(halves, block, codes.t(), alpha=-1, out=out[: len(block)]).argmin(1))
        return torch.cat(found)

    return searching_float32(batches, codebook, search)


def product(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """``x @ Eᵀ`` in half precision: no search, but the matrix product that a search contains.

    Prepared beforehand: float32 is rounded to float16, and rows are padded to a multiple of 16 bytes, which the tensor
    cores need.
    """
    dtype = torch.float16 if problem.dtype == torch.float32 else problem.dtype
    halves = [F.pad(x.to(dtype), (0, -problem.dim % 8)) for x in batches]
    columns = F.pad(codebook.to(dtype), (0, -problem.dim % 8)).transpose(-1, -2)
    chunk, note = tokens_per_chunk(problem, codebook.device)
    shape = (*halves[0].shape[:-2], chunk, problem.codes)
    out = torch.empty(shape, dtype=dtype, device=codebook.device)

    def call(i: int) -> None:
        for block in halves[i % len(halves)].split(chunk, dim=-2):
            torch.matmul(block, columns, out=out[..., : block.shape[-2], :])

    return Prepared(call, note)


def train_expanded(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The published module with its EMA update, :class:`fastvq.reference.EMACodebook`."""
    module = reference.EMACodebook(problem.codes, problem.dim)
    module.embeddings.copy_(codebook)
    module.z_avg.copy_(codebook)
    module.N.fill_(1)
    module._need_init = False
    return training(batches, module.to(codebook.device))


def train_moshi(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The quantizer of Moshi (kyutai-labs/moshi, ``EuclideanCodebook``), written after its semantics.

    Search, straight-through gradient, commitment loss, and moving averages of counts and sums; expired codes are not
    replaced.
    """
    usage = torch.ones(problem.codes, device=codebook.device)
    sums = codebook.float().clone()

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = sums / usage.clamp(min=_LEAST_USAGE)[:, None]
        flat = x.detach()
        indices = torch.cdist(flat[None], codes[None])[0].argmin(-1)
        quantized = F.embedding(indices, codes)
        counted = torch.zeros_like(usage).scatter_add_(0, indices, torch.ones_like(flat[:, 0]))
        added = torch.zeros_like(sums).scatter_add_(0, indices[:, None].expand_as(flat), flat)
        usage.mul_(_DECAY).add_(counted, alpha=1 - _DECAY)
        sums.mul_(_DECAY).add_(added, alpha=1 - _DECAY)
        return x + (quantized - x).detach(), indices, F.mse_loss(x, quantized)

    return training(batches, forward)
