"""`python -m bench scaling`: how the time of a search grows with tokens, codes and dimensions."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from bench.harness.options import Options
from bench.harness.problems import Problem
from bench.harness.run import Group
from bench.harness.timed import timed_group

_CENTRE = Problem("scaling", 4096, 8192, 64)
_AXES = {
    "tokens": (256, 1024, 4096, 16_384, 65_536),
    "codes": (256, 1024, 4096, 16_384, 65_536),
    "dim": (4, 16, 64, 256, 1024),
}
_QUICK_CENTRE = Problem("scaling", 1024, 2048, 64)
_QUICK_AXES = {"tokens": (256, 1024, 4096), "codes": (512, 2048, 8192), "dim": (16, 64, 256)}


def plan(options: Options) -> Iterator[Group]:
    """Growth of a search's time with tokens, codes and dimensions; one group per axis and value.

    The other two sizes stay at those of the shape asked for, or the usual.
    """
    centre = replace(_QUICK_CENTRE if options.quick else _CENTRE, dtype=options.dtype or torch.float32)
    if shape := options.only_shape("scaling"):
        centre = replace(centre, tokens=shape.tokens, codes=shape.codes, dim=shape.dim)
    centre = replace(centre, name=centre.size)
    for axis, values in (_QUICK_AXES if options.quick else _AXES).items():
        for value in values:
            problem = replace(centre, **{axis: value})  # type: ignore[arg-type]
            yield timed_group("scaling", "search", problem, options, f"{axis} {value}", axis=axis)


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Exponent p of ``seconds ∝ sizes^p``: the least-squares slope of the logarithms; NaN for less than two sizes."""
    if len(set(sizes)) < 2:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
