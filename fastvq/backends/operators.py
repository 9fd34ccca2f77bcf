"""Search, statistics and update as ``torch.library`` operators, so that compile and export see one operation each.

Eager calls skip the dispatcher, which costs about 20 µs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.backends.choose import search
from fastvq.backends.codebook_cache import KeptCodebook
from fastvq.common.tracing import is_traced
from fastvq.cpu import ema
from fastvq.cpu.statistics import statistics


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


@torch.library.custom_op("fastvq::ema_step", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`fastvq.cpu.ema.ema_step` makes of ``embeddings [K, D]``, ``N [K]`` and ``z_avg [K, D]``.

    It writes none of them: TorchInductor 2.13 moves what reads a tensor behind an operator that writes it, so that
    the codes of the next step would be returned.
    """
    moved = embeddings.clone(), N.clone(), z_avg.clone()
    ema.ema_step(
        *moved, counts, sums, rows, found, decay=decay, restart_thres=restart_thres,
        restart_thres_relative=restart_thres_relative, resets=resets, smoothing=smoothing,
    )  # fmt: skip
    return moved


@ema_step_op.register_fake
def _(embeddings: Tensor, N: Tensor, z_avg: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(embeddings), torch.empty_like(N), torch.empty_like(z_avg)


def nearest_code(x: Tensor, codebook: Tensor, metric: str, backend: str, kept: KeptCodebook | None = None) -> Tensor:
    """:func:`nearest_code_op`, called directly where nobody traces, and only there with a kept packed codebook."""
    if is_traced(x):
        return nearest_code_op(x, codebook, metric, backend)
    return search(x, codebook, metric, backend, kept if type(codebook) is Tensor else None)


def code_statistics(x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None) -> tuple[Tensor, Tensor]:
    """:func:`code_statistics_op`, called directly where nobody traces."""
    run = code_statistics_op if is_traced(x) else statistics
    return run(x, indices, n_codes, deterministic)


def ema_step(embeddings: Tensor, N: Tensor, z_avg: Tensor, *args: Any, **options: Any) -> None:
    """:func:`fastvq.cpu.ema.ema_step`, through :func:`ema_step_op` where somebody traces."""
    state = embeddings, N, z_avg
    if is_traced(embeddings):
        for tensor, moved in zip(state, ema_step_op(*state, *args, **options), strict=True):
            tensor.copy_(moved)
    else:
        ema.ema_step(*state, *args, **options)
