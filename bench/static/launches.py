"""The launches of the shipped code, recorded instead of run: what Triton would compile for a chip that is not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from bench.static.offline import TARGETS, Launch
from bench.static.plain_kernels import max_with_index
from fastvq_kernels.search.pack_codes import pack_codebook
from fastvq_kernels.search.pipeline import certified_search
from fastvq_kernels.update.accumulate import code_statistics
from fastvq_kernels.update.ema import ema_step

# Multiples of 16, as in training: Triton compiles sizes that it may divide by 16.
TOKENS, CODES = 2048, 1024
PLAIN_TILE = 128


@contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Launches inside are recorded, not run; fastvq takes its configurations for ``target``.

    Raises:
        RuntimeError: kernels were decorated for the interpreter.
    """
    # Triton decides at decoration: its own library (tl.max) may be interpreted where the variable was unset later.
    if triton.knobs.runtime.interpret or not isinstance(tl.max, jit.JITFunction):
        raise RuntimeError("compiling offline needs real kernels: unset TRITON_INTERPRET and start Python again")
    backend = make_backend(TARGETS[target])
    found: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(kernel, signature, constants, attributes)
        found.append(Launch(kernel.fn.__name__, source, options.__dict__))

    with patch.object(jit.JITFunction, "run", run), patch("fastvq_kernels.launch.current_target", lambda: target):
        yield found


def search(target: str, dim: int, metric: str = "euclidean") -> list[Launch]:
    """A whole search, packing included, of float32 tokens of ``dim`` columns."""
    with recording(target) as found:
        certified_search(torch.empty(1, TOKENS, dim), pack_codebook(torch.empty(CODES, dim), metric))
    return found


def training(target: str, dim: int) -> list[Launch]:
    """Both forms of the statistics, and the update of the codebook."""
    x, indices = torch.empty(TOKENS, dim), torch.zeros(TOKENS, dtype=torch.int64)
    state = torch.empty(CODES, dim), torch.empty(CODES), torch.empty(CODES, dim)
    with recording(target) as found:
        for deterministic in (False, True):
            counts, sums = code_statistics(x, indices, CODES, deterministic)
        ema_step(*state, counts.double(), sums, sums.float(), torch.tensor(True), 0.99, 1.0, None, True, 1e-7)
    return found


def plain(target: str) -> Launch:
    """A search that keeps the maximum with its index for every pair: the baseline of the scan."""
    x, codes = torch.empty(TOKENS, 64, dtype=torch.float16), torch.empty(CODES, 64, dtype=torch.float16)
    norms, out = torch.empty(CODES), torch.empty(TOKENS, dtype=torch.int32)
    warps = 8 if target == "sm_100" else 4  # four warps spill on sm_100
    tile = {"BN": PLAIN_TILE, "BK": PLAIN_TILE, "num_warps": warps}
    with recording(target) as found:
        max_with_index[(1,)](x, codes, norms, out, TOKENS, CODES, D=64, LOWEST=True, **tile)
    return found[0]
