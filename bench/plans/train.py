"""`python -m bench train`: the quantizer's whole training step: search, gradient, and the update of the codebook."""

from __future__ import annotations

from functools import partial

from bench.harness.options import Options
from bench.harness.run import Group
from bench.harness.timed import time_together, wanted

_USUAL = (
    "llamagen", "esm3", "vqgan-lc", "simvq", "encodec", "ldm-f4", "videogpt", "wavtokenizer", "tats", "recommender",
)  # fmt: skip
_QUICK = ("llamagen", "esm3", "encodec", "videogpt")


def plan(options: Options) -> list[Group]:
    """One group per shape. The first step's indices, those of the codebook as drawn, are checked."""
    groups = []
    for problem in options.problems(_USUAL, _QUICK):
        rows = wanted("train", problem, options, options.names("train"))
        groups.append(Group(problem.name, rows, partial(time_together, rows, "train", problem, options)))
    return groups
