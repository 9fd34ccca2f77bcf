"""Keeps reduced-precision settings of the caller out of the search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 matrix products of PyTorch are float32 inside, whatever autocast or the caller's settings say.

    The error bounds of the search hold for float32 products only, and TF32 or bfloat16 may replace them, on the CPU as
    well. The setting is read and written where ``set_float32_matmul_precision`` and ``fp32_precision`` both end up:
    the function itself raises once a program has used the attributes.
    """
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    products = backend.matmul
    before = products.fp32_precision
    reduced = before not in ("none", "ieee")
    if reduced:
        products.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext():
            yield
    finally:
        if reduced:
            products.fp32_precision = before
