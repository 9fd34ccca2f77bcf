"""Sums, means and moving averages are as precise as one rounding to float32, whatever the offset and the number."""

import math
from fractions import Fraction

import pytest
import torch

import fastvq
from fastvq.backends.choose import BACKENDS
from fastvq.common.ema_step import EMAStep
from fastvq.learning.batch_statistics import collect

U = 2.0**-24  # a rounding to float32, relative
FORMS = [("torch", None), ("reference", None), ("triton", False), ("triton", True)]


@pytest.fixture(params=FORMS, ids=lambda form: f"{form[0]}-{form[1]}")
def sums_of(request, kernel_device):
    """The float32 sums of :func:`fastvq.code_statistics` by one backend and form, on the CPU."""
    name, deterministic = request.param

    def sums(x, indices, n_codes):
        device = kernel_device if name == "triton" else torch.device("cpu")
        options = {"deterministic": deterministic, "backend": name}
        return fastvq.code_statistics(x.to(device), indices.to(device), n_codes, **options)[1].cpu()

    return sums


def exact_sums(x, indices, n_codes):
    """``[K, D]`` as fractions."""
    totals = [[Fraction(0)] * x.shape[1] for _ in range(n_codes)]
    for row, code in zip(x.tolist(), indices.tolist(), strict=True):
        if code >= 0:
            totals[code] = [total + Fraction(value) for total, value in zip(totals[code], row, strict=True)]
    return totals


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6, -1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_sum_has_the_error_of_one_rounding(sums_of, offset, dtype):
    n, k = 1500, 3
    largest = 6e4 if dtype == torch.float16 else 1e9
    x, indices = (torch.randn(n, 2) + offset).clamp(-largest, largest).to(dtype), torch.randint(-1, k, (n,))
    sums = sums_of(x, indices, k)
    for ours, exact in zip(sums.tolist(), exact_sums(x, indices, k), strict=True):
        for a, b in zip(ours, exact, strict=True):
            # 1,500 float64 additions leave 2^-40 of the largest partial sum to the rounding to float32.
            assert abs(Fraction(a) - b) <= Fraction(U) * abs(b) + Fraction(2.0**-40) * n * Fraction(abs(offset) + 5)


@pytest.mark.parametrize(("value", "n"), [(0.1, 10**6), (1000001.0, 300_000), (16777215.0, 200_000)])
def test_the_mean_of_equal_tokens_is_the_token(value, n):
    x, indices = torch.full((n, 1), value), torch.zeros(n, dtype=torch.int64)
    counts, sums = fastvq.code_statistics(x, indices, 1)
    assert abs(sums.double() / counts - x[0].double()).item() <= U * value


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_add_more_tokens_than_float32_can_count(kernel_device, deterministic):
    n = 40_000
    x = torch.full((n, 1), 1000001.0, device=kernel_device)
    indices = torch.zeros(n, dtype=torch.int64, device=kernel_device)
    _, sums = BACKENDS["triton"].code_statistics(x, indices, 1, deterministic)
    assert sums.item() == n * 1000001


def test_float64_tokens_are_never_float32(sums_of):
    x = torch.tensor([[1e8 + 1], [1e39], [1e8 + 3], [-1e39], [1e-60]], dtype=torch.float64)
    sums = sums_of(x, torch.tensor([0, 1, 0, 1, 2]), 3)
    assert sums[:, 0].tolist() == [200000004.0 // 16 * 16, 0, 0]  # the nearest float32
    for name, deterministic in FORMS:
        exact = BACKENDS[name].code_statistics(x, torch.tensor([0, 1, 0, 1, 2]), 3, deterministic)[1]
        assert exact[:, 0].tolist() == [200000004.0, 0, 1e-60]


def test_counts_are_exact_beyond_the_integers_of_float32():
    n = 2**24 + 1
    tokens, indices = torch.ones(1, 1).expand(n, 1), torch.zeros(1, dtype=torch.int64).expand(n)
    counts, _ = BACKENDS["torch"].statistics(tokens, indices, 2)
    assert counts.tolist() == [n, 0]
    one = collect(tokens[:1], indices[:1], 2, False, BACKENDS["torch"])
    assert one._replace(counts=counts.double()).plus(one).plus(one).counts.tolist() == [n + 2, 0]


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("offset", [1e4, 1e6, 1e7])
def test_a_step_gives_the_mean_of_the_tokens(backend, offset, kernel_device):
    """Without memory of earlier steps a code is the mean of its tokens, but for the smoothing by 1e-7 tokens."""
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]]) + offset
    tokens = centres.repeat(300, 1) + torch.randn(900, 2)
    module = fastvq.EMACodebook(3, 2, ema_decay=0.0, backend=backend, device=kernel_device)
    module.load_state_dict({"embeddings": centres, "N": torch.ones(3), "z_avg": centres})
    _, indices, _ = module(tokens.to(kernel_device))
    for code in range(3):
        own = tokens[indices.cpu() == code].double()
        assert len(own) > 200
        mean = torch.tensor([math.fsum(column) for column in own.t().tolist()], dtype=torch.float64) / len(own)
        # One rounding; the smoothing moves a weight by 1e-7 (1 / N - K / S).
        error = (module.embeddings[code].cpu().double() - mean).abs()
        assert (error <= (U + 2e-10 + 2.0**-40) * mean.abs()).all()
        assert ((module.z_avg[code].cpu().double() - mean * len(own)).abs() <= (U + 2.0**-40) * mean * len(own)).all()


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_step_rounds_the_state_once(backend, kernel_device):
    state = torch.randn(40, 5) + 1e5, torch.rand(40) * 9, torch.randn(40, 5) + 1e6
    counts = torch.randint(0, 2**30, (40,)).double()
    sums = torch.randn(40, 5, dtype=torch.float64) * 1e9
    moved = tuple(tensor.to(kernel_device, copy=True) for tensor in state)
    BACKENDS[backend].ema_step(EMAStep(*moved, counts.to(kernel_device), sums.to(kernel_device), None, None, 0.99))
    n = 0.99 * state[1].double() + 0.01 * counts
    average = 0.99 * state[2].double() + 0.01 * sums
    codes = average / ((n + 1e-7) / (n.sum() + 40e-7) * n.sum())[:, None]
    for ours, exact in zip(moved, (codes, n, average), strict=True):
        assert ((ours.cpu().double() - exact).abs() <= (U + 2.0**-40) * exact.abs() + 1e-6).all()


def test_accumulated_batches_keep_the_precision_of_one():
    tokens = torch.randn(3000, 2) + 1e6
    modules = [fastvq.EMACodebook(2, 2, ema_decay=0.5) for _ in range(2)]
    for module in modules:
        module.load_state_dict({"embeddings": tokens[:2], "N": torch.ones(2), "z_avg": tokens[:2]})
    with modules[0].accumulate():
        for batch in tokens[:2500].split(50):
            modules[0](batch)
    modules[0](tokens[2500:])
    modules[1](tokens)
    for name, value in modules[0].state_dict().items():
        torch.testing.assert_close(value, modules[1].state_dict()[name], rtol=2 * U, atol=0)
