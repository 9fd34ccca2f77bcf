"""The search made of plain operators, for runtimes without fastvq: not certified."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor

from fastvq.backends.base import Backend, Cache, runs_anywhere
from fastvq.common.directions import directions


class _Here(threading.local):
    depth = 0


_here = _Here()


@contextmanager
def portable() -> Iterator[None]:
    """Searches inside are made of plain operators (matmul, argmax, where), for ONNX and other runtimes.

    ::

        with fastvq.portable():
            torch.onnx.export(model.eval(), (x,), "model.onnx", dynamic_shapes=...)

    The score of a pair is ``(x - c)·(e - c) - ½|e - c|²``, for the other metrics ``x·(e - c)``, where ``c``, the median
    of the codes in each coordinate, keeps a common offset out of the rounding errors. The largest score wins, the first
    of equal ones. Masks, NaN and infinities have the meaning that :func:`fastvq.nearest_code` gives them.

    **Not certified.** Scores are float32 (float64 for float64 tensors): another code may win where two are as near as
    rounding, about ``D · 2⁻²⁴ · |x - c| |e - c|``. The ``[tokens, codes]`` matrix exists.

    For evaluation, without gradients, in this thread: eager, under ``torch.export``, ``torch.jit.trace`` and both
    exporters of ``torch.onnx``. ``torch.compile`` needs no such form and keeps the exact search.

    Raises:
        RuntimeError: a codebook trains inside; call ``eval()`` first.
    """
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1


def is_portable() -> bool:
    """Whether a search that starts now is to be made of plain operators."""
    # A compiler would keep what it has recorded in here for calls outside.
    return _here.depth > 0 and (torch.compiler.is_exporting() or not torch.compiler.is_compiling())


def _prepare(codebook: Tensor, metric: str) -> Tensor:
    return codebook


def _nearest_code(x: Tensor, codebook: Tensor, metric: str, cache: Cache | None) -> Tensor:
    precise = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    tokens, codes = x.to(precise), codebook.to(precise)
    usable = _is_finite(codes)
    rows = directions(codes) if metric == "cosine" else codes
    center = rows.sort(-2).values[..., rows.shape[-2] // 2, :][..., None, :]
    center = torch.where(_is_finite(center)[..., None], center, 0.0)
    rows = torch.where(usable[..., None], rows - center, 0.0)
    if metric == "euclidean":
        scores = (tokens - center) @ rows.transpose(-1, -2) - 0.5 * rows.square().sum(-1)[..., None, :]
    else:
        scores = tokens @ rows.transpose(-1, -2)
    found = torch.where(usable[..., None, :], scores, -torch.inf).argmax(-1)
    return torch.where(_is_finite(tokens) & usable.any(-1, keepdim=True), found, -1)


def _is_finite(rows: Tensor) -> Tensor:
    return (rows.abs() <= torch.finfo(rows.dtype).max).all(-1)


def _refuse(*_: object) -> NoReturn:
    raise RuntimeError("portable() is for evaluation, and a codebook trains inside: call model.eval() first")


PORTABLE = Backend("portable", runs_anywhere, _prepare, _nearest_code, _refuse, _refuse)
