"""The memory of a codebook's state: float32, each buffer its own, and writable.

Casts reach a buffer on many ways that do not lead through its module: FSDP's ``buffer_dtype`` and others swap
``tensor.data``, loaders write ``module._buffers``.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from fastvq.backends.operators import is_traced


@torch.inference_mode(False)
def own_memory(buffers: MutableMapping[str, Tensor | None]) -> None:
    """Replace buffers that are not float32, share memory, repeat a number in memory, or come from inference mode."""
    spans: list[range] = []
    for name, buffer in buffers.items():
        if buffer is None or is_traced(buffer):
            continue
        span = _span(buffer)
        is_shared = any(span.start < other.stop and other.start < span.stop for other in spans)
        repeats = any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
        if is_shared or repeats or buffer.is_inference() or buffer.dtype != torch.float32:
            buffers[name] = buffer = buffer.detach().to(torch.float32, copy=True).contiguous()
            span = _span(buffer)
        elif buffer.requires_grad:
            buffers[name] = buffer = buffer.detach()
        spans.append(span)


def _span(tensor: Tensor) -> range:
    """The bytes from the first to the last number."""
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return range(tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())


def check_writable(buffers: Mapping[str, Tensor | None]) -> None:
    """Raises where a training step cannot write the buffers without one changing another.

    Raises:
        RuntimeError: two buffers are the same memory, or one comes from inference mode.
    """
    names: dict[int, str] = {}
    for name, buffer in buffers.items():
        if buffer is None or is_traced(buffer):
            continue
        if buffer.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{name} was made in inference mode and cannot be trained; pass {name}.clone()")
        other = names.setdefault(buffer.data_ptr(), name)
        if other != name:
            raise RuntimeError(f"{name} and {other} must not be the same memory; pass {name}.clone()")


class Float32Memory:
    """The float32 memory of buffers, held to undo a cast exactly. Copies and pickles are empty."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type[Float32Memory], tuple[()]]:
        return Float32Memory, ()

    def hold(self, buffers: Mapping[str, Tensor | None]) -> None:
        """Remember the memory that ``buffers`` have now: what is written there later is known too."""
        self._held = {name: buffer.detach() for name, buffer in buffers.items() if buffer is not None}

    @torch.inference_mode(False)
    @torch.no_grad()
    def undo_casts(self, buffers: Mapping[str, Tensor | None]) -> None:
        """Make ``buffers`` float32 again, the same tensors: with the numbers held where these round to theirs."""
        for name, buffer in buffers.items():
            if buffer is None or buffer.dtype == torch.float32:
                continue
            values, held = buffer.to(torch.float32, copy=True), self._held.get(name)
            if held is not None and held.shape == buffer.shape and not held.is_meta:
                held = held.to(buffer.device)
                values = torch.where(held.to(buffer.dtype) == buffer, held, values)
            buffer.data = values
        self.hold(buffers)
