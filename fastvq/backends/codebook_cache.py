"""Cache of the packed codebook, dropped when the codes change."""

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
    # On the CPU a copy of the codes; on a GPU the codebook itself, whose changes the counters tell.
    codes: Tensor | weakref.ref[Tensor]
    counters: _Counters | None


class _Counters(NamedTuple):
    address: int
    version: int
    stream: int  # packing is finished before later searches of the same stream only


class CodebookCache:
    """The last packed codebook, for as long as the codes are the same.

    On the CPU the values decide. They are compared with a copy, at a fraction of the price of packing, so that no way
    of writing to the codes gives an answer for the old ones. On a GPU a comparison would wait for the device. There
    the caller promises that PyTorch's version counter sees every write. It does not see writes through ``.data``,
    NumPy, DLPack, the storage, ``torch.distributed.broadcast`` or the replay of a CUDA graph. While a graph is captured
    the cache is neither filled nor used, so that every replay packs the codes of its time.

    Threads may share a cache: an entry is never changed, only replaced. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._last: _Entry | None = None

    def __reduce__(self) -> tuple[type[CodebookCache], tuple[()]]:
        return CodebookCache, ()

    def clear(self) -> None:
        """Forget the packed codebook."""
        self._last = None

    def keeping(self, prepare: Prepare[_P]) -> Prepare[_P]:
        """``prepare(codebook, metric)``, or its last result where the codes are the same."""

        def prepare_once(codebook: Tensor, metric: str) -> _P:
            made_by = prepare, metric
            last = self._last
            if codebook.device.type == "cpu":
                if last and last.made_by == made_by and _holds_values(last, codebook):
                    return last.packed
                self._last = last = None  # frees the memory before the next codebook needs it
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
    """None where nothing tells whether the codes change: in inference tensors, and while a CUDA graph is captured."""
    if not codes.is_cuda or codes.is_inference() or torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream(codes.device).cuda_stream
    return _Counters(codes.data_ptr(), codes._version, stream)
