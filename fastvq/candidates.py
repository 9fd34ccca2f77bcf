"""What the ways to find the codes that can win have in common: :mod:`fastvq.whole` and :mod:`fastvq.groups`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A token with more codes left is cheaper among distinct codes, or in the oracle. Bounds the memory of what is settled.
MAX_CODES = 64
# Over other numbers of tokens than multiples of this the maxima take twice as long.
TOKENS_PER_MAXIMA = 32
# float32 counts no further.
LARGEST_COUNT = 1 << 24
# A product of 512 x 512 float32 values (1 MiB) stays in the level-2 cache of one core (2 MiB: half the speed).
_VALUES_PER_THREAD = 1 << 18


class Candidates(NamedTuple):
    """The codes that can win of a block of tokens.

    Open remain tokens that are not finite, out of float32's range, or crowded: many codes are alike.
    """

    indices: Tensor  # [n] int64: the code, where only one can win, else -1
    owners: Tensor  # [pairs] int64: rows of the tokens for which several can,
    codes: Tensor  # [pairs] int64: and these codes


def product_values() -> int:
    """Float32 values of a product of which every thread reads its part from its own cache."""
    return _VALUES_PER_THREAD * torch.get_num_threads()


def count(reaches: Tensor) -> tuple[Tensor, Tensor]:
    """For a matrix of zeros and ones: ones per column, and the number of the row with the one where there is one.

    In float32, since comparing into bool and finding what is true take many times longer than a product. Up to
    LARGEST_COUNT rows.
    """
    counts, sums = counters(len(reaches), reaches.device) @ reaches
    return counts, sums.long()


def counters(n_rows: int, device: torch.device) -> Tensor:
    """``[2, rows]``: multiplied by a matrix of zeros and ones, ones per column and the sums of their rows' numbers."""
    numbers = torch.arange(n_rows, dtype=torch.float32, device=device)
    return torch.stack([torch.ones_like(numbers), numbers])
