"""`python -m bench memory`: peak extra memory of a search and of a training step, over the number of codes.

On a CPU the whole process counts: its largest resident set during one call, less the one before it, in a process of
its own for every number. What libraries take without PyTorch's allocator, and on other threads, is in it. On a GPU:
what PyTorch's allocator holds at the peak.
"""

from __future__ import annotations

import ctypes
import gc
import math
import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench.harness.child import in_child
from bench.harness.machine import limit_memory
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
# Runs before the measurement, so that what libraries load and keep for good is there: as large as to go the same ways.
_WARM_UP = {"tokens": 8192, "codes": 256}


def plan(options: Options) -> list[Group]:
    """One group per contender, operation and number of codes; tokens and dim are those of the shape asked for."""
    problem = replace(_USUAL, dtype=options.dtype or torch.float32)
    if shape := options.only_shape("memory"):
        problem = replace(problem, tokens=shape.tokens, dim=shape.dim)
    elif options.quick:
        problem = replace(problem, tokens=_QUICK_TOKENS)
    problem = replace(problem, name=f"{problem.tokens}×K×{problem.dim}")
    groups = []
    for operation in ("search", "train"):
        for codes in _QUICK_CODES if options.quick else _CODES:
            sized = replace(problem, codes=codes)
            for row in wanted("memory", sized, options, options.names(operation), operation=operation):
                label = f"{operation}, {codes} codes, {row['contender']}"
                groups.append(Group(label, [row], partial(_measure, row, sized, options.device)))
    return groups


def _measure(row: Row, problem: Problem, device: torch.device) -> list[Row]:
    row = {**row, "status": "ok", "note": ""}
    if row["contender"] == "expanded compiled":
        return [row | failure(DoesNotApplyError("the compiler takes memory of its own"))]
    if device.type == "cpu":
        arguments = (row, problem, torch.get_num_threads())
        return [row | in_child(extra_resident, arguments, preload=("bench.plans.memory", "sklearn.metrics", "faiss"))]
    try:
        return [row | _extra_on_gpu(row, problem, device)]
    except Exception as error:  # whatever another library raises belongs into the table
        return [row | failure(error)]
    finally:
        torch.cuda.empty_cache()


def _extra_on_gpu(row: Row, problem: Problem, device: torch.device) -> Row:
    batches, codebook = make_inputs(problem, device)
    prepared = prepare(row, row["operation"], problem, batches, codebook)
    prepared.call(0)
    return {"version": row["version"], "extra_bytes": peak_extra_memory(lambda: prepared.call(0), device)}


def extra_resident(row: Row, problem: Problem, threads: int) -> Row:
    """Columns ``version`` and ``extra_bytes`` of one call in this process, which should have done nothing before.

    Raises:
        DoesNotApplyError: not on Linux, where the system tells the peak of a resident set.
    """
    if platform.system() != "Linux":
        raise DoesNotApplyError("needs /proc of Linux")
    torch.set_num_threads(threads)
    limit_memory()
    cpu = torch.device("cpu")
    small = replace(problem, **_WARM_UP)  # type: ignore[arg-type]
    batches, codebook = make_inputs(small, cpu)
    prepare(row, row["operation"], small, batches, codebook).call(0)
    batches, codebook = make_inputs(problem, cpu)
    prepared = prepare(row, row["operation"], problem, batches, codebook)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    before = _status("VmRSS")
    prepared.call(0)
    return {"version": row["version"], "extra_bytes": _status("VmHWM") - before}


def _status(name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def growth(codes: Sequence[int], extra: Sequence[int], tokens: int, dim: int) -> dict[str, float]:
    """How extra memory grows with many codes: the line ``extra = a + b K`` through the two largest K.

    Returns:
        ``codebooks``: b per 4 D bytes, ``matrices``: b per 4 N bytes, ``least`` and ``most``: the smallest and the
        largest of ``extra - b K`` in bytes, and ``flat_from``: the smallest K from which on all extra memory is within
        5 %, infinite where only that of the largest is.
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
