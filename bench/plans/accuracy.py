"""`python -m bench accuracy`: share of wrong indices against float64, over the data's distance from zero."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from bench.harness.options import DTYPES, Options
from bench.harness.problems import Problem, make_inputs
from bench.harness.run import Group
from bench.harness.store import Row
from bench.harness.timed import against_oracle, first_calls, prepare, wanted

# ESM3's codebook. 1024 tokens show a share of a few in a thousand; the oracle needs a second for them.
_USUAL = Problem("esm3", 1024, 4096, 128)
_OFFSETS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)
_QUICK_TOKENS = 256
_QUICK_OFFSETS = (0.0, 3.0, 30.0, 100.0)
_HALF = ("expanded in half", "half product")


def plan(options: Options) -> Iterator[Group]:
    """Share of wrong indices over the data's distance from zero; one group per dtype and offset.

    Tokens and codes have the same offset, in standard deviations.
    """
    problem = options.only_shape("accuracy") or _USUAL
    most = _QUICK_TOKENS if options.quick else _USUAL.tokens
    problem = replace(problem, heads=1, metric="euclidean", tokens=min(problem.tokens, most))
    for name, dtype in DTYPES.items():
        if options.dtype not in (None, dtype):
            continue
        kind = replace(problem, name=problem.size, dtype=dtype)
        names = options.names("search", _HALF if dtype != torch.float32 else ())
        for offset in _QUICK_OFFSETS if options.quick else _OFFSETS:
            rows = wanted("accuracy", kind, options, names, offset=offset)
            yield Group(f"{name}, offset {offset:g}", rows, partial(judge, rows, kind, offset, options.device))


def judge(rows: Sequence[Row], problem: Problem, offset: float, device: torch.device) -> list[Row]:
    """Fill rows: status, note, version and the share of wrong indices; the oracle sees the values after rounding."""
    (x,), codebook = make_inputs(problem, device, kind="offset", offset=offset)
    check = against_oracle(x, codebook, torch.arange(problem.tokens))
    rows = [dict(row) for row in rows]
    first_calls(rows, lambda row: prepare(row, "search", problem, [x], codebook), check)
    return rows
