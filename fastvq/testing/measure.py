"""Seconds and bytes of a call, on the CPU and on GPUs, and fastvq against its reference in both."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastvq

# Seconds; libgomp was seen to spin for 16 ms.
_SPINNING = 0.05


class Timing(NamedTuple):
    """Seconds of repeated calls and their median."""

    median: float
    seconds: list[float]


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on ``device``; a clock read before that shows the launch only."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def settle_down(device: torch.device) -> None:
    """Wait until nothing of an earlier call runs any more.

    On a GPU the queued work. On the CPU the threads of OpenMP, which go on spinning after a parallel loop, some for
    tens of milliseconds, and take the time from the call that is measured next.
    """
    synchronize(device)
    if device.type == "cpu":
        time.sleep(_SPINNING)


def median_seconds(
    functions: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, Timing]:
    """Time functions against each other: in turns, so that a change of the machine's speed meets all alike.

    Args:
        functions: what to call, by name. Each is called once before the clock starts.
        repeats: timed calls of each function, at least 1.
        device: synchronised before every reading of the clock.

    Returns:
        The timing of each function in seconds, under its name.

    Raises:
        ValueError: ``repeats`` is not positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            settle_down(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(values), values) for name, values in seconds.items()}


def peak_extra_memory(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that PyTorch's allocator holds at the peak of one call, beyond what it held before.

    On CUDA and ROCm: ``max_memory_allocated`` during the call minus ``memory_allocated`` before it. On the CPU: the
    largest partial sum of the allocations and releases that the profiler records, those of this thread. Scratch space
    that a library takes without PyTorch's allocator is in neither.

    Args:
        function: called once; its result is dropped before the next measurement, not before the peak.
        device: where it allocates.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Garbage of earlier calls that is collected during this one would not be recorded, with a warning.
    gc.collect()
    # Read when the profiler first starts: keeps its progress messages off the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        function()
    recorder = recorded.profiler
    if recorder is None or recorder.kineto_results is None:
        raise RuntimeError("the PyTorch profiler returned no events")
    events = [event for event in recorder.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compare_with_reference(codebook: fastvq.EMACodebook, tokens: Tensor, probes: Tensor) -> dict[str, Any]:
    """Training step (forward, backward, EMA update) and search of fastvq and of the reference, on equal terms.

    Args:
        codebook: its state is where both modules start; it is not changed.
        tokens: ``[n, D]``, the batch of every step.
        probes: ``[m, D]``, searched with both and with the float64 oracle.

    Returns:
        ``tokens`` n, ``dim`` D, ``oracle_tokens`` m, ``speed_up`` (ratio of the median seconds), and for each of
        ``fastvq`` and ``reference``: ``seconds`` (median), ``all_seconds``, ``peak_extra_bytes`` and
        ``indices_equal_to_oracle`` (share of the probes).
    """
    device = tokens.device
    arguments = (codebook.n_codes, codebook.embedding_dim, codebook.no_random_restart, codebook.restart_thres)
    ours = fastvq.EMACodebook(*arguments, ema_decay=codebook.ema_decay)
    reference = fastvq.reference.EMACodebook(*arguments, ema_decay=codebook.ema_decay)
    for module in (ours, reference):
        module.load_state_dict(codebook.state_dict())
        module.to(device)
        module._need_init = False

    def step(module: nn.Module) -> None:
        quantized, _, loss = module(tokens.clone().requires_grad_())
        (quantized.sum() + loss).backward()

    steps: dict[str, Callable[[], None]] = {"fastvq": lambda: step(ours), "reference": lambda: step(reference)}
    searches: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "fastvq": lambda x, codes: fastvq.nearest_code(x, codes),
        "reference": fastvq.reference.nearest_code_expanded,
    }
    timings = median_seconds(steps, 5, device)
    oracle = fastvq.reference.nearest_code(probes, codebook.embeddings)
    entries = {
        name: {
            "seconds": timings[name].median,
            "all_seconds": timings[name].seconds,
            "peak_extra_bytes": peak_extra_memory(steps[name], device),
            "indices_equal_to_oracle": float((searches[name](probes, codebook.embeddings) == oracle).double().mean()),
        }
        for name in steps
    }
    return {
        "tokens": len(tokens),
        "dim": tokens.shape[1],
        "oracle_tokens": len(probes),
        "speed_up": timings["reference"].median / timings["fastvq"].median,
        **entries,
    }
