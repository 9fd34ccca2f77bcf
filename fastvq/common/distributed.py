"""The collectives of a codebook: no-ops in a single process, and where ``sync`` is False.

No function branches on a value that differs between ranks, so that all ranks enter the same collectives.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed(sync: bool = True) -> bool:
    """Whether a process group with more than one rank exists and is wanted."""
    return sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank(sync: bool = True) -> int:
    """This process's rank, 0 without others."""
    return dist.get_rank() if is_distributed(sync) else 0


def world_size(sync: bool = True) -> int:
    """Number of processes, 1 without others."""
    return dist.get_world_size() if is_distributed(sync) else 1


def all_reduce_sum(tensor: Tensor, sync: bool = True) -> Tensor:
    """Sum of ``tensor`` over all ranks, in place."""
    if is_distributed(sync):
        dist.all_reduce(tensor)
    return tensor


def start_sums(tensors: tuple[Tensor, ...], sync: bool = True) -> Callable[[], tuple[Tensor, ...]]:
    """Start one all-reduce of all ``tensors``, of one dtype; the function returned waits for it and gives the sums."""
    if not is_distributed(sync):
        return lambda: tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    # A compiler traces the synchronous call and orders the wait itself.
    is_asynchronous = not torch.compiler.is_compiling()
    work = dist.all_reduce(flat, async_op=is_asynchronous)

    def finish() -> tuple[Tensor, ...]:
        if is_asynchronous:
            work.wait()
        parts = flat.split([tensor.numel() for tensor in tensors])
        return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))

    return finish


def all_reduce_min(tensor: Tensor, sync: bool = True) -> Tensor:
    """Smallest value of ``tensor`` over all ranks, elementwise and in place."""
    if is_distributed(sync):
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def broadcast_from_rank_0(tensor: Tensor, sync: bool = True) -> Tensor:
    """``tensor`` of rank 0 on every rank, in place."""
    if is_distributed(sync):
        dist.broadcast(tensor, 0)
    return tensor


def all_gather(tensor: Tensor, sync: bool = True) -> Tensor:
    """``tensor [n, ...]`` of every rank, one after the other: ``[world_size · n, ...]``; the same n everywhere."""
    if not is_distributed(sync):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
