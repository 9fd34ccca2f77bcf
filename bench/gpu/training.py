"""The training step on this device: its speed, and that it never waits for the device or compiles again."""

import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

import fastvq
from bench.gpu.kernels import count_compiled
from bench.gpu.stage import Stage
from bench.harness.store import Row
from fastvq.testing.measure import Clock, compare_with_reference, synchronize
from fastvq_kernels.configs import atomics_would_queue
from fastvq_kernels.update.accumulate import code_statistics

# ESM3's and VideoGPT's codebooks: tokens, codes, dim.
_STEPS = ((32_768, 4096, 128), (32_768, 2048, 256))
_STATISTICS = ((262_144, 4096, 128), (65_536, 16_384, 64), (65_536, 16_384, 8), (8192, 4096, 128))


def training(stage: Stage) -> None:
    """Checks first, each a row with ``passed``; then the step against the reference at two sizes."""
    on_gpu = stage.device.type == "cuda"
    checks: dict[str, Callable[[torch.device], Row] | None] = {
        "recompilation": recompilation,
        "no host synchronisation": no_synchronisation if on_gpu else None,
        "CUDA graph": graph if on_gpu else None,
        "statistics": statistics,
    }
    for name, check in checks.items():
        with stage.guarded(name):
            stage.add({"name": name, **(check(stage.device) if check else {"passed": None, "result": "needs a GPU"})})
    for tokens, codes, dim in stage.while_time([(10, 12, 8)] if stage.dry else _STEPS):
        name = f"training step {tokens}×{codes}×{dim}"
        with stage.guarded(name):
            module = fastvq.EMACodebook(codes, dim, device=stage.device)
            x = torch.randn(tokens, dim, device=stage.device)
            result = compare_with_reference(module, x, x[: min(tokens, 256)])
            ours, theirs = result["fastvq"], result["reference"]
            times = f"{1e3 * ours['seconds']:.2f} against {1e3 * theirs['seconds']:.2f} ms of the reference"
            memory = f"{ours['peak_extra_bytes'] / 1e6:.1f} against {theirs['peak_extra_bytes'] / 1e6:.1f} MB extra"
            verdict = {"passed": ours["indices_equal_to_oracle"] == 1, "result": f"{times}, {memory}"}
            stage.add({"name": name, **verdict, **result})


def recompilation(device: torch.device) -> Row:
    """Other numbers of tokens and codes must compile nothing. Also the seconds of the first search, which compiles."""
    dim = 40  # a dimension that nothing else uses
    sizes = [(n, k) for n in (5000, 4999, 4096, 300, 33, 16, 1) for k in (1000, 4096, 37, 1)]
    if device.type == "cpu":
        sizes = [(5, 37), (1, 1)]

    def search(n: int, k: int) -> float:
        start = time.perf_counter()
        fastvq.nearest_code(torch.randn(n, dim, device=device), torch.randn(k, dim, device=device), backend="triton")
        synchronize(device)
        return time.perf_counter() - start

    first, second = search(*sizes[0]), search(*sizes[0])
    compiled = count_compiled()
    interpreted = not compiled
    total, found = 0, []
    for n, k in sizes[1:]:
        search(n, k)
        new = count_compiled() - compiled
        compiled += new
        total += new.total()
        found += [f"{name} for N {n}, K {k}" for name in new]
    result = "interpreted" if interpreted else f"{total} compiled again" + (f": {'; '.join(found)}" if found else "")
    result += f", first search {first:.1f} s"
    seconds = {"first_search_seconds": first, "second_search_seconds": second}
    return {"passed": None if interpreted else total == 0, "result": result, "compiled_again": total, **seconds}


def no_synchronisation(device: torch.device) -> Row:
    """A training step, forward, backward and update, under PyTorch's check for synchronising calls."""
    module = fastvq.EMACodebook(1024, 64, device=device)
    x = torch.randn(5000, 64, device=device, requires_grad=True)

    def step() -> None:
        quantized, _, loss = module(x)
        (quantized.sum() + loss).backward()

    for _ in range(2):  # compiles, and initialises the codebook
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return {"passed": True, "result": "none in a training step"}


def graph(device: torch.device) -> Row:
    """The search captured once and replayed with other tokens and codes, against eager calls and the oracle."""
    x, codebook = torch.randn(3000, 64, device=device), torch.randn(1000, 64, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fastvq.nearest_code(x, codebook, backend="triton")
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        indices = fastvq.nearest_code(x, codebook, backend="triton")
    wrong = differ = 0
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x) + seed)
        codebook.copy_(torch.randn_like(codebook) + seed)
        captured.replay()
        torch.cuda.synchronize()
        differ += int((indices != fastvq.nearest_code(x, codebook, backend="triton")).sum())
        expected = fastvq.reference.nearest_code(x[:200].cpu(), codebook.cpu())
        wrong += int((indices[:200].cpu() != expected).sum())
    return {"passed": wrong == differ == 0, "result": f"{wrong} wrong, {differ} differ from eager calls"}


def statistics(device: torch.device) -> Row:
    """Check sums of integers, which are exact in any order, and time both forms, so that the rule can be judged.

    Tokens fall evenly on the codes, or all on one.
    """
    sizes = _STATISTICS if device.type == "cuda" else ((70, 3, 4),)
    clock = Clock(device)
    wrong: list[str] = []
    seconds: dict[str, dict[str, float]] = {}
    for (tokens, codes, dim), usage in product(sizes, ("even", "one code")):
        name = f"{tokens}×{codes}×{dim}, {usage}"
        x = torch.randint(-8, 8, (tokens, dim), device=device).float()
        indices = torch.randint(codes if usage == "even" else 1, (tokens,), device=device)
        counts = torch.bincount(indices.cpu(), minlength=codes).float()
        sums = torch.zeros(codes, dim).index_add_(0, indices.cpu(), x.cpu())
        calls = {form: partial(_statistics, x, indices, codes, form) for form in ("atomics", "ordered")}
        for form, call in calls.items():
            found = [t.cpu() for t in call()]
            if not (torch.equal(found[0], counts) and torch.equal(found[1], sums)):
                wrong.append(f"{form}, {name}")
        if not torch.equal(*(_statistics(x * 0.37, indices, codes, "ordered")[1] for _ in range(2))):
            wrong.append(f"not repeatable, {name}")
        seconds[name] = {form: timing.median for form, timing in clock.interleaved(calls, 5).items()}
        seconds[name]["chosen"] = seconds[name]["ordered" if atomics_would_queue(tokens, codes) else "atomics"]
    return {"passed": not wrong, "result": "; ".join(wrong) or "right", "seconds_by_form": seconds}


def _statistics(x: Tensor, indices: Tensor, codes: int, form: str, call: int = 0) -> tuple[Tensor, Tensor]:
    return code_statistics(x, indices, codes, form == "ordered")
