"""What every contender gives: a version, and calls for a search, for a training step and for k-means.

A call starts from plain tensors, as in a training step, where the codebook changes every time: building an index or
packing the codebook is part of the call. A docstring says so where a contender prepares something beforehand.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.machine import available_memory
from bench.harness.problems import Problem

# Values of a [tokens, K] matrix made at once on a GPU: 4 GiB of float32 with its temporaries.
_GPU_VALUES = 1 << 28


class Prepared(NamedTuple):
    """The call for the i-th batch and a note for its row.

    ``indices`` reads int64 ``[N]`` or ``[H, N]`` from the result of the call.
    """

    call: Callable[[int], Any]
    note: str = ""
    indices: Callable[[Any], Tensor] | None = None


# Takes the problem, batches of tokens and the codebook. Raises DoesNotApplyError for a problem it cannot solve.
Prepare = Callable[[Problem, Sequence[Tensor], Tensor], Prepared]
Search = Callable[[Tensor, Tensor], Tensor]
# Takes tokens [n, D], K, the number of iterations and a seed; gives codes [K, D].
Cluster = Callable[[Tensor, int, int, int], Tensor]


class Contender(NamedTuple):
    """A tool: ``version`` raises ImportError if it is missing; None stands for an operation that it does not offer."""

    version: Callable[[], str]
    search: Prepare | None = None
    train: Prepare | None = None
    cluster: Cluster | None = None


def version_of(module: str, name: str) -> Callable[[], str]:
    """A contender's ``version``: the one of distribution ``name``, otherwise of the module, if it states one."""

    def version() -> str:
        found = importlib.import_module(module)
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{name} {getattr(found, '__version__', 'from a checkout')}"

    return version


def searching(batches: Sequence[Tensor], search: Callable[[Tensor], Tensor], note: str = "") -> Prepared:
    """A search whose result is the indices."""
    return Prepared(lambda i: search(batches[i % len(batches)]), note, lambda result: result)


def searching_float32(batches: Sequence[Tensor], codebook: Tensor, search: Search) -> Prepared:
    """A search of tokens in the codebook, both in float32; half precision is converted in the call."""
    return searching(batches, lambda x: search(x.float(), codebook.float()))


def materialising(
    problem: Problem, batches: Sequence[Tensor], codebook: Tensor, search: Search, convert: bool = True
) -> Prepared:
    """A search that writes ``[tokens, K]``, in chunks of tokens if the whole matrix does not fit.

    ``convert`` turns half precision into float32, in the call.
    """
    chunk, note = tokens_per_chunk(problem, codebook.device)

    def call(x: Tensor) -> Tensor:
        codes = codebook.float() if convert else codebook
        found = [search(block.float() if convert else block, codes) for block in x.split(chunk, dim=-2)]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    return searching(batches, call, note)


def tokens_per_chunk(problem: Problem, device: torch.device) -> tuple[int, str]:
    """Tokens whose ``[tokens, K]`` float32 matrix, four times over for temporaries, takes half of the free memory.

    The note is empty if these are all tokens.
    """
    values = available_memory() // 2 // (4 * 4) if device.type == "cpu" else _GPU_VALUES
    chunk = max(1, values // (problem.codes * problem.heads))
    if problem.whole or chunk >= problem.tokens:
        return problem.tokens, ""
    return chunk, f"in chunks of {chunk} tokens"


def training(batches: Sequence[Tensor], forward: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Prepared:
    """A training step: forward with the codebook's update, and the gradient of the tokens."""

    def call(i: int) -> Tensor:
        x = batches[i % len(batches)].detach().requires_grad_()
        quantized, indices, loss = forward(x)
        (quantized.sum() + loss).backward()
        return indices

    return Prepared(call, indices=lambda result: result)


def with_heads(x: Tensor) -> Tensor:
    """``[N, D]`` as ``[1, N, D]``."""
    return x if x.dim() == 3 else x[None]
