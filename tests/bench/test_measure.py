import time

import pytest
import torch

import fastvq
from fastvq.cpu import matmul
from fastvq.testing import measure
from fastvq.testing.measure import Clock, peak_extra_memory

CPU = torch.device("cpu")
MEGABYTE = 1_000_000


def test_peak_extra_memory_of_known_allocations():
    def hundred_megabytes_and_a_temporary():
        kept = torch.empty(100 * MEGABYTE, dtype=torch.uint8)
        temporary = torch.empty(30 * MEGABYTE, dtype=torch.uint8)
        del temporary
        return kept, torch.empty(20 * MEGABYTE, dtype=torch.uint8)

    assert peak_extra_memory(hundred_megabytes_and_a_temporary, CPU) == 130 * MEGABYTE


def test_peak_extra_memory_ignores_what_was_there_before():
    before = torch.ones(50 * MEGABYTE, dtype=torch.uint8)
    peak = peak_extra_memory(lambda: before[: 10 * MEGABYTE] + 1, CPU)
    assert 10 * MEGABYTE <= peak < 10.1 * MEGABYTE


def test_peak_extra_memory_sees_temporaries_inside_an_operator():
    x = torch.randn(2000, 500)
    # The square is a temporary of the size of x.
    peak = peak_extra_memory(lambda: (x**2).sum(), CPU)
    assert 4 * x.numel() <= peak < 4.1 * x.numel()


def test_peak_extra_memory_sees_what_a_search_on_several_threads_allocates():
    x, codebook = torch.randn(4096, 32), torch.randn(4096, 32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        peak = peak_extra_memory(lambda: fastvq.nearest_code(x, codebook), CPU)
    finally:
        torch.set_num_threads(before)
    assert peak >= 4 * codebook.numel()  # the packed codebook


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_memory_of_a_search_does_not_grow_with_the_codes(monkeypatch, in_bfloat16):
    monkeypatch.setattr(matmul, "bf16_pays", lambda *size: in_bfloat16)
    x, codebook = torch.randn(512, 64), torch.randn(1 << 17, 64)
    part = peak_extra_memory(lambda: fastvq.nearest_code(x, codebook[: 1 << 15]), CPU)
    assert peak_extra_memory(lambda: fastvq.nearest_code(x, codebook), CPU) == pytest.approx(part, rel=0.05)


@pytest.mark.gpu
def test_peak_extra_memory_on_a_gpu():
    device = torch.device("cuda")
    peak = peak_extra_memory(lambda: torch.empty(100 * MEGABYTE, dtype=torch.uint8, device=device), device)
    assert 100 * MEGABYTE <= peak < 103 * MEGABYTE


def test_training_step_needs_a_tenth_of_one_distance_matrix():
    n_tokens, n_codes, dim = 16384, 8192, 64
    codebook = fastvq.EMACodebook(n_codes, dim, no_random_restart=False)
    tokens = torch.randn(n_tokens, dim, requires_grad=True)

    def step():
        quantized, _, loss = codebook(tokens)
        (quantized.sum() + loss).backward()

    assert peak_extra_memory(step, CPU) <= 0.1 * 4 * n_tokens * n_codes


def test_a_clock_takes_turns_after_a_warm_up(monkeypatch):
    monkeypatch.setattr(measure, "_WARM_UP", 0)
    calls = []
    timings = Clock(CPU).interleaved({"a": lambda i: calls.append("a"), "b": lambda i: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert list(timings) == ["a", "b"]
    assert all(len(timing.seconds) == 3 for timing in timings.values())


def test_a_clock_measures_seconds():
    timing = Clock(CPU).interleaved({"sleep": lambda i: time.sleep(0.02)}, 3)["sleep"]
    assert sorted(timing.seconds)[1] == timing.median
    assert 0.02 <= timing.median < 2


def test_a_clock_wants_a_repeat():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        Clock(CPU).interleaved({}, 0)
