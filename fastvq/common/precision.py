"""Keeps reduced-precision settings of the caller out of the search."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

# The setting is the process's: the first search to change it remembers what it was, the last one puts that back.
_lock = threading.Lock()
_searches: Counter[str] = Counter()
_before: dict[str, str] = {}


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Float32 matrix products of PyTorch are float32 inside, whatever autocast or the caller's settings say.

    The error bounds of the search hold for float32 products only, and TF32 or bfloat16 may replace them, on the CPU as
    well. The setting is read and written where ``set_float32_matmul_precision`` and ``fp32_precision`` both end up:
    the function itself raises once a program has used the attributes.
    """
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    products, kind = backend.matmul, device.type
    if products.fp32_precision in ("none", "ieee") and not torch.is_autocast_enabled(kind) and not _searches[kind]:
        return nullcontext()
    return _in_float32(kind, products)


@contextmanager
def _in_float32(kind: str, products: Any) -> Iterator[None]:
    with _lock:
        if not _searches[kind]:
            _before[kind] = products.fp32_precision
            products.fp32_precision = "ieee"
        _searches[kind] += 1
    try:
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        with _lock:
            _searches[kind] -= 1
            if not _searches[kind]:
                # What a wider setting decides is left to it: written down here, it would outlast a change of that.
                products.fp32_precision = "none"
                if products.fp32_precision != _before[kind]:
                    products.fp32_precision = _before[kind]
