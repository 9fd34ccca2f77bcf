"""Keeps reduced-precision settings of the caller out of the search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 matrix products are float32 inside, whatever autocast or ``set_float32_matmul_precision`` say.

    The error bounds of the search hold for float32 products only, and ``"high"`` or ``"medium"`` replace them
    by TF32 or bfloat16, on the CPU as well.
    """
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
