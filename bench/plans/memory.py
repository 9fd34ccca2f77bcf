"""`python -m bench memory`: peak extra memory of a search and of a training step, over the number of codes.

CPU: the largest resident set of a process during one call, less the one before it; every number has a process of its
own. This includes memory that libraries take on other threads or without PyTorch's allocator. GPU: the peak of
PyTorch's allocator.
"""

import ctypes
import gc
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench.contenders.base import Prepared
from bench.harness.child import in_child
from bench.harness.machine import limit_memory, memory_field
from bench.harness.options import Options
from bench.harness.outcome import DoesNotApplyError, failure
from bench.harness.problems import Problem, make_inputs
from bench.harness.run import Group
from bench.harness.store import Row
from bench.harness.timed import prepare, wanted
from fastvq.testing.measure import peak_extra_memory

_USUAL = Problem("memory", 8192, 0, 64, whole=True)
_CODES = (256, 1024, 4096, 16_384, 65_536, 262_144)
_QUICK_TOKENS = 2048
_QUICK_CODES = (256, 4096, 65_536)
# The call before the measurement loads what libraries keep for good; large enough to take the same code paths.
_WARM_UP_TOKENS, _WARM_UP_CODES = 8192, 256


def plan(options: Options) -> Iterator[Group]:
    """Peak extra memory of a search and of a training step; one group per contender, operation and number of codes.

    Tokens and dim are those of the shape asked for.
    """
    problem = replace(_USUAL, dtype=options.dtype or torch.float32)
    if shape := options.only_shape("memory"):
        problem = replace(problem, tokens=shape.tokens, dim=shape.dim)
    elif options.quick:
        problem = replace(problem, tokens=_QUICK_TOKENS)
    problem = replace(problem, name=f"{problem.tokens}×K×{problem.dim}")
    for operation in ("search", "train"):
        for codes in _QUICK_CODES if options.quick else _CODES:
            sized = replace(problem, codes=codes)
            for row in wanted("memory", sized, options, options.names(operation), operation=operation):
                label = f"{operation}, {codes} codes, {row['contender']}"
                yield Group(label, [row], partial(_measure, row, sized, options.device))


def _measure(row: Row, problem: Problem, device: torch.device) -> list[Row]:
    row = {**row, "status": "ok", "note": ""}
    if row["contender"] == "expanded compiled":
        return [row | failure(DoesNotApplyError("the compiler takes memory of its own"))]
    if device.type == "cpu":
        arguments = (row, problem, torch.get_num_threads())
        return [row | in_child(extra_resident, arguments, preload=("bench.plans.memory", "sklearn.metrics", "faiss"))]
    try:
        prepared = _prepare(row, problem, device)
        prepared.call(0)
        return [row | {"extra_bytes": peak_extra_memory(lambda: prepared.call(0), device)}]
    except Exception as error:  # whatever another library raises belongs into the table
        return [row | failure(error)]
    finally:
        torch.cuda.empty_cache()


def extra_resident(row: Row, problem: Problem, threads: int) -> Row:
    """Columns ``version`` and ``extra_bytes`` of one call in this process, which should have done nothing before."""
    if platform.system() != "Linux":  # only Linux reports the peak of a resident set
        raise DoesNotApplyError("needs /proc of Linux")
    torch.set_num_threads(threads)
    limit_memory()
    cpu = torch.device("cpu")
    _prepare(row, replace(problem, tokens=_WARM_UP_TOKENS, codes=_WARM_UP_CODES), cpu).call(0)
    prepared = _prepare(row, problem, cpu)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory_field("/proc/self/status", "VmRSS")
    prepared.call(0)
    return {"version": row["version"], "extra_bytes": memory_field("/proc/self/status", "VmHWM") - before}


def _prepare(row: Row, problem: Problem, device: torch.device) -> Prepared:
    batches, codebook = make_inputs(problem, device)
    return prepare(row, row["operation"], problem, batches, codebook)


def growth(codes: Sequence[int], extra: Sequence[int], tokens: int, dim: int) -> dict[str, float]:
    """How extra memory grows with many codes: the line ``extra = a + b K`` through the two largest K.

    Returns:
        ``codebooks``: b per 4 D bytes, ``matrices``: b per 4 N bytes, ``least`` and ``most``: the smallest and the
        largest of ``extra - b K`` in bytes, ``flat_from``: the smallest K from which on all extra memory is within
        5 %, infinite if that is only the largest.
    """
    b = (extra[-1] - extra[-2]) / (codes[-1] - codes[-2])
    rest = [e - b * k for k, e in zip(codes, extra, strict=True)]
    flat = [k for i, k in enumerate(codes[:-1]) if max(extra[i:]) <= 1.05 * min(extra[i:])]
    return {
        "codebooks": b / (4 * dim),
        "matrices": b / (4 * tokens),
        "least": min(rest),
        "most": max(rest),
        "flat_from": min(flat, default=math.inf),
    }
