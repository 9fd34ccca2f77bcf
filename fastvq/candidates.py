"""What the ways to find the codes that can win have in common: :mod:`fastvq.small`, `whole`, `groups` and `coarse`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Over other numbers of tokens than multiples of this the maxima take twice as long.
_TOKENS_PER_MAXIMA = 32
# What a one in row k adds to the sum of its column is k more than this: the sum tells whether there is another, and the
# row if there is none. Exact in float32, for as many rows.
_ONE = 2.0**23
MOST_ROWS = int(_ONE)
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


def row_weights(n_rows: int, device: torch.device) -> Tensor:
    """``[rows]``: their product with a matrix of zeros and ones is what the functions below read. Up to MOST_ROWS.

    Comparing into bool takes several times longer than a product, and so does to look for what is true in all rows.
    """
    return torch.arange(_ONE, _ONE + n_rows, dtype=torch.float32, device=device)


def only_row(sums: Tensor) -> Tensor:
    """The row of the one in each column, int64, or -1 where there is none or more than one."""
    return torch.where((sums >= _ONE) & (sums < 2 * _ONE), sums - _ONE, -1).long()


def only_rows(sums: Tensor) -> Tensor | None:
    """:func:`only_row` of columns that each have at least one, in a few steps where none has more; else None."""
    return (sums - _ONE).long() if float(sums.amax()) < 2 * _ONE else None


def with_several(sums: Tensor) -> Tensor:
    """Columns with more than one, but not crowded."""
    return ((sums >= 2 * _ONE) & ~is_crowded(sums)).nonzero()[:, 0]


def is_crowded(sums: Tensor) -> Tensor:
    """Whether there are very many in each column."""
    return sums >= (MOST + 1) * _ONE


def at_most(sums: Tensor) -> float:
    """As many as there are ones in all columns, or up to twice as many."""
    return float(sums.double().sum()) / _ONE
