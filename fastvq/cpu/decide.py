"""The winner among a few candidates per token, by the oracle's own float64 arithmetic."""

import torch
from torch import Tensor

from fastvq import reference
from fastvq.cpu import tuning


def decide(x: Tensor, codebook: Tensor, owners: Tensor, candidates: Tensor, metric: str, out: Tensor) -> None:
    """Write to ``out [N]`` the winner of every open token: the lowest of the candidates with the best score.

    ``owners`` and ``candidates``, int64 ``[pairs]`` in any order, are token and code of each pair.
    """
    step = max(1, tuning.DECIDE_VALUES // x.shape[1])
    blocks = zip(owners.split(step), candidates.split(step), strict=True)
    score = torch.cat([_pair_score(x[tokens], codebook[codes], metric) for tokens, codes in blocks])
    best = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    best.scatter_reduce_(0, owners, score, "amax")
    winners = score == best[owners]
    out.scatter_reduce_(0, owners[winners], candidates[winners], "amin", include_self=False)


def _pair_score(tokens: Tensor, codes: Tensor, metric: str) -> Tensor:
    """:func:`fastvq.reference.pair_score` of rows. On a CPU a running sum adds in ascending order, in one call."""
    tokens, codes = tokens.double(), codes.double()
    if tokens.device.type != "cpu":
        return reference.pair_score(tokens.t().contiguous(), codes.t().contiguous(), metric)
    terms = (tokens - codes).square_() if metric == "euclidean" else tokens * codes
    score = terms.cumsum(1)[:, -1]
    if metric == "cosine":
        norm = reference.root(codes.square().cumsum(1)[:, -1])
        return torch.where(norm > 0, score / norm, 0.0)
    return -score if metric == "euclidean" else score
