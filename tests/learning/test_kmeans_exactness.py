"""k-means: means to one rounding at any offset and size, and results that belong together and never get worse."""

import math

import pytest
import torch

import fastvq
from fastvq.common.directions import directions
from fastvq.testing.measure import peak_extra_memory

SQUARE = 10.0 * torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])


def true_mean(x):
    """Float64, rounded once from the exact sum and once from the division."""
    return torch.tensor([math.fsum(column.tolist()) / len(x) for column in x.double().T], dtype=torch.float64)


def spacing(values, dtype):
    """Distance to the next larger number of ``dtype``."""
    values = values.abs().to(dtype)
    return torch.nextafter(values, values.new_full((), torch.inf)).double() - values.double()


def blobs(offset, n=500, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (offset + SQUARE[:, None] + torch.randn(4, n, 2, generator=generator)).flatten(0, 1)


def float64_inertia(x, found):
    kept = found.labels >= 0
    return float((x[kept].double() - found.codes.double()[found.labels[kept]]).square().sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 100, -1e4, 1e6, 1e8])
def test_a_mean_is_the_true_one_to_one_rounding_whatever_the_offset(dtype, offset):
    x = (torch.rand(3001, 3, dtype=torch.float64) + offset).to(dtype)
    found = fastvq.kmeans(x, 1)
    assert found.codes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = true_mean(x)
    # Half a unit of the result's dtype, and a few of float64.
    allowed = 0.5 * spacing(expected, found.codes.dtype) + 4 * spacing(expected, torch.float64)
    assert ((found.codes[0].double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_equal_tokens_are_their_code_on_every_backend(backend, kernel_device):
    x = torch.full((32, 2), 1000001.0, device=kernel_device)
    x[:, 1] = 0.1
    found = fastvq.kmeans(x, 1, backend=backend, init="random")
    assert torch.equal(found.codes, x[:1])
    assert found.inertia == 0


def test_a_mean_of_many_tokens_is_as_exact_as_one_of_few():
    x = torch.rand(300_000, 2) + 100
    expected = true_mean(x)
    codes = fastvq.kmeans(x, 1).codes[0].double()
    assert ((codes - expected).abs() <= 0.5001 * spacing(expected, torch.float32)).all()


@pytest.mark.parametrize("offset", [0, 1e4, 1e6, -3e6])
@pytest.mark.parametrize("seed", range(3))
def test_blobs_far_from_zero_keep_their_codes(offset, seed):
    x = blobs(offset, seed=seed)
    found = fastvq.kmeans(x, 4, tolerance=0)
    # Ten apart: five standard deviations to the border, which a few tokens in a million cross.
    assert ((found.counts - 500).abs() <= 3).all()
    for k in range(4):
        expected = true_mean(x[found.labels == k])
        assert ((found.codes[k].double() - expected).abs() <= 0.5001 * spacing(expected, torch.float32)).all()


@pytest.mark.parametrize("offset", [1e8, -1e12, 1e15])
def test_float64_tokens_are_clustered_in_float64(offset):
    x = (offset + torch.arange(4, dtype=torch.float64))[:, None].repeat(9, 1)
    found = fastvq.kmeans(x, 4)
    assert torch.equal(found.codes.sort(0).values, x[:4])
    assert found.counts.tolist() == [9] * 4
    assert found.inertia == 0


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_float64_blobs_on_every_backend(backend, kernel_device):
    x = (1e9 + blobs(0, n=3)[:6].double()).to(kernel_device)
    found = fastvq.kmeans(x, 2, backend=backend, init=x[::3], max_iterations=1)
    for k in range(2):
        expected = true_mean(x[found.labels == k].cpu())
        assert ((found.codes[k].cpu() - expected).abs() <= 2 * spacing(expected, torch.float64)).all()
    assert found.inertia == pytest.approx(float64_inertia(x, found), rel=1e-12)


@pytest.mark.parametrize(
    ("largest", "dtype"), [(3e38, torch.float32), (2e33, torch.float32), (1e39, torch.float64), (1e150, torch.float64)]
)
@pytest.mark.parametrize("n_codes", [1, 3, 8])
def test_large_finite_tokens_give_finite_codes_and_the_true_inertia(largest, dtype, n_codes):
    x = torch.randn(300, 4, dtype=dtype)
    x[:60], x[60:100] = largest, -largest
    found = fastvq.kmeans(x, n_codes)
    assert found.codes.isfinite().all()
    assert found.counts.sum() == 300
    assert found.inertia == pytest.approx(float64_inertia(x, found), rel=1e-12)
    if n_codes == 1:
        mean = largest * (60 - 40) / 300
        assert found.codes[0].double().tolist() == pytest.approx([mean] * 4, rel=1e-6)
    else:
        assert found.inertia < 1e4  # three groups, of which two are points


@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}], ids=["euclidean", "cosine"])
@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
def test_more_iterations_never_make_it_worse(options, offset):
    x = blobs(offset, n=100)
    runs = [
        fastvq.kmeans(
            x, 9, max_iterations=n, tolerance=0, generator=torch.Generator().manual_seed(2), init="random", **options
        )
        for n in range(10)
    ]
    inertias = [found.inertia for found in runs]
    assert inertias == sorted(inertias, reverse=True)
    for found in runs:
        assert found.inertia == pytest.approx(float64_inertia(directions(x) if options else x, found), rel=1e-12)


def test_a_result_that_a_rounding_made_worse_is_not_returned():
    """Directions so close together that their means are no better than the codes before."""
    x = torch.tensor([1e6, 0, 0, 0]) + torch.randn(200, 4)
    seen = []
    for n in range(12):
        found = fastvq.kmeans(x, 30, metric="cosine", max_iterations=n, generator=torch.Generator().manual_seed(0))
        seen.append(found.inertia)
        assert torch.equal(found.counts, torch.bincount(found.labels, minlength=30))
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_codes_counts_labels_and_inertia_belong_together(dtype, init):
    x = (torch.randn(20, 50, 6) + 3).to(dtype)
    x[0, :7] = torch.nan
    mask = torch.rand(20, 50) < 0.8
    for max_iterations in (0, 1, 3, 100):
        found = fastvq.kmeans(x, 40, mask=mask, init=init, max_iterations=max_iterations)
        assert torch.equal(found.labels, fastvq.nearest_code(x, found.codes, mask=mask, backend="reference"))
        assert found.labels[0, :7].eq(-1).all()
        assert torch.equal(found.counts, torch.bincount(found.labels[found.labels >= 0], minlength=40))
        assert found.inertia == pytest.approx(float64_inertia(x, found), rel=1e-12)


def test_no_temporary_as_large_as_the_tokens():
    x = torch.randn(100_000, 64)
    peak = peak_extra_memory(lambda: fastvq.kmeans(x, 512, init="random", max_iterations=1), torch.device("cpu"))
    assert peak < 24 << 20  # the tokens are 24 MiB; in float64, and with the codes beside them, several times that
