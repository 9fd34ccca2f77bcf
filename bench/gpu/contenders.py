"""What is timed on a GPU, behind one signature: a preparation that is not timed, and a call for the i-th batch.

Every search starts from plain tensors; what each prepares beforehand is in its docstring.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvq
from bench.gpu.problems import Problem
from fastvq import reference

# Values of a [tokens, K] matrix made at once: 4 GiB of float32 with its temporaries.
_CHUNK_VALUES = 1 << 28

Call = Callable[[int], Any]


class Contender(NamedTuple):
    """A call and what its row has to say. ``indices`` reads int64 ``[N]`` or ``[H, N]`` from the call's result."""

    call: Call
    note: str = ""
    indices: Callable[[Any], Tensor] | None = None


Prepare = Callable[[Problem, Sequence[Tensor], Tensor], Contender]


class DoesNotApplyError(Exception):
    """This contender has no answer to a problem of this kind."""


def prepare_fastvq(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Contender:
    """The search as a user calls it: packs codebook and tokens, scans, refines, settles. Nothing is prepared."""
    call = lambda i: fastvq.nearest_code(  # noqa: E731
        batches[i % len(batches)], codebook, metric=problem.metric, backend="triton"
    )
    return Contender(call, indices=lambda result: result)


def prepare_packed(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Contender:
    """The same with the codebook packed beforehand, as in evaluation."""
    from fastvq_kernels.pack import pack_codebook
    from fastvq_kernels.search import certified_search

    packed = pack_codebook(codebook, problem.metric)
    call = lambda i: certified_search(with_heads(batches[i % len(batches)]), packed)  # noqa: E731
    return Contender(call, indices=lambda result: result[0].view(batches[0].shape[:-1]))


def with_heads(x: Tensor) -> Tensor:
    """``[N, D]`` as ``[1, N, D]``."""
    return x if x.dim() == 3 else x[None]


def prepare_product(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Contender:
    """``x @ Eᵀ`` alone, in half precision (float32 is rounded to float16 beforehand), written in half precision.

    Rows are padded beforehand to a multiple of 16 bytes, without which the product would leave the tensor cores.
    """
    dtype = torch.float16 if problem.dtype == torch.float32 else problem.dtype
    halves = [F.pad(x.to(dtype), (0, -problem.dim % 8)) for x in batches]
    columns = F.pad(codebook.to(dtype), (0, -problem.dim % 8)).transpose(-1, -2)
    chunk = _chunk(problem)
    shape = (*halves[0].shape[:-2], min(chunk, problem.tokens), problem.codes)
    out = torch.empty(shape, dtype=dtype, device=codebook.device)

    def call(i: int) -> None:
        for part in halves[i % len(halves)].split(chunk, dim=-2):
            torch.matmul(part, columns, out=out[..., : part.shape[-2], :])

    return Contender(call, _chunk_note(problem, chunk))


def prepare_cdist(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Contender:
    """``torch.cdist`` and ``argmin`` in float32; half precision is converted in the call."""
    if problem.metric != "euclidean":
        raise DoesNotApplyError("Euclidean distances only")
    return _materialising(problem, batches, codebook, lambda x, codes: torch.cdist(x, codes).argmin(-1))


def prepare_formula(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Contender:
    """``argmin |x|² - 2 x·Eᵀ + |E|²`` in float32, as in the published modules; heads one by one."""

    def search(x: Tensor, codes: Tensor) -> Tensor:
        if x.dim() == 2:
            return reference.nearest_code_expanded(x, codes, problem.metric)
        return torch.stack(
            [reference.nearest_code_expanded(*head, problem.metric) for head in zip(x, codes, strict=True)]
        )

    return _materialising(problem, batches, codebook, search)


def _materialising(
    problem: Problem, batches: Sequence[Tensor], codebook: Tensor, search: Callable[[Tensor, Tensor], Tensor]
) -> Contender:
    chunk = _chunk(problem)

    def call(i: int) -> Tensor:
        codes = codebook.float()
        parts = batches[i % len(batches)].split(chunk, dim=-2)
        return torch.cat([search(part.float(), codes) for part in parts], -1)

    return Contender(call, _chunk_note(problem, chunk), lambda result: result)


def _chunk(problem: Problem) -> int:
    """Tokens whose ``[tokens, K]`` matrix has at most ``_CHUNK_VALUES`` values over all heads."""
    return max(1, _CHUNK_VALUES // (problem.codes * problem.heads))


def _chunk_note(problem: Problem, chunk: int) -> str:
    return f"in chunks of {chunk} tokens" if chunk < problem.tokens else ""


def prepare_flash(
    problem: Problem, batches: Sequence[Tensor], codebook: Tensor, config: Mapping[str, int] | None = None
) -> Contender:
    """The assignment step of flash-kmeans (svg-project/flash-kmeans), as shipped or with a launch configuration.

    Token norms (Euclidean) and unit vectors (cosine) are prepared beforehand; code norms are computed in the call, as
    shipped. The kernel uses TF32 for float32.
    """
    if importlib.util.find_spec("flash_kmeans") is None:
        raise DoesNotApplyError("flash-kmeans is not installed")
    module = importlib.import_module("flash_kmeans.assign_euclid_triton")
    if problem.metric == "dot":
        raise DoesNotApplyError("no inner product")
    points = [with_heads(x) for x in batches]
    codes = with_heads(codebook)
    read = lambda result: result.view(batches[0].shape[:-1]).long()  # noqa: E731
    if problem.metric == "cosine":
        points = [F.normalize(x, dim=-1) for x in points]
        codes = F.normalize(codes, dim=-1)
        return Contender(lambda i: module.cosine_assign_triton(points[i % len(points)], codes), indices=read)
    # Without a float32 copy of the points.
    squares = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square() for x in points]

    def call(i: int) -> Any:
        i %= len(points)
        chosen = {} if config is None else {"config": dict(config)}
        return module.euclid_assign_triton(points[i], codes, squares[i], **chosen)

    return Contender(call, indices=read)


CONTENDERS: dict[str, Prepare] = {
    "fastvq": prepare_fastvq,
    "fastvq packed": prepare_packed,
    "product": prepare_product,
    "flash-kmeans": prepare_flash,
    "cdist": prepare_cdist,
    "formula": prepare_formula,
}
