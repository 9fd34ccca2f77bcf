"""Search, statistics and update as ``torch.library`` operators, so that compile and export see one operation each.

Eager calls skip the dispatcher, which costs about 20 µs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq import ema
from fastvq.backends import search
from fastvq.kept import KeptCodebook
from fastvq.statistics import statistics


@torch.library.custom_op("fastvq::nearest_code", mutates_args=())
def nearest_code_op(x: Tensor, codebook: Tensor, metric: str, backend: str) -> Tensor:
    """Indices ``[..., N]`` of ``x [..., N, D]`` in ``codebook [..., K, D]``, with one or no leading dimension."""
    return search(x, codebook, metric, backend)


@nearest_code_op.register_fake
def _(x: Tensor, codebook: Tensor, metric: str, backend: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@torch.library.custom_op("fastvq::code_statistics", mutates_args=())
def code_statistics_op(x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None) -> tuple[Tensor, Tensor]:
    """Counts ``[K]`` and sums ``[K, D]``, float32, of ``x [N, D]`` by ``indices [N]``."""
    return statistics(x, indices, n_codes, deterministic)


@code_statistics_op.register_fake
def _(x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(n_codes, dtype=torch.float32), x.new_empty(n_codes, x.shape[1], dtype=torch.float32)


@torch.library.custom_op("fastvq::ema_step", mutates_args=("embeddings", "N", "z_avg"))
def ema_step_op(
    embeddings: Tensor,
    N: Tensor,
    z_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    rows: Tensor | None = None,
    found: Tensor | None = None,
    *,
    decay: float,
    restart_thres: float = 1.0,
    restart_thres_relative: float | None = None,
    resets: bool = False,
    smoothing: float = 1e-7,
) -> None:
    """:func:`fastvq.ema.ema_step`: moves ``embeddings [K, D]``, ``N [K]`` and ``z_avg [K, D]`` in place."""
    ema.ema_step(
        embeddings, N, z_avg, counts, sums, rows, found, decay=decay, restart_thres=restart_thres,
        restart_thres_relative=restart_thres_relative, resets=resets, smoothing=smoothing,
    )  # fmt: skip


@ema_step_op.register_fake
def _(*args: Any, **options: Any) -> None:
    return None


def nearest_code(x: Tensor, codebook: Tensor, metric: str, backend: str, kept: KeptCodebook | None = None) -> Tensor:
    """:func:`nearest_code_op`, called directly where nobody traces, and only there with a kept packed codebook."""
    if _is_traced(x):
        return nearest_code_op(x, codebook, metric, backend)
    return search(x, codebook, metric, backend, kept if type(codebook) is Tensor else None)


def code_statistics(x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None) -> tuple[Tensor, Tensor]:
    """:func:`code_statistics_op`, called directly where nobody traces."""
    run = code_statistics_op if _is_traced(x) else statistics
    return run(x, indices, n_codes, deterministic)


def ema_step(embeddings: Tensor, *args: Tensor | None, **options: Any) -> None:
    """:func:`ema_step_op`, called directly where nobody traces."""
    run: Any = ema_step_op if _is_traced(embeddings) else ema.ema_step
    run(embeddings, *args, **options)


def _is_traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta"
