"""The searches of the GPU pack: sizes of published kernel benchmarks, then models."""

from dataclasses import replace

import torch

from bench.harness import problems
from bench.harness.problems import Problem

# Sizes of flash-kmeans' published grid.
PUBLISHED = (
    Problem("k16384-d64", 65_536, 16_384, 64, dtype=torch.float16),
    Problem("1M-k4096-d128", 1_048_576, 4096, 128, dtype=torch.float16),
    Problem("1M-k16384-d64", 1_048_576, 16_384, 64, dtype=torch.float16),
    Problem("1M-k4096-d256", 1_048_576, 4096, 256, dtype=torch.float16),
    Problem("k1024-d64", 65_536, 1024, 64, dtype=torch.float16),
    Problem("1M-k4096-d512", 1_048_576, 4096, 512, dtype=torch.float16),
)

# Tokens per training step of each model, and sizes between them.
MODELS = (
    *problems.MODELS,
    Problem("k16384-d16", 65_536, 16_384, 16),
    Problem("k16384-d32", 65_536, 16_384, 32),
    Problem("esm3-small", 8192, 4096, 128),
)


def published(quick: bool) -> list[Problem]:
    """The published sizes in float16, then most of them in float32 and bfloat16; the first two with ``quick``."""
    if quick:
        return list(PUBLISHED[:2])
    return [
        *PUBLISHED,
        *(replace(problem, dtype=torch.float32) for problem in PUBLISHED),
        *(replace(problem, dtype=torch.bfloat16) for problem in PUBLISHED[:4]),
    ]


def tiny(problem: Problem) -> Problem:
    """The same problem at a size for the interpreter."""
    most = {"tokens": 12, "codes": 40, "dim": 32, "heads": 2}
    return replace(problem, **{name: min(size, getattr(problem, name)) for name, size in most.items()})
