"""The scan of codes as they are, where packing costs more than it saves: few codes, or few tokens.

Every score is computed. Candidates are the codes whose score reaches the largest score of their token less a margin
(:class:`fastvq.cpu.bounds.Margin`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.cpu import bounds, tuning
from fastvq.cpu.bounds import Margin
from fastvq.cpu.candidates import Candidates, even_blocks, joined, nonzero_pairs
from fastvq.cpu.matmul import product, product_values

# Each code that reaches the threshold adds this and its number to a sum. The sum tells whether there are several, and
# if not, which it is. Exact in float32 up to as many codes.
ONE = 2.0**22


class PlainCodes(NamedTuple):
    """The codes as they are compared: shifted, or divided by their norms for the cosine."""

    rows: Tensor  # [K, D] float32 or float64
    shift: Tensor | None  # [D] float32: m
    bias: Tensor | None  # [K]: added to the products
    names: Tensor  # [K]: ONE + k
    none: Tensor  # [K] bool: no code
    margin: Margin
    shortest: float  # norm; the longest as well for the other metrics, where long codes win
    longest: float  # NaN where the codes cannot be compared


def plain_codes(codebook: Tensor, metric: str, shift: Tensor | None, dtype: torch.dtype) -> PlainCodes:
    """``codebook [K, D]`` for :func:`search` in ``dtype``, float32 or float64."""
    rows, bias = _shifted(codebook, shift, dtype), None
    norms = torch.linalg.vector_norm(rows, dim=1)
    names = torch.arange(ONE, ONE + len(rows), dtype=dtype, device=rows.device)
    shortest, longest = (float(norm) for norm in torch.aminmax(norms))
    in_range = longest < bounds.LARGEST_NORM[dtype]
    if metric == "euclidean":
        bias = norms.square_().mul_(-0.5)
    elif metric == "cosine":
        rows = rows / norms[:, None]
        in_range = in_range and shortest > bounds.LEAST_COSINE_NORM
        longest = 1 + bounds.error_constant(rows.shape[1], dtype)
    longest = longest if in_range else math.nan
    shortest = shortest if metric == "euclidean" else longest
    none = torch.zeros_like(names, dtype=torch.bool)
    return PlainCodes(rows, shift, bias, names, none, bounds.margin(longest, rows, metric), shortest, longest)


def _shifted(rows: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    if shift is None:
        return rows.to(dtype)
    return (rows.to(torch.promote_types(rows.dtype, dtype)) - shift).to(dtype)


def are_comparable(x: Tensor, codes: PlainCodes) -> bool:
    """Whether one margin serves for tokens ``x [N, D]`` and all codes.

    A code longer than twice the longest token and the shortest code can win no token. Much longer ones would leave all
    tokens open.
    """
    if math.isnan(codes.longest):
        return False
    if codes.longest <= tuning.LONG_CODE * codes.shortest:
        return True
    tokens = _shifted(x, codes.shift, codes.rows.dtype)
    longest_token = float(torch.linalg.vector_norm(tokens, dim=1).amax())
    return not codes.longest > tuning.LONG_CODE / 4 * (2 * longest_token + codes.shortest)


def search(x: Tensor, codes: PlainCodes) -> Candidates:
    """Candidates of tokens ``x [N, D]``, at least one, with ``s = 1``.

    Finite tokens that may leave the range are crowded.
    """
    n, n_codes = x.shape[0], codes.names.shape[0]
    if n * n_codes <= tuning.FEW_SCORES or n <= tuning.FEW_TOKENS:
        return _search(x, codes)
    step = even_blocks(n, min(tuning.TOKENS_PER_BLOCK, product_values(codes.rows.dtype) // n_codes))
    return joined([_search(block, codes) for block in x.split(step)], step)


def _search(x: Tensor, codes: PlainCodes) -> Candidates:
    """:func:`search` in one product."""
    tokens = _shifted(x, codes.shift, codes.rows.dtype)
    norms = torch.linalg.vector_norm(tokens, dim=1, keepdim=True)
    if tokens.dtype == torch.float64:
        # The oracle's own squares may overflow.
        norms.masked_fill_(norms >= bounds.LARGEST_NORM[torch.float64], torch.nan)
    scores = product(tokens, codes.rows, codes.bias)
    reaches = scores.ge_(scores.amax(1, keepdim=True).sub_(codes.margin.of(norms)))
    numbers = torch.mv(reaches, codes.names).sub_(ONE)
    least, most = torch.aminmax(numbers)
    indices = numbers.long()
    if float(least) >= 0 and float(most) < ONE:
        none = indices[:0]
        return Candidates(indices, none, none, none, codes.none)
    open_tokens = (numbers >= ONE).nonzero()[:, 0]
    reaches = reaches.index_select(0, open_tokens)
    is_crowded = reaches.sum(1) > tuning.most_candidates(len(codes.rows))
    reached = torch.mv(reaches.t(), is_crowded.to(reaches.dtype)) > 0
    few = (~is_crowded).nonzero()[:, 0]
    rows, candidates = nonzero_pairs(reaches.index_select(0, few))
    owners, crowded = open_tokens[few][rows], open_tokens[is_crowded]
    # Tokens without a candidate, because their threshold is NaN.
    beyond = (numbers < 0).nonzero()[:, 0]
    if len(beyond := beyond[torch.isfinite(x[beyond]).all(1)]):
        crowded, reached = torch.cat([crowded, beyond]), torch.ones_like(reached)
    indices.masked_fill_((numbers < 0) | (numbers >= ONE), -1)
    return Candidates(indices, owners, candidates, crowded, reached)
