"""The three operations as ``torch.library`` operators, so that compile and export see one node for each.

Eager calls go to the backend itself: the dispatcher costs about 20 µs a call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastvq.backends.base import Backend, Cache
from fastvq.backends.choose import BACKENDS, check_backend, choose
from fastvq.backends.portable import PORTABLE, is_portable
from fastvq.common.devices import float64_device
from fastvq.common.ema_step import EMAStep


def is_traced(x: Tensor) -> bool:
    """Whether a compiler or a tensor subclass records operations on ``x``, or ``x`` has no values."""
    return torch.compiler.is_compiling() or is_jit_tracing() or type(x) not in (Tensor, Parameter) or x.is_meta


def is_jit_tracing() -> bool:
    """Whether ``torch.jit.trace``, or the exporter to ONNX that builds on it, records."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def may_read(tensor: Tensor) -> bool:
    """Whether a branch may depend on the value of ``tensor``."""
    return not torch.compiler.is_compiling() and not tensor.is_meta


def backend_for(x: Tensor, name: str) -> Backend:
    """The backend called ``name`` for a call on ``x``; the operators where a compiler records the call.

    Inside :func:`fastvq.portable` it is another one, whatever the name.

    Raises:
        ValueError: as :func:`fastvq.backends.choose.choose`.
    """
    if is_portable():
        check_backend(name)
        return PORTABLE
    if not is_traced(x):
        return choose(x.device, name)
    check_backend(name)
    return RECORDED[name]


@torch.library.custom_op("fastvq::nearest_code", mutates_args=())
def nearest_code_op(x: Tensor, codebook: Tensor, metric: str, backend: str) -> Tensor:
    """Indices ``[..., N]`` of ``x [..., N, D]`` in ``codebook [..., K, D]``, with one or no leading dimension."""
    return choose(x.device, backend).nearest_code(x, codebook, metric, None)


@nearest_code_op.register_fake
def _(x: Tensor, codebook: Tensor, metric: str, backend: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@torch.library.custom_op("fastvq::code_statistics", mutates_args=())
def code_statistics_op(
    x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Counts ``[K]`` int64 and sums ``[K, D]`` float64 of ``x [N, D]`` by ``indices [N]``, on the float64 device."""
    return choose(x.device, backend).code_statistics(x, indices, n_codes, deterministic)


@code_statistics_op.register_fake
def _(x: Tensor, indices: Tensor, n_codes: int, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    home = float64_device(x.device)
    counts = x.new_empty(n_codes, dtype=torch.int64, device=home)
    return counts, x.new_empty(n_codes, x.shape[1], dtype=torch.float64, device=home)


@torch.library.custom_op("fastvq::ema_step", mutates_args=())
def ema_step_op(
    embeddings: Tensor,
    N: Tensor,
    z_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    rows: Tensor | None,
    found: Tensor | None,
    decay: float,
    restart_thres: float = 1.0,
    restart_thres_relative: float | None = None,
    resets: bool = False,
    smoothing: float = 1e-7,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The state ``(embeddings [K, D], N [K], z_avg [K, D])`` after a step of the moving averages, and who stayed.

    The operator writes none of its arguments: TorchInductor 2.13 moves what reads a tensor behind an operator that
    writes it, so that a training step would return the codes of the next one.
    """
    moved = embeddings.clone(), N.clone(), z_avg.clone()
    step = EMAStep(
        *moved, counts, sums, rows, found, decay, restart_thres, restart_thres_relative, resets, smoothing
    )  # fmt: skip
    stays = choose(embeddings.device, backend).ema_step(step)
    return *moved, stays


@ema_step_op.register_fake
def _(
    embeddings: Tensor, N: Tensor, z_avg: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moved = torch.empty_like(embeddings), torch.empty_like(N), torch.empty_like(z_avg)
    return *moved, torch.empty_like(N, dtype=torch.bool)


def _recorded(name: str) -> Backend:
    """The operators as a backend: they choose when the recording runs, perhaps on another device than now."""

    def nearest_code(x: Tensor, codebook: Tensor, metric: str, cache: Cache | None) -> Tensor:
        return nearest_code_op(x, codebook, metric, name)

    def code_statistics(x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None) -> tuple[Tensor, Tensor]:
        return code_statistics_op(x, indices, n_codes, deterministic, name)

    def ema_step(step: EMAStep) -> Tensor:
        *state, stays = ema_step_op(*step, backend=name)
        for tensor, moved in zip(step[:3], state, strict=True):
            tensor.copy_(moved)
        return stays

    anywhere = BACKENDS["reference"]
    return Backend(name, anywhere.obstacle, anywhere.prepare, nearest_code, code_statistics, ema_step)


RECORDED = {name: _recorded(name) for name in ("auto", *BACKENDS)}
