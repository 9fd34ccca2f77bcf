"""Sums of tokens by code that are added up when they are asked for, some codes at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

# Float64 values at a time (1 MiB), of the codes and of their tokens.
_VALUES = 1 << 17


class TokenSums(NamedTuple):
    """Sums of tokens on the CPU, in float64; the tokens stay as they are until the sums are read.

    The sums of a large codebook take twice its memory. A block of them stays in the cache until it is used.
    """

    x: Tensor  # [N, D], floating
    indices: Tensor  # int64 [N], each in [-1, K); -1 is left out
    n_codes: int  # K

    def counts(self) -> Tensor:
        """Tokens of each code, int64 ``[K]``."""
        # A tensor of its own: compiled code wants the results of an operator aligned.
        return torch.bincount(self.indices + 1, minlength=self.n_codes + 1)[1:].clone()

    def of(self, codes: slice) -> Tensor:
        """Float64 ``[k, D]`` of consecutive codes, a new tensor. The tokens of a code are added in their order."""
        rows = ((self.indices >= codes.start) & (self.indices < codes.stop)).nonzero()[:, 0]
        dim, has_all = self.x.shape[1], len(rows) == len(self.x)
        shape = min(codes.stop, self.n_codes) - codes.start, dim
        sums = self.x.new_zeros(shape, dtype=torch.float64)
        size = max(1, _VALUES // dim)
        for first in range(0, len(rows), size):
            if has_all:
                tokens, own = self.x[first : first + size], self.indices[first : first + size]
            else:  # index_select takes a quarter of the time of an index
                block = rows[first : first + size]
                tokens, own = self.x.index_select(0, block), self.indices.index_select(0, block)
            sums.index_add_(0, own - codes.start, tokens.double())
        return sums

    def all(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """All sums ``[K, D]``, rounded once to ``dtype``."""
        size = max(1, _VALUES // self.x.shape[1])
        sums = self.x.new_empty(self.n_codes, self.x.shape[1], dtype=dtype)
        for first in range(0, self.n_codes, size):
            sums[first : first + size] = self.of(slice(first, first + size))
        return sums
