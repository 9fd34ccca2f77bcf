"""Matrix products as this processor computes them fastest."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def _is_amd() -> bool:
    try:
        with Path("/proc/cpuinfo").open() as file:
            described = file.read(1 << 10)  # of the first of maybe hundreds of cores
    except OSError:  # not Linux
        described = platform.processor()
    return "AuthenticAMD" in described


# There MKL, which ``torch.mm`` calls, uses half of the width of AVX-512, and multiplies few rows on one thread.
_AMD = _is_amd()
_AVX512_AMD = _AMD and torch.backends.cpu.get_cpu_capability() == "AVX512"
# A product of 1 MiB stays in the level-2 cache of a Xeon's core (2 MiB: half the speed). On an EPYC larger ones, in
# fewer calls, take a twentieth to a tenth less time in float32, a twentieth in bfloat16 up to 32 coordinates.
_BYTES_PER_THREAD = {torch.float32: 1 << (21 if _AMD else 20), torch.bfloat16: 1 << (22 if _AMD else 20)}
# Without AVX-512 oneDNN needs less time than MKL from so many results on, but for lengths in between: 0.6 of it with
# 640 x 1,024 x 8, 0.85 with 640 x 1,024 x 16, 0.9 with 512 x 2,048 x 256; 1.0 to 1.2 with 64 and 128 coordinates, 1.4
# with 640 x 256 x 16.
_MANY_RESULTS = 1 << 19
_IN_BETWEEN = range(41, 192)
# oneDNN compiles a product of a new size first, which takes half a millisecond: few sizes, whatever the tokens.
_MULTIPLE = 16
# With AVX-512 MKL needs less time only for fewer multiplications, or rows: 35 us each with 32 x 1,024 x 64, 5 against
# 15 with 16 x 256 x 32, 2 ms against 13 with 1 x 262,144 x 8.
_LEAST_WORK = 1 << 21
_FEWEST = 9
# So few rows MKL multiplies on one thread, unless it is given a product for each. From so many multiplications on that
# takes less time: 0.17 ms instead of 0.7 with 1 x 65,536 x 64; with 1 x 1,024 x 128 10 us instead of 9.
_LEAST_PARALLEL = 1 << 18


def bfloat16_units() -> str | None:
    """What makes products of bfloat16 take much less time on this processor than those of float32, if anything."""
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
        return None
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX-512 BF16" if torch.cpu._is_avx512_bf16_supported() else None


def product_values(dtype: torch.dtype = torch.float32) -> int:
    """Values of a product of which every thread finds its part in the caches."""
    return _BYTES_PER_THREAD[dtype] // dtype.itemsize * torch.get_num_threads()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a bᵀ + bias`` in float32, ``[m, n]``, for ``a [m, D]``, ``b [n, D]`` and ``bias [n]``."""
    if _AMD and a.is_cpu:
        if _onednn_pays(a, b):
            return _by_onednn(a, b, bias)
        if len(a) < _FEWEST and len(a) * b.numel() >= _LEAST_PARALLEL:
            return _in_parallel(a, b, bias)
    return F.linear(a, b, bias)


def _onednn_pays(a: Tensor, b: Tensor) -> bool:
    m, (n, dim) = len(a), b.shape
    enough = m * n * dim >= _LEAST_WORK if _AVX512_AMD else m * n >= _MANY_RESULTS and dim not in _IN_BETWEEN
    if min(m, n) < _FEWEST or not enough:
        return False
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _in_parallel(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`product` for few rows ``a``, every thread with its part of ``b``."""
    threads, (n, dim) = torch.get_num_threads(), b.shape
    if more := n % threads:
        biases = (None, None) if bias is None else (bias[:-more], bias[-more:])
        return torch.cat([_in_parallel(a, b[:-more], biases[0]), F.linear(a, b[-more:], biases[1])], 1)
    rows = n // threads
    parts = a.expand(threads, -1, -1), b.view(threads, rows, dim).mT
    products = torch.bmm(*parts) if bias is None else torch.baddbmm(bias.view(threads, 1, rows), *parts)
    return products.transpose(0, 1).reshape(len(a), n)


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    operands = _padded(a), _padded(b), bias if bias is None else _padded(bias)
    return torch.ops.mkldnn._linear_pointwise(*operands, "none", [], "")[: len(a), : len(b)]


def _padded(rows: Tensor) -> Tensor:
    """``rows [n, ...]``, and of zeros as many as lack to a multiple, contiguous: the operator reads no strides."""
    lacking = -len(rows) % _MULTIPLE
    return (F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, lacking]) if lacking else rows).contiguous()
