"""The checked options of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bench.contenders import CONTENDERS, SPECIAL, offering
from bench.harness.problems import NAMED, Problem, for_cpu, parse_problems, plain
from fastvq.testing.machine import pick_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_USUAL_REPEATS = {"cpu": 5, "cuda": 25}
_QUICK_TOKENS = 2048


@dataclass(frozen=True)
class Options:
    """The options of one run."""

    device: torch.device
    dtype: torch.dtype | None  # None for float32, for all three in the accuracy benchmark
    shapes: tuple[Problem, ...]  # empty for those of the benchmark
    contenders: tuple[str, ...]  # empty for all that offer the operation
    repeats: int  # timed calls of each contender
    quick: bool  # few and small sizes

    @staticmethod
    def checked(device: str, dtype: str, shapes: str, contenders: str, repeats: int | None, quick: bool) -> "Options":
        """Options from their texts; an empty text and None stand for the default. ValueError names a wrong option."""
        where = pick_device(device)
        if dtype and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        names = tuple(name.strip() for name in contenders.split(",") if name.strip())
        known = {**CONTENDERS, **SPECIAL}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"contenders must be among {', '.join(known)}, got {', '.join(unknown)}")
        repeats = repeats or _USUAL_REPEATS[where.type]
        return Options(where, DTYPES.get(dtype), tuple(parse_problems(shapes)), names, repeats, quick)

    def problems(self, usual: Sequence[str], quick: Sequence[str]) -> list[Problem]:
        """The problems asked for, or those of the names; a CPU gets models with as many tokens as take seconds."""
        tokens = {"tokens": _QUICK_TOKENS} if self.quick else {}
        found = []
        for problem in self.shapes or [NAMED[name] for name in (quick if self.quick else usual)]:
            problem = replace(plain(problem), dtype=self.dtype or torch.float32)
            cut = self.device.type == "cpu" and problem.name in NAMED
            found.append(for_cpu(problem, **tokens) if cut else problem)
        return found

    def only_shape(self, benchmark: str) -> Problem | None:
        """The shape asked for, if any, of a benchmark that takes one; ValueError if there are several."""
        if len(self.shapes) > 1:
            raise ValueError(f"shapes must be one for {benchmark}, got {len(self.shapes)}")
        return self.shapes[0] if self.shapes else None

    def names(self, operation: str, extra: Sequence[str] = ()) -> list[str]:
        """Contenders asked for, or all that offer ``"search"`` or ``"train"`` and ``extra``."""
        return list(self.contenders or [*offering(operation), *extra])
