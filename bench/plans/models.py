"""`python -m bench search` and `train`: time at the sizes of models."""

from collections.abc import Iterator

from bench.harness.options import Options
from bench.harness.problems import NAMED
from bench.harness.run import Group
from bench.harness.timed import timed_group

_QUICK_SEARCH = ("llamagen", "unitok", "esm3", "encodec", "mimi", "recommender")
_TRAIN = (
    "llamagen", "esm3", "vqgan-lc", "simvq", "encodec", "ldm-f4", "videogpt", "wavtokenizer", "tats", "recommender",
)  # fmt: skip
_QUICK_TRAIN = ("llamagen", "esm3", "encodec", "videogpt")


def search(options: Options) -> Iterator[Group]:
    """Time of a search, forward only, at the sizes of models; one group per shape."""
    for problem in options.problems(list(NAMED), _QUICK_SEARCH):
        yield timed_group("search", "search", problem, options)


def train(options: Options) -> Iterator[Group]:
    """Time of a training step: search, gradient and codebook update; one group per shape.

    The indices of the first step, which searches the codebook as drawn, are checked.
    """
    for problem in options.problems(_TRAIN, _QUICK_TRAIN):
        yield timed_group("train", "train", problem, options)
