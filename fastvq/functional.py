"""The public functions: they check their arguments, flatten leading dimensions and call the operators."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Literal, overload

import torch
from torch import Tensor

from fastvq import ops
from fastvq.backends import METRICS, choose_backend
from fastvq.kept import KeptCodebook
from fastvq.reference import Quantized
from fastvq.straight_through import StraightThrough, commitment_loss
from fastvq.tracing import is_traced

# Distances are computed in pieces of this many float64 values (8 MiB).
_DISTANCE_VALUES = 1 << 20


@overload
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    return_distance: Literal[False] = ...,
    mask: Tensor | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    return_distance: Literal[True],
    mask: Tensor | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    return_distance: bool = False,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Index of the nearest code of every token, without a ``[tokens, codes]`` matrix.

    ``euclidean``: ``argmin_k Σ_j (x_j - e_kj)²``; ``dot``: ``argmax_k Σ_j x_j e_kj``; ``cosine``:
    ``argmax_k Σ_j x_j e_kj / (|x| |e_k|)``, 0 where a norm is 0. Exact means: as evaluated in float64, sums over
    ascending ``j``, the lowest index on ties (:func:`fastvq.reference.nearest_code`).

    Args:
        x: tokens ``[..., D]``, floating; or ``[H, ..., D]`` with one codebook per head.
        codebook: codes ``[K, D]`` or ``[H, K, D]``, floating, K ≥ 1.
        metric: ``"euclidean"``, ``"cosine"`` or ``"dot"``.
        return_distance: also return the squared distances (the similarities for the other two metrics).
        mask: bool ``[...]``, True for a real token. Default: all.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        int64 indices ``[...]``; -1 for a token that is masked out or holds a NaN or an infinity. A code that holds
        one is never chosen. With ``return_distance`` also float32 ``[...]``, NaN where the index is -1.

    Raises:
        TypeError: an argument is not a floating tensor, or ``mask`` is not boolean.
        ValueError: shapes or devices do not match, ``metric`` or ``backend`` is unknown, or the backend cannot run.
    """
    indices = search_codes(x, codebook, metric, mask, backend)
    if not return_distance:
        return indices
    return indices, _distance(x.detach(), codebook.detach(), indices, metric)


def search_codes(
    x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None, backend: str, kept: KeptCodebook | None = None
) -> Tensor:
    """:func:`nearest_code` with what ``kept`` remembers of the codebook ``[K, D]``."""
    _check_search(x, codebook, metric)
    check_mask(mask, x)
    choose_backend(x.device, backend)
    tokens = x.detach().reshape(*codebook.shape[:-2], -1, x.shape[-1])
    # A kept codebook is known by the tensor, so that it is not replaced by another of the same values.
    codes = codebook.detach() if codebook.requires_grad else codebook
    indices = ops.nearest_code(tokens, codes, metric, backend, kept).view(x.shape[:-1])
    return indices if mask is None else torch.where(mask, indices, -1)


def _distance(x: Tensor, codebook: Tensor, indices: Tensor, metric: str) -> Tensor:
    """The value of the chosen pairs, summed in float64 and rounded to float32."""
    tokens = x.reshape(-1, x.shape[-1])
    codes = _gather(indices, codebook).reshape(tokens.shape)
    if torch.compiler.is_compiling():  # makes one loop of it, whatever the size
        values = _pair_values(tokens, codes, metric)
    else:
        rows = max(1, _DISTANCE_VALUES // x.shape[-1])
        pieces = zip(tokens.split(rows), codes.split(rows), strict=True)
        values = torch.cat([_pair_values(*piece, metric) for piece in pieces])
    return torch.where(indices < 0, torch.nan, values.view(indices.shape))


def _pair_values(tokens: Tensor, codes: Tensor, metric: str) -> Tensor:
    tokens, codes = tokens.double(), codes.double()
    if metric == "euclidean":
        return (tokens - codes).square().sum(1).float()
    product = (tokens * codes).sum(1)
    if metric == "cosine":
        lengths = torch.linalg.vector_norm(tokens, dim=1), torch.linalg.vector_norm(codes, dim=1)
        product = torch.where((lengths[0] > 0) & (lengths[1] > 0), product / lengths[1] / lengths[0], 0)
    return product.float()


def code_statistics(
    x: Tensor,
    indices: Tensor,
    n_codes: int,
    *,
    mask: Tensor | None = None,
    heads: bool = False,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Number of tokens per code and their sums: ``counts_k = |{i: idx_i = k}|``, ``sums_k = Σ_{i: idx_i = k} x_i``.

    Args:
        x: tokens ``[..., D]``, floating.
        indices: int64 ``[...]``, each in ``[-1, n_codes)``; -1 is left out. On a GPU, where to look at values would
            wait for the device, other numbers are left out too.
        n_codes: K ≥ 1.
        mask: bool ``[...]``, False is left out. Default: all.
        heads: ``x [H, ..., D]`` and ``indices [H, ...]`` belong to one codebook of K codes per head.
        deterministic: True adds in an order that depends on nothing but the tokens of the code, as the CPU always
            does; False adds in any order, which is faster for short codes and few tokens. Default: True where
            ``torch.are_deterministic_algorithms_enabled()``, otherwise whichever is faster for N and K.

    Returns:
        ``(counts [K], sums [K, D])``, float32, accumulated in integers and in float32; with ``heads``
        ``(counts [H, K], sums [H, K, D])``.

    Raises:
        TypeError: ``x`` is not floating, ``indices`` not int64, ``mask`` not boolean.
        ValueError: shapes or devices do not match, ``n_codes`` is not positive, or ``indices`` leave their range.
    """
    check_floating("x", x)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(f"indices must be an int64 tensor, got {_describe(indices)}")
    if indices.shape != x.shape[:-1]:
        raise ValueError(f"indices must be {list(x.shape[:-1])} to match x, got {list(indices.shape)}")
    _check_same_device("indices", indices, x)
    check_count("n_codes", n_codes, 1)
    if heads and x.dim() < 2:
        raise ValueError(f"x must be [heads, ..., D] with heads, got {list(x.shape)}")
    check_mask(mask, x)
    if mask is not None:
        indices = torch.where(mask, indices, -1)
    _check_range(indices, n_codes)
    leading = x.shape[:1] if heads else ()
    if heads:
        first = n_codes * torch.arange(len(x), device=x.device).view(-1, *[1] * (indices.dim() - 1))
        indices = torch.where((indices < 0) | (indices >= n_codes), -1, indices + first)
    if deterministic is None and torch.are_deterministic_algorithms_enabled():
        deterministic = True
    flat = x.detach().reshape(-1, x.shape[-1])
    counts, sums = ops.code_statistics(flat, indices.reshape(-1), n_codes * math.prod(leading), deterministic)
    return counts.view(*leading, n_codes), sums.view(*leading, n_codes, x.shape[-1])


def quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    commitment_weight: float = 0.25,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Quantized:
    """Replace every token by its nearest code, with the gradient passed straight through.

    ``quantized = e_idx`` with ``idx = argmin_k |x - e_k|²``; ``loss = w · mean (x - e_idx)²`` over the tokens that
    have a code; ``∂L/∂x = ∂L/∂quantized + ∂L/∂loss · 2w(x - e_idx)/(n·D)`` (van den Oord et al. 2017,
    arXiv 1711.00937). No gradient flows to ``codebook``: it learns by moving averages, or through :func:`lookup`.

    Args:
        x: tokens ``[..., D]``, floating; or ``[H, ..., D]`` with one codebook per head.
        codebook: codes ``[K, D]`` or ``[H, K, D]``, floating.
        commitment_weight: ``w``.
        mask: bool ``[...]``, True for a real token. Default: all.
        backend: as in :func:`nearest_code`.

    Returns:
        ``quantized [..., D]`` in the dtype of ``x`` (zero where masked, NaN where the token holds a NaN or an
        infinity), ``indices [...]`` int64 as in :func:`nearest_code`, and the scalar ``loss``, at least float32
        (0 without tokens).

    Raises:
        TypeError, ValueError: as :func:`nearest_code`.
    """
    indices = search_codes(x, codebook, "euclidean", mask, backend)
    quantized, loss = pass_through(x, codebook, indices, mask, commitment_weight)
    return Quantized(quantized, indices, loss)


def pass_through(
    x: Tensor, codebook: Tensor, indices: Tensor, mask: Tensor | None, commitment_weight: float
) -> tuple[Tensor, Tensor]:
    """``quantized`` and ``loss`` of :func:`quantize` for the ``indices`` found."""
    codes = _gather(indices, codebook.detach())
    return StraightThrough.apply(x, codes, indices, mask), commitment_loss(x, codes, indices, commitment_weight)


def lookup(indices: Tensor, codebook: Tensor) -> Tensor:
    """The codes of given indices: ``codebook[indices]``, and a zero row for -1. Differentiable in ``codebook``.

    Args:
        indices: int64 ``[...]``, each in ``[-1, K)``; or ``[H, ...]`` with one codebook per head.
        codebook: codes ``[K, D]`` or ``[H, K, D]``.

    Returns:
        ``[..., D]`` in the dtype of ``codebook``.

    Raises:
        TypeError: ``indices`` is not int64 or int32, or ``codebook`` not floating.
        ValueError: ``codebook`` has another rank, the devices or the numbers of heads differ, or on the CPU
            ``indices`` leave their range.
    """
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be an int64 or int32 tensor, got {_describe(indices)}")
    _check_codebook(codebook)
    _check_same_device("indices", indices, codebook)
    if codebook.dim() == 3 and indices.shape[:1] != codebook.shape[:1]:
        raise ValueError(f"indices must be [{len(codebook)}, ...] to match codebook, got {list(indices.shape)}")
    _check_range(indices, codebook.shape[-2])
    return torch.where(indices[..., None] < 0, 0, _gather(indices, codebook))


def _gather(indices: Tensor, codebook: Tensor) -> Tensor:
    """``codebook[indices]`` with any row for -1."""
    rows = indices.clamp(min=0)
    if codebook.dim() == 3:
        heads = torch.arange(len(codebook), device=codebook.device)
        return codebook[heads.view(-1, *[1] * (rows.dim() - 1)), rows]
    return torch.nn.functional.embedding(rows, codebook)


def _check_search(x: Tensor, codebook: Tensor, metric: str) -> None:
    check_floating("x", x)
    _check_codebook(codebook)
    if x.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"codebook must be {_expected_codebook(codebook, x.shape[-1])} to match x, got {list(codebook.shape)}"
        )
    if codebook.dim() == 3 and (x.dim() < 2 or x.shape[0] != codebook.shape[0]):
        raise ValueError(
            f"x must be [{codebook.shape[0]}, ..., {x.shape[-1]}] to match the heads of codebook, got {list(x.shape)}"
        )
    _check_same_device("codebook", codebook, x)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")


def _check_codebook(codebook: Tensor) -> None:
    check_floating("codebook", codebook)
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook must be [n_codes, D] or [heads, n_codes, D], got {list(codebook.shape)}")
    if 0 in codebook.shape:
        raise ValueError(f"codebook must hold at least one code, got {list(codebook.shape)}")


def _expected_codebook(codebook: Tensor, dim: int) -> str:
    return f"[n_codes, {dim}]" if codebook.dim() == 2 else f"[heads, n_codes, {dim}]"


def check_count(name: str, value: int, least: int) -> None:
    """Raises where ``value`` is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {_describe(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_floating(name: str, value: Tensor) -> None:
    """Raises where ``value`` is not a floating tensor ``[..., D]`` with D ≥ 1."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {_describe(value)}")
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name} must have a last dimension of at least 1, got {list(value.shape)}")


def _check_same_device(name: str, value: Tensor, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like the other tensor, got {value.device}")


def _check_range(indices: Tensor, n_codes: int) -> None:
    """Raises where one is outside ``[-1, n_codes)``; another device than the CPU would have to be waited for."""
    if indices.device.type != "cpu" or is_traced(indices) or indices.numel() == 0:
        return
    least, most = (int(end) for end in torch.aminmax(indices))
    if least < -1 or most >= n_codes:
        raise ValueError(f"indices must be in [-1, {n_codes}), got {least if least < -1 else most}")


def check_mask(mask: Tensor | None, x: Tensor) -> None:
    """Raises where ``mask`` is not a boolean tensor of the leading shape of ``x``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean tensor, got {_describe(mask)}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must be {list(x.shape[:-1])}, the leading shape of x, got {list(mask.shape)}")
    _check_same_device("mask", mask, x)


def _describe(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
