"""Counts and sums per code, on every backend."""

import pytest
import torch

import fastvq
from fastvq import reference
from fastvq_kernels import accumulate


@pytest.fixture(params=["torch", "triton"])
def code_statistics(request, kernel_device):
    if request.param == "torch":
        return fastvq.code_statistics
    return lambda x, indices, n_codes: tuple(
        t.cpu() for t in accumulate.code_statistics(x.to(kernel_device), indices.to(kernel_device), n_codes)
    )


@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 4), (1, 1, 1), (33, 7, 5), (200, 1000, 130), (500, 2, 12)])
def test_integers_are_counted_and_summed_exactly(code_statistics, n, k, d):
    x, indices = torch.randint(-100, 100, (n, d)).float(), torch.randint(-1, k, (n,))
    counts, sums = code_statistics(x, indices, k)
    expected = reference.code_statistics(x, indices, k)
    assert counts.dtype == sums.dtype == torch.float32
    assert torch.equal(counts, expected[0])
    assert torch.equal(sums, expected[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_accumulated_in_float32(code_statistics, dtype):
    x, indices = torch.randn(3000, 3).to(dtype), torch.zeros(3000, dtype=torch.int64)
    _, sums = code_statistics(x, indices, 1)
    # A chain of 3,000 float32 additions: (n - 1) u Σ|x|.
    bound = 3000 * 2.0**-24 * x.double().abs().sum(0)
    assert ((sums.double() - x.double().sum(0)).abs() <= bound).all()


def test_leading_shape_mask_and_strides():
    x, indices = torch.randint(-9, 9, (5, 4, 6)).float().permute(1, 2, 0), torch.randint(0, 7, (4, 6))
    mask = torch.rand(4, 6) < 0.5
    for ours, theirs in zip(
        fastvq.code_statistics(x, indices, 7, mask=mask),
        reference.code_statistics(x, indices, 7, mask=mask),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_tokens_without_a_code_may_hold_nan(code_statistics):
    x, indices = torch.ones(4, 2), torch.tensor([0, -1, 2, -1])
    x[1], x[3, 0] = torch.nan, torch.inf
    counts, sums = code_statistics(x, indices, 3)
    assert torch.equal(counts, torch.tensor([1.0, 0, 1]))
    assert torch.equal(sums, torch.tensor([[1.0, 1], [0, 0], [1, 1]]))


def test_counts_are_exact_beyond_float32_increments():
    # 2^24 + 2 ones: adding 1.0 in float32 stops at 2^24.
    n = 2**24 + 2
    counts, _ = fastvq.code_statistics(torch.ones(1, 1).expand(n, 1), torch.zeros(1, dtype=torch.int64).expand(n), 1)
    assert counts.item() == n


@pytest.mark.parametrize("flag", [False, True])
def test_deterministic_setting_is_restored(flag):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(flag)
    try:
        fastvq.code_statistics(torch.randn(5, 2), torch.arange(5), 5, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() == flag
    finally:
        torch.use_deterministic_algorithms(before)
