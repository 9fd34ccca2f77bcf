"""Contenders timed in turns at one problem, their indices checked against the float64 oracle in the same run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.contenders import CONTENDERS, SPECIAL
from bench.contenders.base import Prepared
from bench.harness.options import Options
from bench.harness.outcome import DoesNotApplyError, failure, seconds_row
from bench.harness.problems import Problem, dtype_name, make_inputs
from bench.harness.store import Row
from fastvq import reference
from fastvq.testing.measure import Clock, Timing

# The oracle is slow: about a second for so many terms x_j, e_kj. This many tokens show an error of one in a thousand.
_CHECKED_TOKENS = 1024
_CHECKED_TERMS = 5 * 10**8
_LEAST_CHECKED = 64
# On a GPU batches are rotated; they take at most this much memory.
BATCH_BYTES = 4 << 30


def wanted(benchmark: str, problem: Problem, options: Options, names: Sequence[str], **more: Any) -> list[Row]:
    """The rows of a problem before anything is measured, one per contender."""
    sizes = {"tokens": problem.tokens, "codes": problem.codes, "dim": problem.dim}
    row = {"benchmark": benchmark, "name": problem.name, **sizes, "dtype": dtype_name(problem.dtype)}
    row |= {"device": options.device.type, **more}
    return [{**row, "contender": name} for name in names]


def prepare(row: Row, operation: str, problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The call of a row's contender; its version goes into the row.

    Raises:
        DoesNotApplyError: it does not offer the operation.
        Exception: whatever a missing or failing contender raises.
    """
    contender = {**CONTENDERS, **SPECIAL}[row["contender"]]
    row["version"] = contender.version()
    make = getattr(contender, operation)
    if make is None:
        raise DoesNotApplyError(f"offers no {operation}")
    return make(problem, batches, codebook)


def first_calls(
    rows: Sequence[Row], make: Callable[[Row], Prepared], check: Callable[[Row, Prepared, Any], None]
) -> dict[str, Callable[[int], Any]]:
    """Prepare the contender of every row and call it once; the calls that ran, by name.

    Fills status and note, and the columns that ``check`` adds from the row, the contender and its first result.
    """
    calls = {}
    for row in rows:
        row |= {"status": "ok", "note": ""}
        try:
            prepared = make(row)
            result = prepared.call(0)
            row["note"] = prepared.note
            check(row, prepared, result)
            calls[row["contender"]] = prepared.call
        except Exception as error:  # other libraries raise anything, and it belongs into the table
            row |= failure(error)
    return calls


def fill_times(
    rows: Sequence[Row], calls: dict[str, Callable[[int], Any]], clock: Clock, repeats: int, deadline: float = math.inf
) -> dict[str, Timing]:
    """Time the calls in turns and fill the seconds of their rows, or status and note of a call that raised."""
    timings = clock.interleaved(calls, repeats, deadline)
    for row in rows:
        if row["contender"] in timings:
            row |= seconds_row(timings[row["contender"]])
        elif row["contender"] in clock.errors:
            row |= failure(clock.errors[row["contender"]])
    return timings


def time_together(rows: Sequence[Row], operation: str, problem: Problem, options: Options) -> list[Row]:
    """Fill rows of one problem: status, note, version, seconds with percentiles, and the share of wrong indices."""
    buffers = 1
    if options.device.type == "cuda":
        buffers = max(2, min(4, BATCH_BYTES // (4 * problem.tokens * problem.dim)))
    batches, codebook = make_inputs(problem, options.device, buffers)
    judged = sample(problem)
    expected = oracle(batches[0][judged.to(options.device)], codebook)

    def check(row: Row, prepared: Prepared, result: Any) -> None:
        if prepared.indices is not None:
            row |= wrong_share(prepared.indices(result).cpu()[judged], expected)

    rows = [dict(row) for row in rows]
    calls = first_calls(rows, lambda row: prepare(row, operation, problem, batches, codebook), check)
    if options.device.type == "cuda":
        torch.cuda.empty_cache()  # memory that a failed contender has left
    fill_times(rows, calls, Clock(options.device), options.repeats)
    return rows


def sample(problem: Problem) -> Tensor:
    """Which tokens the oracle judges: all of a few, otherwise as many as it does in about a second."""
    affordable = max(_LEAST_CHECKED, _CHECKED_TERMS // (problem.codes * problem.dim))
    return torch.linspace(0, problem.tokens - 1, min(problem.tokens, _CHECKED_TOKENS, affordable)).long()


def wrong_share(indices: Tensor, expected: Tensor) -> Row:
    """Columns of a row: the share of indices that differ from the oracle's, and of how many."""
    return {"wrong_share": float((indices != expected).double().mean()), "checked_tokens": len(expected)}


def oracle(x: Tensor, codebook: Tensor) -> Tensor:
    """The oracle's indices, on one thread: threads would wait for each other at every one of its small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return reference.nearest_code(x.cpu(), codebook.cpu())
    finally:
        torch.set_num_threads(threads)
