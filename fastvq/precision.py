"""Keeps reduced-precision settings of the caller out of the search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Float32 matrix products of PyTorch are float32 inside, whatever autocast or the caller's settings say.

    The error bounds of the search hold for float32 products only, and TF32 or bfloat16 may replace them, on the CPU as
    well. The setting is read and written where ``set_float32_matmul_precision`` and ``fp32_precision`` both end up:
    the function itself raises once a program has used the attributes.
    """
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    products = backend.matmul
    before = products.fp32_precision
    if before in ("none", "ieee") and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return _in_float32(device, products, before)


@contextmanager
def _in_float32(device: torch.device, products: Any, before: str) -> Iterator[None]:
    products.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        products.fp32_precision = before
