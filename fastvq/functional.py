"""The public functions: they check their arguments, choose a backend and flatten leading dimensions."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from fastvq.backends.base import Backend, Cache
from fastvq.backends.operators import backend_for, is_jit_tracing, is_traced
from fastvq.backends.portable import is_portable
from fastvq.backends.prepared import PreparedCodebook
from fastvq.common.checks import check_lookup, check_mask, check_search, check_statistics
from fastvq.common.devices import float64_device
from fastvq.common.token_sums import TokenSums
from fastvq.reference import Quantized
from fastvq.straight_through import StraightThrough, commitment_loss, straight_through

# Float64 values in a block of distances (8 MiB).
_BLOCK_VALUES = 1 << 20


@overload
def nearest_code(
    x: Tensor,
    codebook: Tensor | PreparedCodebook,
    *,
    metric: str = ...,
    return_distance: Literal[False] = ...,
    mask: Tensor | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def nearest_code(
    x: Tensor,
    codebook: Tensor | PreparedCodebook,
    *,
    metric: str = ...,
    return_distance: Literal[True],
    mask: Tensor | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def nearest_code(
    x: Tensor,
    codebook: Tensor | PreparedCodebook,
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
        codebook: codes ``[K, D]`` or ``[H, K, D]``, floating, K ≥ 1, perhaps prepared (:func:`fastvq.prepare`).
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
    codes, cache = _codes_of(codebook)
    check_search(x, codes, metric)
    check_mask(mask, x)
    indices = search_codes(x, codes, metric, mask, backend_for(x, backend), cache)
    if not return_distance:
        return indices
    return indices, _distance(x.detach(), codes.detach(), indices, metric)


def _codes_of(codebook: Tensor | PreparedCodebook) -> tuple[Tensor, PreparedCodebook | None]:
    return (codebook.codes, codebook) if isinstance(codebook, PreparedCodebook) else (codebook, None)


def search_codes(
    x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None, backend: Backend, cache: Cache | None = None
) -> Tensor:
    """:func:`nearest_code` of checked arguments; ``cache`` keeps the packed codebook ``[K, D]``."""
    tokens = x.detach().reshape(*codebook.shape[:-2], -1, x.shape[-1])
    # A cache knows a codebook by its tensor, so a codebook that needs no gradient stays the same tensor.
    codes = codebook.detach() if codebook.requires_grad else codebook
    indices = backend.nearest_code(tokens, codes, metric, cache).view(x.shape[:-1])
    return indices if mask is None else torch.where(mask, indices, -1)


def _distance(x: Tensor, codebook: Tensor, indices: Tensor, metric: str) -> Tensor:
    """Squared distances, or similarities, of tokens and their codes, summed in float64 and rounded to float32."""
    home, precise = float64_device(x.device), torch.float64
    if is_portable():  # other runtimes may lack float64
        home, precise = x.device, torch.promote_types(x.dtype, torch.float32)
    tokens = x.reshape(-1, x.shape[-1]).to(home)
    codes = _gather(indices, codebook).reshape(tokens.shape).to(home)
    if is_traced(x):  # the number of blocks would be recorded; a compiler makes one loop, without temporaries
        values = _pair_values(tokens, codes, metric, precise)
    else:
        rows = max(1, _BLOCK_VALUES // x.shape[-1])
        blocks = zip(tokens.split(rows), codes.split(rows), strict=True)
        values = torch.cat([_pair_values(*block, metric, precise) for block in blocks])
    return torch.where(indices < 0, torch.nan, values.view(indices.shape).to(x.device))


def _pair_values(tokens: Tensor, codes: Tensor, metric: str, precise: torch.dtype) -> Tensor:
    tokens, codes = tokens.to(precise), codes.to(precise)
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Number of tokens per code and their sums: ``counts_k = |{i: idx_i = k}|``, ``sums_k = Σ_{i: idx_i = k} x_i``.

    Args:
        x: tokens ``[..., D]``, floating.
        indices: int64 ``[...]``, each in ``[-1, n_codes)``; -1 is left out. A GPU, where a look at the values would
            wait for the device, leaves out every index outside the range.
        n_codes: K ≥ 1.
        mask: bool ``[...]``, False is left out. Default: all tokens count.
        heads: ``x [H, ..., D]`` and ``indices [H, ...]`` belong to one codebook of K codes per head.
        deterministic: True adds in an order that the tokens of a code alone decide, as a CPU always does; False in any
            order. Default: True where ``torch.are_deterministic_algorithms_enabled()``, else the faster for N and K.
        backend: as in :func:`nearest_code`.

    Returns:
        ``(counts [K], sums [K, D])``, float32; ``[H, ...]`` with ``heads``. They are added in integers and in float64
        and rounded once: a count is exact up to 2^24, the error of a sum of n tokens is at most
        ``2^-24 |sum| + n 2^-53 Σ|x|``, whatever their offset, for float64 tokens too. A sum beyond 3.4e38 is infinite.

    Raises:
        TypeError: ``x`` is not floating, ``indices`` not int64, ``mask`` not boolean.
        ValueError: shapes or devices do not match, ``n_codes`` is not positive, ``indices`` leave their range on the
            CPU, or the backend cannot run.
    """
    check_statistics(x, indices, n_codes, heads)
    check_mask(mask, x)
    if mask is not None:
        indices = torch.where(mask, indices, -1)
    _check_range(indices, n_codes)
    leading = x.shape[:1] if heads else ()
    if heads:
        first = n_codes * torch.arange(len(x), device=x.device).view(-1, *[1] * (indices.dim() - 1))
        indices = torch.where((indices < 0) | (indices >= n_codes), -1, indices + first)
    flat, n_rows = x.detach().reshape(-1, x.shape[-1]), n_codes * math.prod(leading)
    counts, sums = backend_for(x, backend).statistics(flat, indices.reshape(-1), n_rows, deterministic)
    rounded = sums.all(torch.float32) if isinstance(sums, TokenSums) else sums.float()
    shape = *leading, n_codes
    return counts.float().to(x.device).view(shape), rounded.to(x.device).view(*shape, x.shape[-1])


def quantize(
    x: Tensor,
    codebook: Tensor | PreparedCodebook,
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
        ``quantized [..., D]`` in the dtype of ``x`` (zero where masked, NaN where a token is not finite), ``indices
        [...]`` int64 as in :func:`nearest_code`, and the scalar ``loss``, at least float32 (0 without tokens).

    Raises:
        TypeError, ValueError: as :func:`nearest_code`.
    """
    codes, cache = _codes_of(codebook)
    check_search(x, codes, "euclidean")
    check_mask(mask, x)
    indices = search_codes(x, codes, "euclidean", mask, backend_for(x, backend), cache)
    quantized, loss = pass_through(x, codes, indices, mask, commitment_weight)
    return Quantized(quantized, indices, loss)


def pass_through(
    x: Tensor, codebook: Tensor, indices: Tensor, mask: Tensor | None, commitment_weight: float
) -> tuple[Tensor, Tensor]:
    """``quantized`` and ``loss`` of :func:`quantize` for the ``indices`` found."""
    codes = _gather(indices, codebook.detach())
    loss = commitment_loss(x, codes, indices, commitment_weight)
    if is_portable():
        return straight_through(x, codes, indices, mask, passes_gradient=False), loss
    if not is_traced(x):
        return StraightThrough.apply(x, codes, indices, mask), loss
    # `torch.jit.trace` compares with a second trace, made without gradients: the two must not differ.
    return straight_through(x, codes, indices, mask, x.requires_grad or is_jit_tracing()), loss


def lookup(indices: Tensor, codebook: Tensor | PreparedCodebook) -> Tensor:
    """The codes of given indices: ``codebook[indices]``, and a zero row for -1. Differentiable in ``codebook``.

    Args:
        indices: int64 ``[...]``, each in ``[-1, K)``; or ``[H, ...]`` with one codebook per head.
        codebook: codes ``[K, D]`` or ``[H, K, D]``.

    Returns:
        ``[..., D]`` in the dtype of ``codebook``.

    Raises:
        TypeError: ``indices`` is not int64 or int32, or ``codebook`` not floating.
        ValueError: shapes or devices do not match, or ``indices`` on the CPU leave their range.
    """
    codebook, _ = _codes_of(codebook)
    check_lookup(indices, codebook)
    _check_range(indices, codebook.shape[-2])
    return torch.where(indices[..., None] < 0, 0, _gather(indices, codebook))


def _check_range(indices: Tensor, n_codes: int) -> None:
    """Raises where an index on the CPU is outside ``[-1, n_codes)``; a look at a GPU's values would wait for it."""
    if indices.device.type != "cpu" or is_traced(indices) or indices.numel() == 0:
        return
    least, most = (int(end) for end in torch.aminmax(indices))
    if least < -1 or most >= n_codes:
        raise ValueError(f"indices must be in [-1, {n_codes}), got {least if least < -1 else most}")


def _gather(indices: Tensor, codebook: Tensor) -> Tensor:
    """``codebook[indices]``, with an arbitrary row for -1."""
    rows = indices.clamp(min=0)
    if codebook.dim() == 3:
        heads = torch.arange(len(codebook), device=codebook.device)
        return codebook[heads.view(-1, *[1] * (rows.dim() - 1)), rows]
    return torch.nn.functional.embedding(rows, codebook)
