"""Helpers of every launcher: sizes, the layout that kernels read, and the chip they run on."""

from functools import cache

import torch
import triton
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own cdiv is made for kernels and takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


def dense(rows: Tensor) -> Tensor:
    """`rows` without gaps, at an address divisible by 16: itself, or a copy, which costs little beside the search.

    The compiler knows the alignment of every row from D alone, kernels take no strides, and no launch compiles again
    for other strides or another offset.
    """
    rows = rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, which knows no inline assembly."""
    return bool(triton.knobs.runtime.interpret)


def current_target() -> str:
    """The chip family whose configurations apply; the interpreter and unknown devices take those of sm_80."""
    if is_interpreted() or not _has_gpu():
        return "sm_80"
    return _target_of(torch.cuda.current_device())


@cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


@cache
def _target_of(device: int) -> str:
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def all_registers() -> dict[str, int]:
    """The compiler option that lets a thread have all registers; only CUDA knows it.

    Without it the assembler spills a few registers to make room for one program more on each SM.
    """
    return {} if current_target() == "gfx942" else {"maxnreg": 255}


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU, asked once; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
