"""What the ways to find the codes that can win have in common: :mod:`fastvq.cpu.scan_table`, `groups` and `coarse`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Over other numbers of tokens than multiples of this the maxima take twice as long.
_TOKENS_PER_MAXIMA = 32
# With more codes left a token is crowded: it is cheaper among distinct codes, or in the oracle. Bounds the memory of
# what is settled.
MOST = 64


class Candidates(NamedTuple):
    """The codes that can win of a block of tokens; none where no upper bound reaches what the token has already."""

    indices: Tensor  # [n] int64: the code, where only one can win, else -1
    owners: Tensor  # [pairs] int64: rows of the tokens for which several can,
    codes: Tensor  # [pairs] int64: and these codes
    crowded: Tensor  # int64: rows of the tokens for which very many can: many codes are alike


def even_pieces(n_tokens: int, most: int) -> int:
    """Tokens per piece, of nearly even pieces of ``most`` at most, or a little more."""
    pieces = -(-n_tokens // max(most, _TOKENS_PER_MAXIMA))
    return -(-n_tokens // (pieces * _TOKENS_PER_MAXIMA)) * _TOKENS_PER_MAXIMA


def joined(pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All first and all second tensors."""
    first, second = zip(*pieces, strict=True)
    return torch.cat(first), torch.cat(second)


def places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column, int64, of what is not 0 in ``mask [rows, columns]``, in ascending order.

    On a CPU by numpy, a third of the time.
    """
    on_cpu = mask.device.type == "cpu"
    at = torch.from_numpy(np.flatnonzero(mask.bool().numpy())) if on_cpu else mask.flatten().nonzero()[:, 0]
    rows = torch.div(at, mask.shape[1], rounding_mode="floor")
    return rows, at.sub_(rows, alpha=mask.shape[1])


def order_of(numbers: Tensor) -> Tensor:
    """The stable order of ``numbers [n]``. On a CPU by numpy, which only merges what ascends already."""
    if numbers.device.type == "cpu":
        return torch.from_numpy(np.argsort(numbers.numpy(), kind="stable"))
    return numbers.argsort(stable=True)


def without_crowded(owners: Tensor, others: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Pairs of a token and something, without the tokens of which ``counts [n]`` says more than ``most``."""
    if counts.amax() <= most:
        return owners, others
    left = (counts <= most).index_select(0, owners).nonzero()[:, 0]
    return owners.index_select(0, left), others.index_select(0, left)
