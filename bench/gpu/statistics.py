"""The statistics of a training step on this device: is each form right, is one repeatable, how long do they take?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.gpu.stage import Row
from fastvq.testing.measure import Clock
from fastvq_kernels.configs import atomics_would_queue
from fastvq_kernels.update.accumulate import code_statistics

# Tokens, codes, dim.
_SIZES = ((262_144, 4096, 128), (65_536, 16_384, 64), (65_536, 16_384, 8), (8192, 4096, 128))
_FORMS = {"atomics": False, "ordered": True}


def statistics(device: torch.device) -> Row:
    """Sums of integers, exact in any order, and the times by which the rule that chooses a form can be judged.

    Tokens fall on the codes evenly, or all on one.
    """
    sizes = _SIZES if device.type == "cuda" else ((70, 3, 4),)
    clock = Clock(device)
    wrong: list[str] = []
    seconds: dict[str, dict[str, float]] = {}
    for tokens, codes, dim in sizes:
        x = torch.randint(-8, 8, (tokens, dim), device=device).float()
        for usage in ("even", "one code"):
            indices = torch.randint(codes if usage == "even" else 1, (tokens,), device=device)
            name = f"{tokens}×{codes}×{dim}, {usage}"
            wrong += [f"{form}, {name}" for form in _FORMS if not _is_right(x, indices, codes, _FORMS[form])]
            repeated = [code_statistics(x * 0.37, indices, codes, True)[1] for _ in range(2)]
            if not torch.equal(*repeated):
                wrong.append(f"not repeatable, {name}")

            def timed(fixed: bool, x: Tensor = x, indices: Tensor = indices, codes: int = codes) -> Any:
                return lambda i: code_statistics(x, indices, codes, fixed)

            timings = clock.interleaved({form: timed(fixed) for form, fixed in _FORMS.items()}, 5)
            seconds[name] = {form: timing.median for form, timing in timings.items()}
            seconds[name]["chosen"] = seconds[name]["ordered" if atomics_would_queue(tokens, codes) else "atomics"]
    return {"passed": not wrong, "result": "; ".join(wrong) or "right", "seconds_by_form": seconds}


def _is_right(x: Tensor, indices: Tensor, codes: int, fixed: bool) -> bool:
    counts, sums = (t.cpu() for t in code_statistics(x, indices, codes, fixed))
    expected = torch.zeros_like(sums).index_add_(0, indices.cpu(), x.cpu())
    return torch.equal(sums, expected) and torch.equal(counts, torch.bincount(indices.cpu(), minlength=codes).float())
