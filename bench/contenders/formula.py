"""``argmin |x|² - 2 x·Eᵀ + |E|²``: the formula of VideoGPT, TATS and ESM3, as written and in its usual variants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.contenders.base import Contender, Prepared, materialising, torch_version, training
from bench.harness.outcome import DoesNotApplyError
from bench.harness.problems import Problem
from fastvq import reference

_Search = Callable[[Tensor, Tensor], Tensor]


def search(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The formula in float32, heads one by one."""

    def formula(x: Tensor, codes: Tensor) -> Tensor:
        if x.dim() == 2:
            return reference.nearest_code_expanded(x, codes, problem.metric)
        return torch.stack(
            [reference.nearest_code_expanded(*head, problem.metric) for head in zip(x, codes, strict=True)]
        )

    return materialising(problem, batches, codebook, formula)


def search_compiled(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The formula under ``torch.compile``, for all sizes at once: compiling is not timed."""
    return materialising(problem, batches, codebook, _compiled())


def _compiled() -> _Search:
    if not _CACHE:
        _CACHE.append(torch.compile(reference.nearest_code_expanded, dynamic=True))
    return _CACHE[0]


_CACHE: list[_Search] = []


def search_as_given(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The formula in the precision of its inputs, as a module in half precision computes it."""
    _needs_half(problem)
    return materialising(problem, batches, codebook, reference.nearest_code_expanded, convert=False)


def search_half_product(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The product in half precision and the norms in float32, as autocast computes it on a GPU."""
    _needs_half(problem)

    def formula(x: Tensor, codes: Tensor) -> Tensor:
        squares = x.float().square().sum(1, keepdim=True), codes.float().square().sum(1)
        return (squares[0] - 2 * (x @ codes.t()) + squares[1]).argmin(1)

    return materialising(problem, batches, codebook, formula, convert=False)


def _needs_half(problem: Problem) -> None:
    if problem.dtype == torch.float32:
        raise DoesNotApplyError("half precision only")


def train(problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The published module with its EMA update, :class:`fastvq.reference.EMACodebook`."""
    module = reference.EMACodebook(problem.codes, problem.dim)
    module.embeddings.copy_(codebook)
    module.z_avg.copy_(codebook)
    module.N.fill_(1)
    module._need_init = False
    return training(batches, module.to(codebook.device))


CONTENDER = Contender(torch_version, search, train)
COMPILED = Contender(torch_version, search_compiled)
AS_GIVEN = Contender(torch_version, search_as_given)
HALF_PRODUCT = Contender(torch_version, search_half_product)
