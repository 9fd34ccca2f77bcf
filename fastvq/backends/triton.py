"""The Triton kernels as a backend; no other file imports them. Triton itself is imported by the first call."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastvq.backends.base import Backend, Cache
from fastvq.common.ema_step import EMAStep

_AMD_CHIPS = ("gfx942", "gfx950")
# A look through the import path takes half a millisecond.
_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _obstacle(device: torch.device) -> str | None:
    if not _INSTALLED:
        return "Triton is not installed"
    if device.type == "cpu" and not interpreting():
        return "tensors are on the CPU; set TRITON_INTERPRET=1 before Python starts to run the kernels interpreted"
    if device.type not in ("cpu", "cuda"):
        return f"Triton kernels run on CUDA and ROCm devices, tensors are on {device.type}"
    return _obstacle_of_chip(device) if device.type == "cuda" else None


@cache
def _obstacle_of_chip(device: torch.device) -> str | None:
    """Older chips lack the shared memory, or flush the subnormal half-precision numbers that the error bounds count."""
    if torch.version.hip:
        chip = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return None if chip in _AMD_CHIPS else f"the kernels are made for {' and '.join(_AMD_CHIPS)}, this is {chip}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the kernels need compute capability 8.0, {device} has {major}.{minor}"


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that holds ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _prepare(codebook: Tensor, metric: str) -> Any:
    from fastvq_kernels.search.pack_codes import pack_codebook

    return pack_codebook(codebook, metric)


def _nearest_code(x: Tensor, codebook: Tensor, metric: str, cache: Cache | None) -> Tensor:
    from fastvq_kernels.search.pipeline import nearest_code

    with _on_device_of(x):
        return nearest_code(x, codebook, metric, cache.keeping(_prepare) if cache else _prepare)


def _code_statistics(x: Tensor, indices: Tensor, n_codes: int, deterministic: bool | None) -> tuple[Tensor, Tensor]:
    from fastvq_kernels.update.accumulate import code_statistics

    if deterministic is None and torch.are_deterministic_algorithms_enabled():
        deterministic = True
    with _on_device_of(x):
        return code_statistics(x, indices, n_codes, deterministic)


def _ema_step(step: EMAStep) -> Tensor:
    from fastvq_kernels.update.ema import ema_step

    embeddings, N, z_avg = (tensor.contiguous() for tensor in step[:3])
    with _on_device_of(embeddings):
        stays = ema_step(embeddings, N, z_avg, step.counts, step.all_sums(), *step[5:])
    for tensor, moved in zip(step[:3], (embeddings, N, z_avg), strict=True):
        if moved is not tensor:  # the state has gaps
            tensor.copy_(moved)
    # PyTorch does not see what a kernel writes; a codebook cache knows by this count that it is old.
    torch.autograd.graph.increment_version(step[:3])
    return stays


TRITON = Backend("triton", _obstacle, _prepare, _nearest_code, _code_statistics, _ema_step)
