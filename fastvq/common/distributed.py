"""The collectives of a codebook among the ranks that share it: no-ops in a single process.

No function branches on a value that differs between ranks, so that all ranks enter the same collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastvq.common.checks import describe


class LostGroup:
    """Stands in a pickle for a process group, which belongs to its processes."""


class Ranks(NamedTuple):
    """The processes that share a codebook: those of ``group``, by default all; this one alone without ``sync``.

    Copies share the group. Pickles do not hold it: a collective among the ranks of a pickle raises.
    """

    sync: bool = True
    group: Any = None  # a ProcessGroup; in a pickle LostGroup

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self

    def __reduce__(self) -> tuple[type[Ranks], tuple[bool, LostGroup | None]]:
        return Ranks, (self.sync, None if self.group is None else LostGroup())


ALL = Ranks()
ALONE = Ranks(sync=False)


def check_group(group: object) -> None:
    """Raises where ``group`` is neither None nor a process group of this rank.

    Raises:
        TypeError: ``group`` is something else; ``torch.distributed.new_group`` gives other ranks a number.
    """
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        hint = "; a rank outside the group passes sync=False" if group == dist.GroupMember.NON_GROUP_MEMBER else ""
        raise TypeError(f"process_group must be a process group that holds this rank, got {describe(group)}{hint}")


def is_distributed(ranks: Ranks = ALL) -> bool:
    """Whether there are other ranks to share with.

    Raises:
        RuntimeError: the group was lost in a pickle.
    """
    if not (ranks.sync and dist.is_available() and dist.is_initialized()):
        return False
    if isinstance(ranks.group, LostGroup):
        raise RuntimeError("a pickle does not hold the process group: assign module.process_group, or None for all")
    return dist.get_world_size(ranks.group) > 1


def rank(ranks: Ranks = ALL) -> int:
    """This process's rank in the group, 0 without others."""
    return dist.get_rank(ranks.group) if is_distributed(ranks) else 0


def world_size(ranks: Ranks = ALL) -> int:
    """Number of processes, 1 without others."""
    return dist.get_world_size(ranks.group) if is_distributed(ranks) else 1


def all_reduce_sum(tensor: Tensor, ranks: Ranks = ALL) -> Tensor:
    """Sum of ``tensor`` over all ranks, in place."""
    if is_distributed(ranks):
        dist.all_reduce(tensor, group=ranks.group)
    return tensor


def start_sums(tensors: tuple[Tensor, ...], ranks: Ranks = ALL) -> Callable[[], tuple[Tensor, ...]]:
    """Start one all-reduce of all ``tensors``, of one dtype; the function returned waits for it and gives the sums."""
    if not is_distributed(ranks):
        return lambda: tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    # A compiler traces the synchronous call and orders the wait itself.
    is_asynchronous = not torch.compiler.is_compiling()
    work = dist.all_reduce(flat, group=ranks.group, async_op=is_asynchronous)

    def finish() -> tuple[Tensor, ...]:
        if is_asynchronous:
            work.wait()
        parts = flat.split([tensor.numel() for tensor in tensors])
        return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))

    return finish


def all_reduce_min(tensor: Tensor, ranks: Ranks = ALL) -> Tensor:
    """Smallest value of ``tensor`` over all ranks, elementwise and in place."""
    if is_distributed(ranks):
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=ranks.group)
    return tensor


def broadcast_from_first(tensor: Tensor, ranks: Ranks = ALL) -> Tensor:
    """``tensor`` of the group's first rank on every rank, in place."""
    if is_distributed(ranks):
        dist.broadcast(tensor, group=ranks.group, group_src=0)
    return tensor


def all_gather(tensor: Tensor, ranks: Ranks = ALL) -> Tensor:
    """``tensor [n, ...]`` of every rank, one after the other: ``[world_size · n, ...]``; the same n everywhere."""
    if not is_distributed(ranks):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size(ranks))]
    dist.all_gather(parts, tensor.contiguous(), group=ranks.group)
    return torch.cat(parts)
