"""Checks of arguments. Every error names the argument, what was expected and what came."""

from collections.abc import Collection
from numbers import Integral

import torch
from torch import Tensor

METRICS = ("euclidean", "cosine", "dot")


def check_search(x: Tensor, codebook: Tensor, metric: str) -> None:
    """Raises where ``x`` cannot be searched in ``codebook``, or ``metric`` is unknown."""
    check_floating("x", x)
    check_codebook(codebook)
    if x.shape[-1] != codebook.shape[-1]:
        expected = f"[{'heads, ' if codebook.dim() == 3 else ''}n_codes, {x.shape[-1]}]"
        raise ValueError(f"codebook must be {expected} to match x, got {list(codebook.shape)}")
    if codebook.dim() == 3 and (x.dim() < 2 or x.shape[0] != codebook.shape[0]):
        expected = f"[{codebook.shape[0]}, ..., {x.shape[-1]}]"
        raise ValueError(f"x must be {expected} to match the heads of codebook, got {list(x.shape)}")
    check_same_device("codebook", codebook, x)
    check_choice("metric", metric, METRICS)


def check_codebook(codebook: Tensor) -> None:
    """Raises where ``codebook`` does not hold codes ``[K, D]`` or ``[H, K, D]``."""
    check_floating("codebook", codebook)
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook must be [n_codes, D] or [heads, n_codes, D], got {list(codebook.shape)}")
    if 0 in codebook.shape:
        raise ValueError(f"codebook must hold at least one code, got {list(codebook.shape)}")


def check_codes(codes: Tensor, n_codes: int, dim: int) -> None:
    """Raises where ``codes`` are not finite float32 codes ``[n_codes, dim]``."""
    check_floating("codes", codes)
    if codes.shape != (n_codes, dim):
        raise ValueError(f"codes must be [{n_codes}, {dim}], got {list(codes.shape)}")
    if not codes.float().isfinite().all():
        raise ValueError("codes must be finite in float32")


def check_moving_counts(counts: Tensor, n_codes: int) -> None:
    """Raises where ``counts`` are not moving counts ``[n_codes]``: finite, at least 0 and not all 0."""
    if not isinstance(counts, Tensor) or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"counts must be a tensor of numbers, got {describe(counts)}")
    if counts.shape != (n_codes,):
        raise ValueError(f"counts must be [{n_codes}], got {list(counts.shape)}")
    values = counts.float()
    if not (values.isfinite().all() and (values >= 0).all() and values.any()):
        raise ValueError("counts must be finite, at least 0 and not all 0")


def check_statistics(x: Tensor, indices: Tensor, n_codes: int, heads: bool) -> None:
    """Raises where ``indices`` are not codes of the tokens ``x``, or ``n_codes`` is no number of codes."""
    check_floating("x", x)
    check_indices(indices)
    if indices.shape != x.shape[:-1]:
        raise ValueError(f"indices must be {list(x.shape[:-1])} to match x, got {list(indices.shape)}")
    check_same_device("indices", indices, x)
    check_count("n_codes", n_codes, 1)
    if heads and x.dim() < 2:
        raise ValueError(f"x must be [heads, ..., D] with heads, got {list(x.shape)}")


def check_lookup(indices: Tensor, codebook: Tensor) -> None:
    """Raises where ``indices`` do not name codes of ``codebook``."""
    check_indices(indices)
    check_codebook(codebook)
    check_same_device("indices", indices, codebook)
    if codebook.dim() == 3 and indices.shape[:1] != codebook.shape[:1]:
        raise ValueError(f"indices must be [{len(codebook)}, ...] to match codebook, got {list(indices.shape)}")


def check_indices(indices: Tensor) -> None:
    """Raises where ``indices`` are not int64 or int32."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be an int64 or int32 tensor, got {describe(indices)}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises where ``value`` is none of ``choices``."""
    if value not in tuple(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: int, least: int) -> None:
    """Raises where ``value`` is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_floating(name: str, value: Tensor) -> None:
    """Raises where ``value`` is not a floating tensor ``[..., D]`` with D ≥ 1."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(value)}")
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name} must have a last dimension of at least 1, got {list(value.shape)}")


def check_same_device(name: str, value: Tensor, other: Tensor) -> None:
    """Raises where ``value`` is on another device than ``other``."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like the other tensor, got {value.device}")


def check_mask(mask: Tensor | None, x: Tensor) -> None:
    """Raises where ``mask`` is not a boolean tensor of the leading shape of ``x``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        is_integer = isinstance(mask, Tensor) and not mask.is_floating_point()
        hint = "; for one of 0 and 1 pass mask.bool()" if is_integer else ""
        raise TypeError(f"mask must be a boolean tensor, got {describe(mask)}{hint}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must be {list(x.shape[:-1])}, the leading shape of x, got {list(mask.shape)}")
    check_same_device("mask", mask, x)


def describe(value: object) -> str:
    """The dtype of a tensor, or the type of anything else."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
