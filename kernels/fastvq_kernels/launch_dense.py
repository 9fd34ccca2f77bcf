"""The one memory layout the kernels read, so that no launch compiles again for other strides or another offset."""

from torch import Tensor


def dense(rows: Tensor) -> Tensor:
    """`rows` without gaps, at an address divisible by 16: itself, or a copy, whose cost is nothing beside the search.

    The compiler then knows the alignment of every row from D alone, and the kernels take no strides.
    """
    rows = rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()
