"""Contenders timed in turns on one problem; the float64 oracle checks their indices in the same run."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.contenders import CONTENDERS, SPECIAL
from bench.contenders.base import Prepared
from bench.harness.options import Options
from bench.harness.outcome import DoesNotApplyError, failure, seconds_row
from bench.harness.problems import Problem, dtype_name, make_inputs
from bench.harness.run import Group
from bench.harness.store import Row
from fastvq import reference
from fastvq.testing.measure import Clock, Timing

# The oracle computes 5e8 terms x_j, e_kj in about a second. 1024 tokens show an error of one in a thousand.
_CHECKED_TOKENS = 1024
_CHECKED_TERMS = 5 * 10**8
_LEAST_CHECKED = 64
# On a GPU batches are rotated; they take at most this much memory.
BATCH_BYTES = 4 << 30

Check = Callable[[Row, Prepared, Any], None]


def wanted(benchmark: str, problem: Problem, options: Options, names: Sequence[str], **more: Any) -> list[Row]:
    """The rows of a problem before anything is measured, one per contender."""
    sizes = {"tokens": problem.tokens, "codes": problem.codes, "dim": problem.dim}
    row = {"benchmark": benchmark, "name": problem.name, **sizes, "dtype": dtype_name(problem.dtype)}
    row |= {"device": options.device.type, **more}
    return [{**row, "contender": name} for name in names]


def timed_group(
    benchmark: str, operation: str, problem: Problem, options: Options, label: str = "", **more: Any
) -> Group:
    """The contenders of an operation, timed together on one problem."""
    rows = wanted(benchmark, problem, options, options.names(operation), **more)
    return Group(label or problem.name, rows, partial(time_together, rows, operation, problem, options))


def prepare(row: Row, operation: str, problem: Problem, batches: Sequence[Tensor], codebook: Tensor) -> Prepared:
    """The call of a row's contender, whose version goes into the row. A missing or failing one raises anything."""
    contender = {**CONTENDERS, **SPECIAL}[row["contender"]]
    row["version"] = contender.version()
    make = getattr(contender, operation)
    if make is None:
        raise DoesNotApplyError(f"offers no {operation}")
    return make(problem, batches, codebook)


def first_calls(rows: Sequence[Row], make: Callable[[Row], Prepared], check: Check) -> dict[str, Callable[[int], Any]]:
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


def time_together(
    rows: Sequence[Row], operation: str, problem: Problem, options: Options, kind: str = "gaussian"
) -> list[Row]:
    """Fill rows of one problem: status, note, version, seconds with percentiles, and the share of wrong indices.

    ``kind`` is that of :func:`make_inputs`.
    """
    buffers = max(2, min(4, BATCH_BYTES // (4 * problem.tokens * problem.dim))) if options.device.type == "cuda" else 1
    batches, codebook = make_inputs(problem, options.device, buffers, kind)
    # All tokens if they are few, otherwise as many as the oracle judges in about a second.
    affordable = max(_LEAST_CHECKED, _CHECKED_TERMS // (problem.codes * problem.dim))
    judged = torch.linspace(0, problem.tokens - 1, min(problem.tokens, _CHECKED_TOKENS, affordable)).long()
    check = against_oracle(batches[0], codebook, judged)
    rows = [dict(row) for row in rows]
    calls = first_calls(rows, lambda row: prepare(row, operation, problem, batches, codebook), check)
    if options.device.type == "cuda":
        torch.cuda.empty_cache()  # memory that a failed contender has left
    fill_times(rows, calls, Clock(options.device), options.repeats)
    return rows


def against_oracle(x: Tensor, codebook: Tensor, judged: Tensor) -> Check:
    """A check that fills the share of wrong indices among the tokens ``judged``, and how many those are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads would wait for each other at each of the oracle's small operations
    try:
        expected = reference.nearest_code(x[judged.to(x.device)].cpu(), codebook.cpu())
    finally:
        torch.set_num_threads(threads)

    def check(row: Row, prepared: Prepared, result: Any) -> None:
        if prepared.indices is not None:
            wrong = prepared.indices(result).cpu()[judged] != expected
            row |= {"wrong_share": float(wrong.double().mean()), "checked_tokens": len(expected)}

    return check
