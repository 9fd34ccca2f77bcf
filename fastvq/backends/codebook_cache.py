"""Cache of the packed codebook, dropped when the codes change."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_P = TypeVar("_P")
Prepare = Callable[[Tensor, str], _P]
_IsSame = Callable[[Tensor], bool]


class _Entry(NamedTuple):
    made_by: tuple[Prepare[Any], str]
    packed: Any
    is_same: _IsSame


class _Counters(NamedTuple):
    address: int
    version: int
    stream: int  # packing is finished before later searches of the same stream only


class CodebookCache:
    """The last packed codebook, for as long as the codes are the same.

    On the CPU the values decide: they are compared with a copy, at a fraction of the price of packing. On a GPU, where
    that would wait for the device, the caller promises that PyTorch's version counter sees every write. It does not see
    writes through ``.data``, NumPy, DLPack, the storage, ``torch.distributed.broadcast`` or the replay of a CUDA graph.
    While a graph is captured the cache is neither filled nor used: every replay packs the codes of its time.

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
            made_by, last = (prepare, metric), self._last
            if last and last.made_by == made_by and last.is_same(codebook):
                return last.packed
            codes, is_same = _watch(codebook)
            if is_same is None:
                return prepare(codes, metric)
            self._last = last = None  # frees the memory before the next codebook needs it
            packed = prepare(codes, metric)
            self._last = _Entry(made_by, packed, is_same)
            return packed

        return prepare_once


def _watch(codebook: Tensor) -> tuple[Tensor, _IsSame | None]:
    """What to pack, and a function that tells whether a later codebook is the same; None where nothing can tell."""
    if codebook.device.type == "cpu":
        copy = codebook.clone()
        return copy, lambda codes: (codes.device, codes.dtype) == (copy.device, copy.dtype) and torch.equal(codes, copy)
    counters, reference = _counters(codebook), weakref.ref(codebook)
    return codebook, counters and (lambda codes: reference() is codes and _counters(codes) == counters)


def _counters(codes: Tensor) -> _Counters | None:
    """None where nothing tells whether the codes change: in inference tensors, and while a CUDA graph is captured."""
    if not codes.is_cuda or codes.is_inference() or torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream(codes.device).cuda_stream
    return _Counters(codes.data_ptr(), codes._version, stream)
