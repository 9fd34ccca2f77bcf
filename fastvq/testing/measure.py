"""Seconds and bytes of calls on CPUs and GPUs, and fastvq beside its reference in both."""

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

# Seconds. OpenMP's threads spin for up to 16 ms after a parallel loop, on the cores of the next call.
_SPINNING = 0.05
# Seconds for which a CPU repeats a call, of which the last is timed: after the wait threads sleep and caches are cold.
_WARM_UP = 0.1
# Bytes that a GPU reads before a timed call: they displace its L2 cache, with lines that need no writing back, and take
# a millisecond, in which the host queues the call.
_FLUSH_BYTES = 3 << 30
# Seconds of a call on a GPU above which fewer repeats give as good a median.
_SLOW, _REPEATS_SLOW = 0.05, 5


class Timing(NamedTuple):
    """Seconds on the device of each call, and the median seconds that the host needed to queue one."""

    seconds: list[float]
    host: float

    @property
    def median(self) -> float:
        """Median of the seconds on the device."""
        return statistics.median(self.seconds)


class Clock:
    """Times functions in turns, so that clock drift affects all of them equally.

    A CPU is timed by its clock, warm; a GPU by events, from a cold L2 cache with the host ahead.

    Attributes:
        errors: exceptions of functions that raised while they were timed last, by name.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.errors: dict[str, Exception] = {}
        self._flush = torch.ones(_FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None

    def interleaved(
        self, functions: Mapping[str, Callable[[int], object]], repeats: int, deadline: float = float("inf")
    ) -> dict[str, Timing]:
        """Timings by name; a function that raises is left out.

        Args:
            functions: called with the number of the call, by which they pick their input.
            repeats: timed calls after the warm-up, at least 1; on a GPU 5 of a function that needs more than 50 ms.
            deadline: reading of ``time.monotonic()`` after which no further round begins, once there are three.
        """
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        warm_ups = 1 if self._flush is None else 3
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
        self.errors = {}
        for i in range(warm_ups + repeats):
            if i >= warm_ups + 3 and time.monotonic() > deadline:
                break
            for name, function in functions.items():
                done = measured[name]
                slow = self._flush is not None and bool(done) and done[-1][0] > _SLOW
                if name in self.errors or (slow and i >= warm_ups + _REPEATS_SLOW):
                    continue
                try:
                    done.append(self._timed(function, i))
                except Exception as error:  # the others are still wanted
                    self.errors[name] = error
        timed = {name: pairs[warm_ups:] for name, pairs in measured.items() if name not in self.errors}
        return {
            name: Timing([seconds for seconds, _ in pairs], statistics.median(host for _, host in pairs))
            for name, pairs in timed.items()
        }

    def _timed(self, function: Callable[[int], object], i: int) -> tuple[float, float]:
        """Seconds on the device and seconds of the host for call ``i``."""
        if self._flush is None:
            time.sleep(_SPINNING)
            seconds = spent = _seconds(function, i)
            while spent < _WARM_UP:
                seconds = _seconds(function, i)
                spent += seconds
            return seconds, seconds
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        self._flush.sum()
        first.record()
        host = _seconds(function, i)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3, host


def _seconds(function: Callable[[int], object], i: int) -> float:
    start = time.perf_counter()
    function(i)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_extra_memory(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that PyTorch's allocator holds at the peak of one call, beyond what it held before.

    On a GPU: ``max_memory_allocated`` during the call less ``memory_allocated`` before it. On the CPU: the largest
    partial sum of the allocations and releases of this thread that the profiler records. Neither contains scratch space
    that a library takes without PyTorch's allocator.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Garbage of earlier calls that is collected now would be a release without its allocation.
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
        codebook: both modules start from its state.
        tokens: ``[n, D]``, the batch of every step.
        probes: ``[m, D]``, searched by both and by the float64 oracle.

    Returns:
        ``tokens`` n, ``dim`` D, ``oracle_tokens`` m, ``speed_up`` (ratio of the median seconds), and for ``fastvq`` and
        ``reference`` each ``seconds`` (median), ``all_seconds``, ``peak_extra_bytes`` and ``indices_equal_to_oracle``
        (share of the probes).
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
    clock = Clock(device)
    timings = clock.interleaved({name: lambda _, call=call: call() for name, call in steps.items()}, 5)  # type: ignore[misc]
    for error in clock.errors.values():
        raise error
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
