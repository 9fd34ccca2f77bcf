"""What every contender gives: a version, and calls for a search and for a training step.

A call starts from plain tensors, as in a training step, where the codebook is new every time: building an index or
packing the codebook is part of it. What is prepared beforehand, if anything, stands in the contender's docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.machine import available_memory
from bench.harness.problems import Problem

# Values of a [tokens, K] matrix made at once on a GPU: 4 GiB of float32 with its temporaries.
_GPU_VALUES = 1 << 28


class Prepared(NamedTuple):
    """The call for the i-th batch, and what its row has to say.

    ``indices`` reads int64 ``[N]`` or ``[H, N]`` from the call's result.
    """

    call: Callable[[int], Any]
    note: str = ""
    indices: Callable[[Any], Tensor] | None = None


# Takes the problem, some batches of tokens and the codebook. Raises DoesNotApplyError where there is no answer.
Prepare = Callable[[Problem, Sequence[Tensor], Tensor], Prepared]
Forward = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class Contender(NamedTuple):
    """A tool: ``version`` raises ImportError where it is missing; None stands for what it does not offer."""

    version: Callable[[], str]
    search: Prepare | None = None
    train: Prepare | None = None


def torch_version() -> str:
    """Of contenders that are a few lines of PyTorch."""
    return f"torch {torch.__version__}"


def searching(batches: Sequence[Tensor], search: Callable[[Tensor], Tensor], note: str = "") -> Prepared:
    """A search whose result is the indices."""
    return Prepared(lambda i: search(batches[i % len(batches)]), note, lambda result: result)


def materialising(
    problem: Problem,
    batches: Sequence[Tensor],
    codebook: Tensor,
    search: Callable[[Tensor, Tensor], Tensor],
    convert: bool = True,
) -> Prepared:
    """A search that writes ``[tokens, K]``, in chunks of tokens where the whole matrix would not fit.

    Args:
        problem: its sizes.
        batches: tokens ``[N, D]`` or ``[H, N, D]``.
        codebook: ``[K, D]`` or ``[H, K, D]``.
        search: of some tokens in the codebook.
        convert: half precision to float32, in the call.
    """
    chunk = tokens_per_chunk(problem, codebook.device)

    def call(x: Tensor) -> Tensor:
        codes = codebook.float() if convert else codebook
        parts = [search(part.float() if convert else part, codes) for part in x.split(chunk, dim=-2)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    return searching(batches, call, chunk_note(problem, chunk))


def tokens_per_chunk(problem: Problem, device: torch.device) -> int:
    """Tokens whose ``[tokens, K]`` float32 matrix, four times over for temporaries, takes half of the free memory."""
    if problem.whole:
        return problem.tokens
    values = available_memory() // 2 // (4 * 4) if device.type == "cpu" else _GPU_VALUES
    return max(1, values // (problem.codes * problem.heads))


def chunk_note(problem: Problem, chunk: int) -> str:
    """Says that a matrix did not fit; empty where it did."""
    return f"in chunks of {chunk} tokens" if chunk < problem.tokens else ""


def training(batches: Sequence[Tensor], forward: Forward) -> Prepared:
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
