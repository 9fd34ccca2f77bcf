"""A packed codebook kept from one call to the next, for as long as it is that of the codes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_P = TypeVar("_P")
Prepare = Callable[[Tensor, str], _P]


class _Entry(NamedTuple):
    made_by: tuple[Prepare[Any], str]
    packed: Any
    # What was packed: on the CPU a copy of the codes, on a GPU the tensor and what counts its changes.
    codes: Tensor | weakref.ref[Tensor]
    counters: _Counters | None


class _Counters(NamedTuple):
    address: int
    version: int
    stream: int  # the packing is ordered before the searches of its own stream only


class KeptCodebook:
    """The last packed codebook, and whether it still is the codebook's.

    On the CPU, the values decide: they are compared with a copy, a fraction of what packing costs, and what was packed
    is that copy, so that no way of writing to the codes leads to an answer for the old ones. On a GPU a comparison
    would wait for the device. There the caller has to promise that PyTorch's version counter sees every write; it does
    not see those through ``.data``, NumPy, DLPack, the storage, ``torch.distributed.broadcast`` or the replay of a CUDA
    graph. While a graph is captured nothing is kept or used, so that its replays pack the codes of their time.

    Safe to share between threads: an entry is never changed, only replaced. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._last: _Entry | None = None

    def __reduce__(self) -> tuple[type[KeptCodebook], tuple[()]]:
        return KeptCodebook, ()

    def clear(self) -> None:
        """Forget the packed codebook."""
        self._last = None

    def keeping(self, prepare: Prepare[_P]) -> Prepare[_P]:
        """``prepare(codebook, metric)`` that returns the last result again where it would be the same."""

        def prepare_once(codebook: Tensor, metric: str) -> _P:
            made_by = prepare, metric
            last = self._last
            if codebook.device.type == "cpu":
                if last and last.made_by == made_by and _holds_values(last, codebook):
                    return last.packed
                self._last = last = None  # gives the memory back before the next needs it
                copy = codebook.clone()
                packed = prepare(copy, metric)
                self._last = _Entry(made_by, packed, copy, None)
                return packed
            counters = _counters(codebook)
            if counters is None:
                return prepare(codebook, metric)
            if last and last.made_by == made_by and _holds_tensor(last, codebook) and last.counters == counters:
                return last.packed
            self._last = last = None
            packed = prepare(codebook, metric)
            self._last = _Entry(made_by, packed, weakref.ref(codebook), counters)
            return packed

        return prepare_once


def _holds_values(last: _Entry, codebook: Tensor) -> bool:
    codes = last.codes
    return isinstance(codes, Tensor) and codes.dtype == codebook.dtype and torch.equal(codes, codebook)


def _holds_tensor(last: _Entry, codebook: Tensor) -> bool:
    return isinstance(last.codes, weakref.ref) and last.codes() is codebook


def _counters(codes: Tensor) -> _Counters | None:
    """None where nothing tells whether the codes change: inference tensors count no writes, and a graph is replayed."""
    if not codes.is_cuda or codes.is_inference() or torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream(codes.device).cuda_stream
    return _Counters(codes.data_ptr(), codes._version, stream)
