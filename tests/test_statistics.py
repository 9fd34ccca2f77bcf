"""Counts and sums per code, on every backend."""

import math

import pytest
import torch

import fastvq
from fastvq import reference
from fastvq.backends.choose import BACKENDS
from fastvq_kernels.configs import ORDERED, atomics_would_queue
from fastvq_kernels.update import accumulate, ordered

# So many values are added one after another to give a sum of n tokens in a fixed order: in one run of at most
# 2 RUN - 1 rows a value meets at most RUN / 2 additions of its chain and two of chains; three levels hold 64^3 tokens.
ORDERED_ADDITIONS = 3 * (ORDERED.run // 2 + 2)


@pytest.fixture(params=["torch", "reference", "atomics", "ordered"])
def code_statistics(request, kernel_device):
    """Counts, int64, and sums, float64, on the CPU."""
    if request.param in BACKENDS:
        return lambda x, indices, n_codes: BACKENDS[request.param].code_statistics(x, indices, n_codes, None)
    return lambda x, indices, n_codes: tuple(
        t.cpu()
        for t in accumulate.code_statistics(
            x.to(kernel_device), indices.to(kernel_device), n_codes, request.param == "ordered"
        )
    )


@pytest.fixture
def ordered_sums(kernel_device):
    def sums(x, indices, n_codes):
        return accumulate.code_statistics(x.to(kernel_device), indices.to(kernel_device), n_codes, True)[1].cpu()

    return sums


@pytest.mark.parametrize(
    ("n", "k", "d"), [(0, 3, 4), (1, 1, 1), (33, 7, 5), (60, 300, 130), (500, 2, 12), (4200, 1, 3)]
)
def test_integers_are_counted_and_summed_exactly(code_statistics, n, k, d):
    x, indices = torch.randint(-100, 100, (n, d)).float(), torch.randint(-1, k, (n,))
    counts, sums = code_statistics(x, indices, k)
    one_hot = indices[:, None] == torch.arange(k)
    assert (counts.dtype, sums.dtype) == (torch.int64, torch.float64)
    assert torch.equal(counts, one_hot.sum(0))
    assert torch.equal(sums, one_hot.double().t() @ x.double())
    for ours, exact in zip(fastvq.code_statistics(x, indices, k), (counts, sums), strict=True):
        assert torch.equal(ours, exact.float())


def test_leading_shape_mask_and_strides(code_statistics):
    x, indices = torch.randint(-9, 9, (5, 4, 6)).float().permute(1, 2, 0), torch.randint(0, 7, (4, 6))
    mask = torch.rand(4, 6) < 0.5
    expected = reference.code_statistics(x, indices, 7, mask=mask)
    for ours, theirs in zip(fastvq.code_statistics(x, indices, 7, mask=mask), expected, strict=True):
        assert torch.equal(ours, theirs)
    flat, strided = x.reshape(-1, 5), torch.full((24, 2), -1)
    strided[:, 1] = torch.where(mask, indices, -1).flatten()
    for tokens in (flat, torch.stack([flat, flat], 1)[:, 1], flat.t().contiguous().t()):
        for ours, theirs in zip(code_statistics(tokens, strided[:, 1], 7), expected, strict=True):
            assert torch.equal(ours.float(), theirs)


@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 8), (4, 0), (2,)])
def test_heads_have_codes_of_their_own(shape):
    x, indices = torch.randint(-9, 9, (*shape, 6)).float(), torch.randint(-1, 7, shape)
    mask = torch.rand(shape) < 0.7
    counts, sums = fastvq.code_statistics(x, indices, 7, mask=mask, heads=True)
    expected = reference.code_statistics(x, indices, 7, mask=mask, heads=True)
    assert counts.shape == (shape[0], 7)
    assert torch.equal(counts, expected[0])
    assert torch.equal(sums, expected[1])


def test_tokens_without_a_code_may_hold_nan(code_statistics):
    x, indices = torch.ones(4, 2), torch.tensor([0, -1, 2, -1])
    x[1], x[3, 0] = torch.nan, torch.inf
    counts, sums = code_statistics(x, indices, 3)
    assert counts.tolist() == [1, 0, 1]
    assert sums.tolist() == [[1, 1], [0, 0], [1, 1]]


def test_counts_are_exact_beyond_float32_increments():
    # 2^24 + 2 ones: adding 1.0 in float32 stops at 2^24.
    n = 2**24 + 2
    counts, _ = fastvq.code_statistics(torch.ones(1, 1).expand(n, 1), torch.zeros(1, dtype=torch.int64).expand(n), 1)
    assert counts.item() == n


def test_ordered_counts_are_exact_beyond_float32_increments(monkeypatch, kernel_device):
    class NoSums:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    monkeypatch.setattr(ordered, "sum_runs_kernel", NoSums())
    n = 2**24 + 2
    x = torch.empty(1, 1, device=kernel_device).expand(n, 1)
    counts, _ = ordered.ordered_statistics(x, torch.ones(n, dtype=torch.int64, device=kernel_device), 3)
    assert counts.tolist() == [0, n, 0]


def documented_sum(rows):
    """The sum of rows in the order that `ordered.py` documents, one float64 addition at a time."""
    run = ORDERED.run
    runs = [rows[i * run : (i + 1) * run] for i in range(max(1, len(rows) // run))]
    runs[-1] = rows[(len(runs) - 1) * run :]
    sums = []
    for part in runs:
        chains = torch.zeros(4, rows.shape[1], dtype=torch.float64)
        for i, row in enumerate(part):
            chains[i % 4] += row
        sums.append((chains[0] + chains[1]) + (chains[2] + chains[3]))
    return sums[0] if len(sums) == 1 else documented_sum(torch.stack(sums))


@pytest.mark.parametrize(("n", "k", "d"), [(500, 3, 3), (4200, 2, 2), (130, 40, 9), (300, 1, 140)])
def test_ordered_sums_follow_the_documented_order(ordered_sums, n, k, d):
    x, indices = torch.randn(n, d), torch.randint(-1, k, (n,))
    indices[n // 3 :: 2] = k - 1
    sums = ordered_sums(x, indices, k)
    for code in range(k):
        assert torch.equal(sums[code], documented_sum(x[indices == code].double()))


@pytest.mark.parametrize("code_statistics", ["torch", "ordered"], indirect=True)
def test_ordered_sums_depend_on_the_tokens_of_the_code_alone(code_statistics):
    def ordered_sums(*args):
        return code_statistics(*args)[1]

    x, indices = torch.randn(2000, 5), torch.randint(-1, 9, (2000,))
    indices[700:1500] = 4
    sums = ordered_sums(x, indices, 9)
    assert torch.equal(ordered_sums(x, indices, 9), sums)
    kept = (indices == 4) | (indices == 7)
    assert torch.equal(ordered_sums(x[kept], indices[kept], 40)[[4, 7]], sums[[4, 7]])
    assert torch.equal(ordered_sums(x[:, 2:].clone(), indices, 9), sums[:, 2:])


def test_ordered_sums_of_a_hot_code_lose_little(ordered_sums):
    n = 5000
    x, indices = torch.randn(n, 4) + 3, torch.zeros(n, dtype=torch.int64)
    indices[::7] = 1
    sums = ordered_sums(x, indices, 2)
    for code in range(2):
        own = x[indices == code].double()
        exact = torch.tensor([math.fsum(column) for column in own.t().tolist()], dtype=torch.float64)
        assert ((sums[code] - exact).abs() <= ORDERED_ADDITIONS * 2.0**-53 * own.abs().sum(0)).all()


@pytest.mark.parametrize("k", [2**15 - 1, 2**15])
def test_ordered_sums_reach_the_last_code_of_any_codebook(ordered_sums, k):
    x, indices = torch.randint(-9, 9, (40, 1)).float(), torch.randint(0, k, (40,))
    indices[3] = indices[9] = k - 1
    indices[5] = -1
    assert torch.equal(ordered_sums(x, indices, k).float(), reference.code_statistics(x, indices, k)[1])


@pytest.fixture
def forms(monkeypatch):
    """Which form of the kernel runs, in order of the calls."""
    called = []
    for name in ("ordered_statistics", "atomic_statistics"):

        def nothing(x, indices, n_codes, name=name):
            called.append(name)
            return x.new_zeros(n_codes), x.new_zeros(n_codes, x.shape[1])

        monkeypatch.setattr(accumulate, name, nothing)
    return called


def test_order_is_fixed_where_it_is_asked_for(forms):
    x, indices = torch.randn(5, 2), torch.arange(5)
    fixed = [
        fastvq.code_statistics(x, indices, 5, deterministic=deterministic, backend="triton") and forms[-1]
        for deterministic in (True, False, None)
    ]
    assert fixed == ["ordered_statistics", "atomic_statistics", "atomic_statistics"]


def test_order_is_fixed_where_atomics_would_queue(forms):
    for n, k, form in (
        (300_000, 4096, "ordered_statistics"),
        (20_000, 1, "ordered_statistics"),
        (2000, 4096, "atomic_statistics"),
    ):
        fastvq.code_statistics(torch.empty(1, 1).expand(n, 1), torch.zeros(n, dtype=torch.int64), k, backend="triton")
        assert forms[-1] == form
        assert atomics_would_queue(n, k) == (form == "ordered_statistics")


def test_pytorch_setting_fixes_the_order(forms, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for deterministic in (None, True, False):
        fastvq.code_statistics(torch.randn(5, 2), torch.arange(5), 5, deterministic=deterministic, backend="triton")
    assert forms == ["ordered_statistics", "ordered_statistics", "atomic_statistics"]


@pytest.mark.parametrize("flag", [False, True])
def test_deterministic_setting_is_restored(flag):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(flag)
    try:
        fastvq.code_statistics(torch.randn(5, 2), torch.arange(5), 5, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() == flag
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("deterministic", [False, True])
def test_indices_beyond_the_codes_are_left_out_by_the_kernels(kernel_device, deterministic):
    x, indices = torch.ones(7, 3), torch.tensor([0, 4, 2**40, 70_000, -7, -(2**40), 3])
    counts, sums = accumulate.code_statistics(x.to(kernel_device), indices.to(kernel_device), 4, deterministic)
    assert counts.tolist() == [1, 0, 0, 1]
    assert torch.equal(sums.cpu(), counts.cpu()[:, None].expand(4, 3))


def test_a_fixed_order_is_asked_for_without_touching_the_switch_of_the_process(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *args, **options: pytest.fail("switched"))
    fastvq.code_statistics(torch.randn(9, 2), torch.arange(9) - 1, 8, deterministic=True)
