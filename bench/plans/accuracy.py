"""`python -m bench accuracy`: share of wrong indices against float64, over the data's distance from zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.contenders.base import Prepared
from bench.harness.options import DTYPES, Options
from bench.harness.problems import Problem, make_inputs
from bench.harness.run import Group
from bench.harness.store import Row
from bench.harness.timed import first_calls, oracle, prepare, wanted, wrong_share

# ESM3's codebook. Enough tokens for a share of a few in a thousand; the oracle needs a second for them.
_USUAL = Problem("esm3", 1024, 4096, 128)
_OFFSETS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)
_QUICK_TOKENS = 256
_QUICK_OFFSETS = (0.0, 3.0, 30.0, 100.0)
_HALF = ("expanded in half", "half product")


def plan(options: Options) -> list[Group]:
    """One group per dtype and offset, in standard deviations of tokens and codes, which all have the same offset."""
    problem = options.only_shape("accuracy") or _USUAL
    problem = replace(problem, heads=1, metric="euclidean", tokens=min(problem.tokens, _USUAL.tokens))
    if options.quick:
        problem = replace(problem, tokens=min(problem.tokens, _QUICK_TOKENS))
    problem = replace(problem, name=problem.size)
    groups = []
    for name, dtype in DTYPES.items():
        if options.dtype not in (None, dtype):
            continue
        names = options.names("search", _HALF if dtype != torch.float32 else ())
        for offset in _QUICK_OFFSETS if options.quick else _OFFSETS:
            kind = replace(problem, dtype=dtype)
            rows = wanted("accuracy", kind, options, names, offset=offset)
            measure = partial(judge, rows, kind, offset, options.device)
            groups.append(Group(f"{name}, offset {offset:g}", rows, measure))
    return groups


def judge(rows: Sequence[Row], problem: Problem, offset: float, device: torch.device) -> list[Row]:
    """Fill rows: status, note, version and the share of wrong indices; the oracle sees the values after rounding."""
    (x,), codebook = make_inputs(problem, device, kind="offset", offset=offset)
    expected = oracle(x, codebook)

    def check(row: Row, prepared: Prepared, result: Any) -> None:
        if prepared.indices is not None:
            row |= wrong_share(prepared.indices(result).cpu(), expected)

    rows = [dict(row) for row in rows]
    first_calls(rows, lambda row: prepare(row, "search", problem, [x], codebook), check)
    return rows
