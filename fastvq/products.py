"""Matrix products as this processor computes them fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A product of 1 MiB stays in the level-2 cache of a Xeon's core (2 MiB: half the speed). On an EPYC larger ones, in
# fewer calls, take a twentieth to a tenth less time in float32, a twentieth in bfloat16 up to 32 coordinates.
_BYTES_PER_THREAD = {
    torch.float32: {None: 1 << 20, "AMX": 1 << 20, "AVX-512 BF16": 1 << 21},
    torch.bfloat16: {None: 1 << 20, "AMX": 1 << 20, "AVX-512 BF16": 1 << 22},
}
# oneDNN compiles a product of a new size first, which takes half a millisecond: few sizes, whatever the tokens.
_MULTIPLE = 16
# Of fewer multiplications, or rows, it takes longer than MKL: 35 us each with 32 x 1,024 x 64, 15 us against 5 with
# 16 x 256 x 32, 13 ms against 2 with 1 x 262,144 x 8.
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
    return _BYTES_PER_THREAD[dtype][bfloat16_units()] // dtype.itemsize * torch.get_num_threads()


def _mkl_is_slow() -> bool:
    """Whether MKL, which ``torch.mm`` calls, uses half the width of the vectors and multiplies few rows on one thread.

    It does where the processor is not Intel's, as are nearly all that multiply bfloat16 without AMX.
    """
    return bfloat16_units() == "AVX-512 BF16"


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a bᵀ + bias`` in float32, ``[m, n]``, for ``a [m, D]``, ``b [n, D]`` and ``bias [n]``."""
    work = len(a) * b.numel()
    if work >= _LEAST_PARALLEL and a.is_cpu and _mkl_is_slow():
        if len(a) < _FEWEST:
            return _in_parallel(a, b, bias)
        if len(b) >= _FEWEST and work >= _LEAST_WORK and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            return _by_onednn(a, b, bias)
    return F.linear(a, b, bias)


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
