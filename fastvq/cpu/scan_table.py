"""The scan of few codes, seen as a table: only the largest bound of each row and column is kept.

A candidate makes the maxima of its row and of its column reach the threshold. Where one row and one column reach it,
the candidate is the code where they cross, known without another look at the scores; where a few do, it is one of the
crossings.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.cpu import tuning
from fastvq.cpu.candidates import Candidates, even_blocks, nonzero_pairs
from fastvq.cpu.matmul import product, product_values
from fastvq.cpu.pack import PackedCodebook, pack_tokens, raise_threshold

# Each row and column that reaches the threshold adds this and its number to a sum. The sum tells whether there are
# several, and if not, which they are. Exact in float32 up to four of them.
ONE = 2.0**22


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
        for block, block_out in zip(tokens.split(self.step), largest.split(self.step), strict=True):
            scores = self.scores(block).view(-1, self.n_rows, self.n_columns)
            torch.amax(scores, 2, out=block_out[:, : self.n_rows])
            torch.amax(scores, 1, out=block_out[:, self.n_rows :])
            del scores  # the next scores take their place in the cache
        return largest

    def named(self, reaches: Tensor) -> Tensor:
        """For ``reaches [n, rows + columns]``, zeros and ones: the code where the only row and column cross.

        ``[n]`` float32, at least ONE where several rows or columns reach, negative where none does.
        """
        rows = torch.arange(self.n_rows, dtype=torch.float32, device=reaches.device).mul_(self.n_columns)
        columns = torch.arange(self.n_columns, dtype=torch.float32, device=reaches.device)
        return torch.mv(reaches, torch.cat([rows, columns]).add_(ONE)).sub_(2 * ONE)

    def candidates(
        self, tokens: Tensor, thresholds: Tensor, reaches: Tensor, open_tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates of ``open_tokens``, rows of ``tokens [n, D]`` with their ``thresholds [n, 1]``.

        The crossings of rows and columns that reach, ``reaches`` as above, where they are few; else the codes whose
        scores reach.

        Returns:
            Token and code of each, and the exhaustive tokens, which have none here.
        """
        found = [(open_tokens[:0],) * 3]
        for block in open_tokens.split(self.step):
            rows, columns = reaches.index_select(0, block).split([self.n_rows, self.n_columns], 1)
            can_win = torch.mul(rows[:, :, None], columns[:, None, :]).flatten(1)[:, : self.n_codes]
            many = (rows.sum(1) * columns.sum(1) > tuning.FEW_CROSSINGS).nonzero()[:, 0]
            if len(many):
                of = block.index_select(0, many)
                scores = self.scores(tokens.index_select(0, of))[:, : self.n_codes]
                can_win[many] = scores.ge_(thresholds.index_select(0, of))
            found.append(pairs(can_win, block))
        owners, codes, exhaustive = (torch.cat(blocks) for blocks in zip(*found, strict=True))
        return owners, codes, exhaustive


def pairs(can_win: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token and code of the ones in ``can_win [n, K]``, and the exhaustive ones of ``tokens [n]``, left out."""
    many = can_win.sum(1) > tuning.MOST_CANDIDATES
    rows, codes = nonzero_pairs(can_win.masked_fill_(many[:, None], 0))
    return tokens.index_select(0, rows), codes, tokens[many]


def search(x: Tensor, packed: PackedCodebook, threshold: Tensor) -> Candidates:
    """Candidates of one block of tokens ``[n, D]``.

    Raises ``threshold [n]``, the best lower bounds known of the best scores; NaN where scores might overflow.
    """
    n_rows, n_columns, width = packed.rows.shape
    tokens = threshold.new_empty(len(x), width)
    factors = pack_tokens(x, packed.frame, out=tokens)
    step = even_blocks(len(x), product_values() // (n_rows * n_columns))
    codes = packed.rows.view(-1, width)
    table = Table(lambda block: product(block, codes), packed.n_codes, n_rows, n_columns, step)
    maxima = table.maxima(tokens)
    raise_threshold(threshold, maxima[:, :n_rows].t(), packed, factors)
    thresholds = threshold[:, None]
    reaches = maxima.ge_(thresholds)
    numbers = table.named(reaches)
    open_tokens = (numbers >= ONE).nonzero()[:, 0]
    candidates = table.candidates(tokens, thresholds, reaches, open_tokens)
    return Candidates(numbers.masked_fill_((numbers < 0) | (numbers >= ONE), -1).long(), *candidates)
