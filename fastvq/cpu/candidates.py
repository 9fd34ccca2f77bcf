"""Helpers shared by the CPU scans: the candidates they find, and pairs of tokens and codes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvq.cpu import tuning


class Candidates(NamedTuple):
    """The candidates of a block of tokens; none where no upper bound reaches the threshold that a token has already."""

    indices: Tensor  # [n] int64: the only candidate, -1 where there are several or none
    owners: Tensor  # [pairs] int64: the open tokens, and for each
    codes: Tensor  # [pairs] int64: a candidate
    crowded: Tensor  # int64: tokens with too many candidates, which have no pairs, and
    reached: Tensor  # [K] bool: the codes that may win one of these


def joined(blocks: Sequence[Candidates], step: int) -> Candidates:
    """The candidates of all blocks of ``step`` tokens."""
    if len(blocks) == 1:
        return blocks[0]
    indices, owners, codes, crowded, reached = zip(*blocks, strict=True)
    first = range(0, step * len(blocks), step)
    return Candidates(
        torch.cat(indices),
        torch.cat([block + i for block, i in zip(owners, first, strict=True)]),
        torch.cat(codes),
        torch.cat([block + i for block, i in zip(crowded, first, strict=True)]),
        torch.stack(reached).any(0),
    )


def even_blocks(n_tokens: int, most: int) -> int:
    """Tokens per block, of nearly even blocks of ``most`` at most, or a little more."""
    blocks = -(-n_tokens // max(most, tuning.TOKENS_PER_MAXIMA))
    return -(-n_tokens // (blocks * tuning.TOKENS_PER_MAXIMA)) * tuning.TOKENS_PER_MAXIMA


def concatenate(blocks: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All first and all second tensors."""
    first, second = zip(*blocks, strict=True)
    return torch.cat(first), torch.cat(second)


def nonzero_pairs(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column, int64, of the nonzero entries of ``mask [rows, columns]``, in ascending order.

    On a CPU by numpy, in a third of the time.
    """
    on_cpu = mask.device.type == "cpu"
    at = torch.from_numpy(np.flatnonzero(mask.bool().numpy())) if on_cpu else mask.flatten().nonzero()[:, 0]
    rows = torch.div(at, mask.shape[1], rounding_mode="floor")
    return rows, at.sub_(rows, alpha=mask.shape[1])


def stable_order(numbers: Tensor) -> Tensor:
    """The stable order of ``numbers [n]``. On a CPU by numpy, which only merges ascending runs."""
    if numbers.device.type == "cpu":
        return torch.from_numpy(np.argsort(numbers.numpy(), kind="stable"))
    return numbers.argsort(stable=True)


def up_to(most: int, counts: Tensor, owners: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of a token and something, without the tokens whose ``counts [n]`` are above ``most``."""
    if counts.amax() <= most:
        return owners, others
    few = (counts <= most).index_select(0, owners).nonzero()[:, 0]
    return owners.index_select(0, few), others.index_select(0, few)


def first_of_equal(rows: Tensor) -> Tensor:
    """For each of ``rows [n, D]`` the first row equal to it, int64 ``[n]``: nearly always, else the row itself."""
    weights = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=rows.device).sqrt()
    blocks = rows.split(max(1, tuning.PACK_VALUES // rows.shape[1]))
    # Equal rows have equal sums; other rows with that sum are told apart.
    _, group = torch.unique(torch.cat([(block * weights).sum(1) for block in blocks]), return_inverse=True)
    places = torch.arange(len(rows), device=rows.device)
    first = places.new_full((len(rows),), len(rows)).scatter_reduce_(0, group, places, "amin")[group]
    equal = [(block == rows[at]).all(1) for block, at in zip(blocks, first.split(len(blocks[0])), strict=True)]
    return torch.where(torch.cat(equal), first, places)
