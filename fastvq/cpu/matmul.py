"""Matrix products by the library that this processor computes them fastest with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.cpu import bounds, tuning


def bfloat16_units() -> str | None:
    """Units of this processor that multiply bfloat16 much faster than float32; None without."""
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
        return None
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX-512 BF16" if torch.cpu._is_avx512_bf16_supported() else None


def bf16_pays(n_tokens: float, codes: Tensor) -> bool:
    """Whether a first scan in bfloat16 finds the codes ``[K, D]`` of so many tokens sooner on this machine."""
    units = bfloat16_units()
    if units is None or not codes.is_cpu:
        return False
    worth, (n_codes, dim) = tuning.WORTH_BF16[units], codes.shape
    enough = n_codes >= worth.codes and worth.coordinates <= dim <= bounds.MOST_COLUMNS_BF16
    return enough and n_tokens * n_codes * (dim + 8) >= worth.work


def product_values(dtype: torch.dtype = torch.float32) -> int:
    """Values of a product so small that each thread's slice stays in its cache."""
    return tuning.BYTES_PER_THREAD[dtype] // dtype.itemsize * torch.get_num_threads()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a bᵀ + bias`` in float32, ``[m, n]``, for ``a [m, D]``, ``b [n, D]`` and ``bias [n]``."""
    if tuning.AMD and a.is_cpu:
        if _onednn_pays(a, b):
            return _by_onednn(a, b, bias)
        if len(a) < tuning.FEWEST_ROWS and len(a) * b.numel() >= tuning.LEAST_PARALLEL:
            return _in_parallel(a, b, bias)
    return F.linear(a, b, bias)


def _onednn_pays(a: Tensor, b: Tensor) -> bool:
    m, (n, dim) = len(a), b.shape
    if tuning.AVX512_AMD:
        enough = m * n * dim >= tuning.LEAST_WORK
    else:
        enough = m * n >= tuning.MANY_RESULTS and dim not in tuning.IN_BETWEEN
    if min(m, n) < tuning.FEWEST_ROWS or not enough:
        return False
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _in_parallel(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`product` for few rows ``a``, a block of ``b`` for every thread."""
    threads, (n, dim) = torch.get_num_threads(), b.shape
    if more := n % threads:
        biases = (None, None) if bias is None else (bias[:-more], bias[-more:])
        return torch.cat([_in_parallel(a, b[:-more], biases[0]), F.linear(a, b[-more:], biases[1])], 1)
    rows = n // threads
    blocks = a.expand(threads, -1, -1), b.view(threads, rows, dim).mT
    products = torch.bmm(*blocks) if bias is None else torch.baddbmm(bias.view(threads, 1, rows), *blocks)
    return products.transpose(0, 1).reshape(len(a), n)


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    operands = _padded(a), _padded(b), bias if bias is None else _padded(bias)
    return torch.ops.mkldnn._linear_pointwise(*operands, "none", [], "")[: len(a), : len(b)]


def _padded(rows: Tensor) -> Tensor:
    """``rows [n, ...]`` with zeros up to a multiple, contiguous: the operator ignores strides."""
    lacking = -len(rows) % tuning.MULTIPLE
    return (F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, lacking]) if lacking else rows).contiguous()
