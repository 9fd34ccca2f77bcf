"""``VectorQuantize`` of lucidrains' vector-quantize-pytorch."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.contenders.base import Contender, Prepared, searching, training
from bench.harness.problems import Problem


def version() -> str:
    """Of the distribution."""
    importlib.import_module("vector_quantize_pytorch")
    return f"vector-quantize-pytorch {importlib.metadata.version('vector-quantize-pytorch')}"


def search(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The module in evaluation; it also looks the codes up, and cannot be told not to."""
    module = _module(problem, codebook).eval()

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        return module(x[None])[1][0]

    return searching(batches, call)


def train(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The module with the decay and the commitment weight of the others, and without dead-code replacement."""
    module = _module(problem, codebook)

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = module(x[None])
        return quantized[0], indices[0], loss

    return training(batches, forward)


def _module(problem: Problem, codebook: Tensor) -> Any:
    package = importlib.import_module("vector_quantize_pytorch")
    module = package.VectorQuantize(problem.dim, codebook_size=problem.codes, decay=0.99, commitment_weight=0.25)
    state = module.state_dict()
    for name in ("embed", "embed_avg"):
        state[f"_codebook.{name}"] = codebook[None].float()
    state["_codebook.cluster_size"] = torch.ones_like(state["_codebook.cluster_size"])
    module.load_state_dict(state)
    return module.to(codebook.device)


CONTENDER = Contender(version, search, train)
