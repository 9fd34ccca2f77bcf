"""`python -m bench scaling`: how the time of a search grows with tokens, codes and dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from bench.harness.options import Options
from bench.harness.problems import Problem
from bench.harness.run import Group
from bench.harness.timed import time_together, wanted

_CENTRE = Problem("scaling", 4096, 8192, 64)
_AXES = {
    "tokens": (256, 1024, 4096, 16_384, 65_536),
    "codes": (256, 1024, 4096, 16_384, 65_536),
    "dim": (4, 16, 64, 256, 1024),
}
_QUICK_CENTRE = Problem("scaling", 1024, 2048, 64)
_QUICK_AXES = {"tokens": (256, 1024, 4096), "codes": (512, 2048, 8192), "dim": (16, 64, 256)}


def plan(options: Options) -> list[Group]:
    """One group per axis and value; the other two sizes stay at those of the shape asked for, or the usual."""
    centre = replace(_QUICK_CENTRE if options.quick else _CENTRE, dtype=options.dtype or torch.float32)
    if shape := options.only_shape("scaling"):
        centre = replace(centre, tokens=shape.tokens, codes=shape.codes, dim=shape.dim)
    centre = replace(centre, name=centre.size)
    groups = []
    for axis, values in (_QUICK_AXES if options.quick else _AXES).items():
        for value in values:
            problem = replace(centre, **{axis: value})  # type: ignore[arg-type]
            rows = wanted("scaling", problem, options, options.names("search"), axis=axis)
            measure = partial(time_together, rows, "search", problem, options)
            groups.append(Group(f"{axis} {value}", rows, measure))
    return groups


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Exponent p of ``seconds ∝ sizes^p``: the least-squares slope of the logarithms; NaN for less than two sizes."""
    if len(set(sizes)) < 2:
        return math.nan
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
