"""What compute-sanitizer would look for, in Triton's interpreter: accesses out of bounds and races between programs.

The interpreter runs one program after the other on plain memory, so that neither shows in a result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

READ, WRITE, ATOMIC = range(3)


class AccessError(AssertionError):
    """A kernel touches memory that is not its arguments', or that another program of the launch changes."""


class _Accesses(NamedTuple):
    """All accesses of one launch, a column each."""

    address: np.ndarray
    program: np.ndarray
    operation: np.ndarray  # the how manieth of its program
    kind: np.ndarray


class _Launch:
    """Checks bounds at once, and collects the accesses for a check at the end of the launch."""

    def __init__(self, name: str, tensors: list[torch.Tensor]) -> None:
        self.name = name
        storages = [tensor.untyped_storage() for tensor in tensors]
        spans = sorted({(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages})
        self.starts, self.ends = np.array(spans, dtype=np.uint64).reshape(-1, 2).T
        self.log: list[tuple[np.ndarray, tuple[int, ...], int]] = []

    def access(self, pointers, mask, kind: int) -> None:
        active = np.broadcast_to(np.asarray(mask, dtype=bool), pointers.data.shape)
        address = pointers.data[active].astype(np.uint64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = np.searchsorted(self.starts, address, side="right") - 1
        outside = (at < 0) | (address + np.uint64(size) > self.ends[np.maximum(at, 0)])
        if outside.any():
            words = ("reads", "writes", "adds to")[kind]
            raise AccessError(f"{self.name} {words} {outside.sum()} elements outside of its arguments")
        self.log.append((address, interpreter.interpreter_builder.grid_idx, kind))

    def finish(self) -> None:
        programs = {program: i for i, program in enumerate(dict.fromkeys(entry[1] for entry in self.log))}
        sizes = [len(address) for address, _, _ in self.log]
        accesses = _Accesses(
            np.concatenate([address for address, _, _ in self.log] or [np.empty(0, np.uint64)]),
            np.repeat([programs[program] for _, program, _ in self.log], sizes),
            np.repeat(np.arange(len(sizes)), sizes),
            np.repeat([kind for _, _, kind in self.log], sizes),
        )
        written = np.unique(accesses.address[accesses.kind == WRITE])
        self._check(accesses, np.isin(accesses.address, written))
        added = np.unique(accesses.address[accesses.kind == ATOMIC])
        self._check(accesses, np.isin(accesses.address, added) & (accesses.kind != WRITE), only_reads=True)

    def _check(self, accesses: _Accesses, kept: np.ndarray, only_reads: bool = False) -> None:
        """Of the accesses kept, all to one address are one program's, and nothing is read after it was changed."""
        address, program, operation, kind = (column[kept] for column in accesses)
        order = np.lexsort((operation, address))
        address, program, operation, kind = (column[order] for column in (address, program, operation, kind))
        same = address[1:] == address[:-1]
        several = same & (program[1:] != program[:-1])
        if only_reads:  # atomics of several programs are what atomics are for
            several &= (kind[1:] == READ) != (kind[:-1] == READ)
        if several.any():
            raise AccessError(f"{self.name}: one program changes {several.sum()} elements that another one uses")
        after = same & (kind[1:] == READ) & (kind[:-1] != READ)
        if after.any():
            raise AccessError(f"{self.name} reads {after.sum()} elements that it has changed, maybe in another thread")
        twice = same & (kind[1:] == WRITE) & (kind[:-1] == WRITE)
        if twice.any():
            raise AccessError(f"{self.name} writes {twice.sum()} elements twice in one program")


@contextmanager
def checked_memory() -> Iterator[list[str]]:
    """Kernels launched inside raise where they touch what they should not; yields the names of those that ran.

    Fresh tensors hold NaN, or a number far out of every range, so that a result shows whether it depends on them.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, add, call = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
        executor.__call__,
    )
    launches: list[_Launch] = []
    names: list[str] = []

    def create_masked_load(self, ptrs, mask, *rest):
        launches[-1].access(ptrs, mask.data, READ)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        launches[-1].access(ptrs, mask.data, WRITE)
        return store(self, ptrs, value, mask, *rest)

    def create_atomic_rmw(self, operation, ptr, value, mask, *rest):
        launches[-1].access(ptr, mask.data, ATOMIC)
        return add(self, operation, ptr, value, mask, *rest)

    def launch(self, *args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        launches.append(_Launch(self.fn.__name__, tensors))
        names.append(self.fn.__name__)
        call(self, *args, **kwargs)
        launches.pop().finish()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", create_masked_load)
        patch.setattr(builder, "create_masked_store", create_masked_store)
        patch.setattr(builder, "create_atomic_rmw", create_atomic_rmw)
        patch.setattr(executor, "__call__", launch)
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _filled(getattr(owner, name)))
        yield names


def _filled(make):
    def filled(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 3)

    return filled
