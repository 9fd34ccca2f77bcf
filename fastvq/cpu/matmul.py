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
    n_codes, dim = codes.shape
    if n_codes < tuning.FEWEST_CODES_BF16 or not codes.is_cpu or (units := bfloat16_units()) is None:
        return False
    worth = tuning.WORTH_BF16[units]
    return worth.coordinates <= dim <= bounds.MOST_COLUMNS_BF16 and n_tokens * n_codes * (dim + 8) >= worth.work


def product_values(dtype: torch.dtype = torch.float32) -> int:
    """Values of a product so small that each thread's slice stays in its cache."""
    return tuning.BYTES_PER_THREAD[dtype] // dtype.itemsize * torch.get_num_threads()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a bᵀ + bias``, ``[m, n]``, for ``a [m, D]``, ``b [n, D]`` and ``bias [n]`` of one dtype."""
    if tuning.AVX512_AMD and a.is_cpu and _onednn_pays(a, b):
        lacking = -len(a) % tuning.MULTIPLE
        rows = F.pad(a, (0, 0, 0, lacking)) if lacking else a.contiguous()
        bias = bias if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(rows, b.contiguous(), bias, "none", [], "")[: len(a)]
    return F.linear(a, b, bias)


def _onednn_pays(a: Tensor, b: Tensor) -> bool:
    m, n = a.shape[0], b.shape[0]
    if m * b.numel() < tuning.LEAST_WORK or min(m, n) < tuning.FEWEST_ROWS or a.dtype != torch.float32:
        return False
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
