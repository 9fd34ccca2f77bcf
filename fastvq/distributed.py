"""The two collectives of a codebook; both are no-ops in a single process."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group with more than one rank exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of ``tensor`` over all ranks, in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_rank_0(tensor: Tensor) -> Tensor:
    """``tensor`` of rank 0 on every rank, in place."""
    if is_distributed():
        dist.broadcast(tensor, 0)
    return tensor
