"""Modelled cost, on an H100, of the statistics and the moving averages of a training step, from the bytes they move.

The measure is the time of reading the tokens once, at the rates of `refine_model.py`. Launches are counted beside it;
latency and arithmetic are left out. Atomics read and write at the rate of L2 and queue at the most used code of Zipf's
law, as the rule that chooses between the two forms assumes. Sums and their additions are float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton

from bench.gpu.problems import MODELS, PUBLISHED
from bench.harness.problems import Problem
from bench.static.refine_model import L2_RATE, SECTOR, operand_rate
from fastvq_kernels.configs import HOT_ADD_SECONDS, ORDERED, atomics_would_queue, hottest_share
from fastvq_kernels.update.ordered import sort_key

# Kernels one after another: two buffers of zeros, the atomics, and the conversion of the counts.
ATOMIC_LAUNCHES = 4


@dataclass(frozen=True)
class Form:
    """Modelled seconds of one form of the statistics by term, and how many kernels follow each other."""

    terms: dict[str, float]
    launches: int

    @property
    def seconds(self) -> float:
        """All terms one after another."""
        return sum(self.terms.values())


def read_seconds(problem: Problem) -> float:
    """Reading the tokens once."""
    size = _sizes(problem)[0] * problem.dim * problem.dtype.itemsize
    return size / operand_rate(size)


def atomic_form(problem: Problem) -> Form:
    """The statistics by atomics."""
    tokens, codes = _sizes(problem)
    sums, added = 8 * codes * problem.dim, 8 * tokens * problem.dim
    terms = {"tokens": read_seconds(problem) + 8 * tokens / operand_rate(8 * tokens), "sums": sums / operand_rate(sums)}
    adds = 2 * added / min(L2_RATE, operand_rate(sums))
    queue = tokens * hottest_share(codes) * HOT_ADD_SECONDS
    # Reading the tokens and adding them overlap; so does the queue at one row with the additions to others.
    terms["additions"] = max(0.0, max(adds, queue) - terms["tokens"])
    return Form(terms, ATOMIC_LAUNCHES)


def ordered_form(problem: Problem) -> Form:
    """The statistics in a fixed order."""
    tokens, codes = _sizes(problem)
    key = sort_key(codes).itemsize
    # Conversion, places, histogram; then one pass over keys and places per byte of a key.
    sort = tokens * ((8 + key) + 8 + key + key * 2 * (key + 8))
    row = SECTOR * triton.cdiv(problem.dim * problem.dtype.itemsize, SECTOR)  # gathered, so in whole sectors
    sums = 8 * codes * problem.dim
    levels = max(2, 1 + int(math.log(max(tokens, 1), ORDERED.run)))
    above = 2 * 8 * problem.dim * tokens / ORDERED.run
    # The upper halves of a binary search are shared; below, every code reads sectors of its own.
    starts = codes * (SECTOR * max(0, math.log2(max(tokens, 1) * key / SECTOR)) / 2 + 16 * levels)
    terms = {
        "tokens": tokens * (row + 8) / operand_rate(tokens * row),
        "sort": sort / operand_rate(2 * tokens * (key + 8)),
        "starts": starts / L2_RATE,
        "sums": sums / operand_rate(sums) + above / L2_RATE,
    }
    # Conversion, places, histogram, its sums, a pass per byte, boundaries and their search, the levels, two for counts.
    return Form(terms, 4 + key + 2 + levels + 2)


def average_seconds(problem: Problem) -> float:
    """The moving averages: sums and averages in, from L2 once more after the look for overflow; averages, codes out."""
    values = _sizes(problem)[1] * problem.dim
    return (8 + 3 * 4) * values / operand_rate(4 * values) + (8 + 4) * values / L2_RATE


def statistics_rows() -> Iterator[dict[str, Any]]:
    """A row per published shape and model."""
    for problem in (*PUBLISHED, *MODELS):
        tokens, codes = _sizes(problem)
        forms = {"atomics": atomic_form(problem), "ordered": ordered_form(problem)}
        chosen = "ordered" if atomics_would_queue(tokens, codes) else "atomics"
        read = read_seconds(problem)
        yield {
            "kernel": "statistics model",
            "target": "sm_90",
            "shape": problem.name,
            "size": problem.size,
            "read_modelled_us": 1e6 * read,
            **{f"{name}_modelled_us": 1e6 * form.seconds for name, form in forms.items()},
            **{f"{name}_launches": form.launches for name, form in forms.items()},
            "chosen": chosen,
            "reads_of_x": forms[chosen].seconds / read,
            "largest_term": max(forms[chosen].terms, key=lambda term: forms[chosen].terms[term]),
            "ema_modelled_us": 1e6 * average_seconds(problem),
        }


def _sizes(problem: Problem) -> tuple[int, int]:
    return problem.heads * problem.tokens, problem.heads * problem.codes
