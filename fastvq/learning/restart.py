"""Random tokens that become codes: at the first batch, and in place of dead codes.

A draw proposes a token for each of the K codes, dead or not, because only the device knows which codes are dead.
Proposals of several batches or ranks are merged code by code, with odds of their numbers of tokens, so that every token
of all batches and ranks is equally likely.
"""

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.backends.operators import may_read
from fastvq.common import distributed
from fastvq.common.devices import float64_device

# The low bits of a key name the rank, so that no two ranks win the same code.
_RANK_BITS = 16


class Draw(NamedTuple):
    """A token for every code, ``rows [K, D]`` float32, drawn from ``n_tokens``, a scalar; 0: the rows mean nothing."""

    rows: Tensor
    n_tokens: Tensor


def draw_tokens(tokens: Tensor, real: Tensor, n_codes: int) -> Draw:
    """K random real tokens, without replacement while there are enough.

    Fewer than K tokens repeat with a little noise, ``0.01/√D`` (VideoGPT's rule). Where padding leaves fewer real
    tokens, a repeated token moves up to 1 % of the way to another, so that no two codes are the same.

    ``tokens [n, D]`` are float32; ``real [n]`` says which may be drawn.
    """
    n_tokens = real.sum()
    if len(tokens) == 0:
        return Draw(tokens.new_zeros(n_codes, tokens.shape[1]), n_tokens)
    tiled = tile(tokens, n_codes)
    real = real.repeat(-(-len(tiled) // len(tokens)))
    order = torch.randperm(len(tiled), device=tiled.device)
    # Real tokens first, in their random order; the draw starts over where they are fewer than K.
    # (gather: TorchInductor 2.13 fails to match its own pattern on an index by randperm.)
    order = order.gather(0, torch.argsort(~real.gather(0, order), stable=True))
    n_real, place = real.sum().clamp(min=1), torch.arange(n_codes, device=tiled.device)
    rows = tiled[order[place % n_real]]
    # A GPU would have to be waited for.
    if n_real.device.type == "cpu" and may_read(n_real) and n_real >= n_codes:
        return Draw(rows, n_tokens)
    turn = place // n_real
    others = tiled[order[(place + 1 + turn % (n_real - 1).clamp(min=1)) % n_real]]
    moved = torch.lerp(rows, others, (0.01 * turn / (turn + 1))[:, None])
    return Draw(torch.where(turn[:, None] > 0, moved, rows), n_tokens)


def tile(x: Tensor, n_codes: int) -> Tensor:
    """``x [n, D]`` if it has at least K rows, otherwise repeated with a little noise."""
    if len(x) >= n_codes or len(x) == 0:
        return x
    x = x.repeat(-(-n_codes // len(x)), 1)
    return x + torch.randn_like(x) * (0.01 / x.shape[1] ** 0.5)


def merge(first: Draw, second: Draw) -> Draw:
    """One draw from the tokens of both."""
    n_tokens = first.n_tokens + second.n_tokens
    chosen = torch.rand_like(first.rows[:, :1]) * n_tokens < second.n_tokens
    return Draw(torch.where(chosen, second.rows, first.rows), n_tokens)


def over_ranks(draw: Draw, sync: bool) -> tuple[Tensor, Tensor]:
    """One draw from the tokens of all ranks, the same on each: ``rows [K, D]``, and whether any rank has a token.

    A race decides for every code. Rank r arrives after an exponential time of rate ``n_r``, so that it wins with odds
    of ``n_r`` (Efraimidis and Spirakis 2006). A rank without tokens never arrives.
    """
    if not distributed.is_distributed(sync):
        return draw.rows, draw.n_tokens > 0
    device = float64_device(draw.rows.device)
    never, n_tokens = torch.full((), torch.inf, dtype=torch.float64, device=device), draw.n_tokens.to(device)
    rank, world_size = distributed.rank(), distributed.world_size()
    # Every rank draws for all ranks and takes its own number: ranks that were seeded alike differ too.
    uniform = torch.rand(world_size, len(draw.rows), dtype=torch.float64, device=device)[rank]
    arrival = torch.where(n_tokens > 0, -uniform.clamp(min=1e-300).log() / n_tokens, never)
    # Positive numbers are ordered as their bits are.
    keys = (arrival.view(torch.int64) >> _RANK_BITS << _RANK_BITS) | rank
    first = distributed.all_reduce_min(keys)
    is_mine = (first & ((1 << _RANK_BITS) - 1)) == rank
    found = first >> _RANK_BITS < never.view(torch.int64) >> _RANK_BITS
    rows = torch.where((is_mine & found)[:, None].to(draw.rows.device), draw.rows, 0)
    return distributed.all_reduce_sum(rows), found.all()


def draw_codes(batches: Iterable[tuple[Tensor, Tensor]], n_codes: int, sync: bool) -> tuple[Tensor, Tensor]:
    """:func:`over_ranks` of one draw from all ``batches`` of tokens ``[n, D]`` and which are real ``[n]``."""
    return over_ranks(reduce(merge, (draw_tokens(*batch, n_codes) for batch in batches)), sync)
