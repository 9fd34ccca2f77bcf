"""Code statistics of a training step on this device: right, repeatable where promised, and timed."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch

from bench.harness.store import Row
from fastvq.testing.measure import Clock
from fastvq_kernels.configs import atomics_would_queue
from fastvq_kernels.update.accumulate import code_statistics

# Tokens, codes, dim.
_SIZES = ((262_144, 4096, 128), (65_536, 16_384, 64), (65_536, 16_384, 8), (8192, 4096, 128))
_FORMS = {"atomics": False, "ordered": True}


def statistics(device: torch.device) -> Row:
    """Check sums of integers, which are exact in any order, and time both forms, so that the rule can be judged.

    Tokens fall evenly on the codes, or all on one.
    """
    sizes = _SIZES if device.type == "cuda" else ((70, 3, 4),)
    clock = Clock(device)
    wrong: list[str] = []
    seconds: dict[str, dict[str, float]] = {}
    for (tokens, codes, dim), usage in product(sizes, ("even", "one code")):
        name = f"{tokens}×{codes}×{dim}, {usage}"
        x = torch.randint(-8, 8, (tokens, dim), device=device).float()
        indices = torch.randint(codes if usage == "even" else 1, (tokens,), device=device)
        forms = {form: partial(code_statistics, x, indices, codes, fixed) for form, fixed in _FORMS.items()}
        counts = torch.bincount(indices.cpu(), minlength=codes).float()
        sums = torch.zeros(codes, dim).index_add_(0, indices.cpu(), x.cpu())
        for form, call in forms.items():
            found = [t.cpu() for t in call()]
            if not (torch.equal(found[0], counts) and torch.equal(found[1], sums)):
                wrong.append(f"{form}, {name}")
        if not torch.equal(*(code_statistics(x * 0.37, indices, codes, True)[1] for _ in range(2))):
            wrong.append(f"not repeatable, {name}")
        calls = {form: lambda _, call=call: call() for form, call in forms.items()}
        seconds[name] = {form: timing.median for form, timing in clock.interleaved(calls, 5).items()}
        seconds[name]["chosen"] = seconds[name]["ordered" if atomics_would_queue(tokens, codes) else "atomics"]
    return {"passed": not wrong, "result": "; ".join(wrong) or "right", "seconds_by_form": seconds}
