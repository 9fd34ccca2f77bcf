"""Which codes can win where there are few, seen as a table of which only the largest of each row and column is kept.

A code that reaches the limit of its token makes the maxima of its row and its column reach it. Where one row and one
column do, it is the code where they cross, known without another look at the scores; where a few do, one of those.

:mod:`fastvq.cpu.search` derives the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.cpu.candidates import MOST, Candidates, even_pieces, places
from fastvq.cpu.matmul import product, product_values
from fastvq.cpu.pack import PackedCodebook, pack_tokens, raise_lower

# With more codes it takes longer to look at every score twice than to score those of the best group again.
MOST_CODES = 2048
# What each row and column that reaches the limit adds to a sum, beside its number: the sum tells whether there is
# another, and if not, which they are. Exact in float32 up to four of them.
ONE = 2.0**22
# Where more rows and columns reach, and cross, the scores are looked at again.
_FEW_CROSSINGS = 16


class Each(NamedTuple):
    """Codes of which every score is kept, where there are few: used like a :class:`Table`."""

    scores: Callable[[Tensor], Tensor]  # of tokens [n, D]: [n, K]

    def maxima(self, tokens: Tensor) -> Tensor:
        """The scores, ``[n, K]``."""
        return self.scores(tokens)

    def named(self, reaches: Tensor) -> Tensor:
        """For ``reaches [n, K]``, zeros and ones, each with a one: its code, at least ONE where there are more."""
        codes = torch.arange(ONE, ONE + reaches.shape[1], dtype=torch.float32, device=reaches.device)
        return torch.mv(reaches, codes).sub_(ONE)

    def reaching(
        self, tokens: Tensor, limits: Tensor, reaches: Tensor, several: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token and code of the ones in the rows ``several``, and those rows that are left out: with very many."""
        return _pairs(reaches.index_select(0, several), several)


class Table(NamedTuple):
    """Codes in rows, whose scores are computed for ``step`` tokens at a time."""

    scores: Callable[[Tensor], Tensor]  # of tokens [n, D]: [n, rows · columns]
    n_codes: int  # the others fill the last row and cannot win
    n_rows: int
    n_columns: int
    step: int

    def maxima(self, tokens: Tensor) -> Tensor:
        """The largest score of each row, then of each column, ``[n, rows + columns]``."""
        largest = tokens.new_empty(len(tokens), self.n_rows + self.n_columns)
        for some, of_some in zip(tokens.split(self.step), largest.split(self.step), strict=True):
            scores = self.scores(some).view(-1, self.n_rows, self.n_columns)
            torch.amax(scores, 2, out=of_some[:, : self.n_rows])
            torch.amax(scores, 1, out=of_some[:, self.n_rows :])
            del scores  # the next take their place in the cache
        return largest

    def named(self, reaches: Tensor) -> Tensor:
        """For ``reaches [n, rows + columns]``, zeros and ones: the code where the only row and column cross.

        ``[n]`` float32, at least ONE where several rows or columns reach, negative where none does.
        """
        rows = torch.arange(self.n_rows, dtype=torch.float32, device=reaches.device).mul_(self.n_columns)
        columns = torch.arange(self.n_columns, dtype=torch.float32, device=reaches.device)
        return torch.mv(reaches, torch.cat([rows, columns]).add_(ONE)).sub_(2 * ONE)

    def reaching(
        self, tokens: Tensor, limits: Tensor, reaches: Tensor, several: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes that can win of the tokens ``several``, rows of ``tokens [n, D]`` with their ``limits [n, 1]``.

        Those where few rows and columns that reach cross, ``reaches`` as above; else those whose scores reach.

        Returns:
            Token and code of each, and the tokens that are left out because too many do.
        """
        found = [(several[:0],) * 3]
        for some in several.split(self.step):
            rows, columns = reaches.index_select(0, some).split([self.n_rows, self.n_columns], 1)
            can_win = torch.mul(rows[:, :, None], columns[:, None, :]).flatten(1)[:, : self.n_codes]
            many = (rows.sum(1) * columns.sum(1) > _FEW_CROSSINGS).nonzero()[:, 0]
            if len(many):
                of = some.index_select(0, many)
                scores = self.scores(tokens.index_select(0, of))[:, : self.n_codes]
                can_win[many] = scores.ge_(limits.index_select(0, of))
            found.append(_pairs(can_win, some))
        owners, codes, crowded = (torch.cat(parts) for parts in zip(*found, strict=True))
        return owners, codes, crowded


def search(x: Tensor, packed: PackedCodebook, lower: Tensor) -> Candidates:
    """Candidates of one block of tokens ``[n, D]``.

    Raises ``lower [n]``, the best lower bounds that are known of the tokens; NaN where a token may not be compared.
    """
    n_rows, n_columns, width = packed.rows.shape
    tokens = lower.new_empty(len(x), width)
    to_lower = pack_tokens(x, packed.frame, out=tokens)
    step = even_pieces(len(x), product_values() // (n_rows * n_columns))
    codes = packed.rows.view(-1, width)
    table = Table(lambda some: product(some, codes), packed.n_codes, n_rows, n_columns, step)
    kept = table.maxima(tokens)
    raise_lower(lower, kept[:, :n_rows].t(), packed, to_lower)
    limits = lower[:, None]
    reaches = kept.ge_(limits)
    numbers = table.named(reaches)
    several = (numbers >= ONE).nonzero()[:, 0]
    candidates = table.reaching(tokens, limits, reaches, several)
    return Candidates(numbers.masked_fill_((numbers < 0) | (numbers >= ONE), -1).long(), *candidates)


def _pairs(can_win: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token and code of the ones in ``can_win [n, K]``, and those of ``tokens [n]`` left out: with very many."""
    many = can_win.sum(1) > MOST
    rows, codes = places(can_win.masked_fill_(many[:, None], 0))
    return tokens.index_select(0, rows), codes, tokens[many]
