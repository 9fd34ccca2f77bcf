"""Which codes can win where there are few, seen as a table of which only the largest of each row and column is kept.

A code that reaches the limit of its token makes the maxima of its row and its column reach it. Where one row and one
column do, it is the code where they cross, known without another look at the scores.

:mod:`fastvq.cpu` derives the bounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvq.candidates import MOST, Candidates, even_pieces, joined, places
from fastvq.packed import PackedCodebook, pack_tokens, raise_lower
from fastvq.products import product, product_values

# With more codes it takes longer to look at every score twice than to score those of the best group again.
MOST_CODES = 2048
# What each row and column that reaches the limit adds to a sum, beside its number: the sum tells whether there is
# another, and if not, which they are. Exact in float32 up to four of them.
ONE = 2.0**22
Scores = Callable[[Tensor], Tensor]  # of tokens [n, D]: [n, K]


def search(x: Tensor, packed: PackedCodebook, lower: Tensor) -> Candidates:
    """Candidates of one block of tokens ``[n, D]``.

    Raises ``lower [n]``, the best lower bounds that are known of the tokens; NaN where a token may not be compared.
    """
    n_rows, n_columns, width = packed.rows.shape
    tokens, codes = lower.new_empty(len(x), width), packed.rows.view(-1, width)
    to_lower = pack_tokens(x, packed.frame, out=tokens)
    step = even_pieces(len(x), product_values() // len(codes))

    def scores(some: Tensor) -> Tensor:
        return product(some, codes)

    kept = maxima(scores, tokens, n_rows, n_columns, step)
    raise_lower(lower, kept[:, :n_rows].t(), packed, to_lower)
    limits = lower[:, None]
    numbers = crossing(kept.ge_(limits), n_rows, n_columns)
    several = (numbers >= ONE).nonzero()[:, 0]
    indices = numbers.masked_fill_((numbers < 0) | (numbers >= ONE), -1).long()
    return Candidates(indices, *reaching(scores, tokens, limits, several, step))


def maxima(scores: Scores, tokens: Tensor, n_rows: int, n_columns: int, step: int) -> Tensor:
    """The largest score of each row, then of each column, ``[n, rows + columns]``, of ``step`` tokens at a time."""
    largest = tokens.new_empty(len(tokens), n_rows + n_columns)
    for some, of_some in zip(tokens.split(step), largest.split(step), strict=True):
        table = scores(some).view(-1, n_rows, n_columns)
        torch.amax(table, 2, out=of_some[:, :n_rows])
        torch.amax(table, 1, out=of_some[:, n_rows:])
        del table  # the next takes its place in the cache
    return largest


def only(reaches: Tensor) -> Tensor:
    """For ``reaches [n, K]``, zeros and ones, each with a one: its number, at least ONE where there are more."""
    n_codes = reaches.shape[1]
    return torch.mv(reaches, torch.arange(ONE, ONE + n_codes, dtype=torch.float32, device=reaches.device)).sub_(ONE)


def crossing(reaches: Tensor, n_rows: int, n_columns: int) -> Tensor:
    """For ``reaches [n, rows + columns]``, zeros and ones: the number of the code where the only row and column cross.

    ``[n]`` float32, at least ONE where several rows or columns reach, negative where none does.
    """
    rows = torch.arange(n_rows, dtype=torch.float32, device=reaches.device).mul_(n_columns)
    columns = torch.arange(n_columns, dtype=torch.float32, device=reaches.device)
    return torch.mv(reaches, torch.cat([rows, columns]).add_(ONE)).sub_(2 * ONE)


def reaching(
    scores: Scores, tokens: Tensor, limits: Tensor, several: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens ``several``, rows of ``tokens [n, D]``, the codes whose scores reach their ``limits [n, 1]``.

    Returns:
        Token and code of each, and the tokens that are left out because too many do.
    """
    pairs, crowded = [(several[:0], several[:0])], [several[:0]]
    for some in several.split(step):
        reaches = scores(tokens.index_select(0, some)).ge_(limits.index_select(0, some))
        pair = named(reaches)
        pairs.append((some.index_select(0, pair[0]), pair[1]))
        crowded.append(some.index_select(0, pair[2]))
    return *joined(pairs), torch.cat(crowded)


def named(reaches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the ones in ``reaches [n, K]``, and the rows that are left out because they have too many."""
    many = reaches.sum(1) > MOST
    return *places(reaches.masked_fill_(many[:, None], 0)), many.nonzero()[:, 0]
