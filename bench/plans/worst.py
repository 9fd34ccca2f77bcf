"""`python -m bench worst`: codebooks that are ordinary in training and costly to prove a winner in."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from bench.harness.options import Options
from bench.harness.problems import Problem
from bench.harness.run import Group
from bench.harness.timed import time_together, wanted
from fastvq.testing.worst import WORST

_CONTENDERS = ("fastvq", "expanded formula")
_SIZES = ((1000, 1024, 128), (1000, 1024, 1024), (1000, 1024, 8), (2048, 2048, 256), (4096, 8192, 64))
_QUICK_SIZES = ((500, 1024, 64),)


def plan(options: Options) -> Iterator[Group]:
    """Time of a search on the worst codebooks of training, beside the expanded formula; one group per kind and size."""
    usual = [Problem("", *size) for size in (_QUICK_SIZES if options.quick else _SIZES)]
    for problem in options.shapes or usual:
        for kind in WORST:
            own = replace(problem, name=kind, dtype=options.dtype or torch.float32, heads=1, metric="euclidean")
            rows = wanted("worst", own, options, options.contenders or _CONTENDERS)
            yield Group(f"{kind}, {own.size}", rows, partial(time_together, rows, "search", own, options, kind))
