"""`python -m bench search`: nearest code, forward only, at the sizes of models."""

from __future__ import annotations

from functools import partial

from bench.harness.options import Options
from bench.harness.problems import NAMED
from bench.harness.run import Group
from bench.harness.timed import time_together, wanted

_QUICK = ("llamagen", "unitok", "esm3", "encodec", "mimi", "recommender")


def plan(options: Options) -> list[Group]:
    """One group per shape."""
    groups = []
    for problem in options.problems(list(NAMED), _QUICK):
        rows = wanted("search", problem, options, options.names("search"))
        groups.append(Group(problem.name, rows, partial(time_together, rows, "search", problem, options)))
    return groups
