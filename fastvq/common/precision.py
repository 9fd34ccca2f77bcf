"""In which precision is computed, whatever the dtype of the tokens and the caller's settings."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# The setting belongs to the process: the first search that changes it remembers it, the last one puts it back.
_lock = threading.Lock()
_searches: Counter[str] = Counter()
_before: dict[str, str] = {}


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64, otherwise float32; PyTorch promotes no float8."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    """``x``, in float32 where it is float8: PyTorch computes with few of those dtypes, and kernels with none."""
    return x.float() if x.dtype.itemsize == 1 else x


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Float32 matrix products of PyTorch are float32 inside, whatever autocast or the caller's settings say.

    The error bounds of the search hold for float32 products only, and PyTorch may replace them by TF32 or bfloat16, on
    CPUs too. The setting is read and written where both ``set_float32_matmul_precision`` and ``fp32_precision`` end
    up: the function raises once a program has used the attributes.
    """
    if torch.compiler.is_compiling() or device.type == "meta":  # the settings would become part of the graph
        return torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext()
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
                # "none" follows the wider setting; its present value, written here, would outlast a change of that.
                products.fp32_precision = "none"
                if products.fp32_precision != _before[kind]:
                    products.fp32_precision = _before[kind]
