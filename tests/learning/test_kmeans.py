"""k-means: what it minimises, how it starts, and what it accepts."""

import pytest
import torch

import fastvq
from fastvq import reference
from fastvq.common.distributed import ALL
from fastvq.learning import greedy, seeding
from fastvq.testing.measure import peak_extra_memory


def inertia(x, codes):
    return (x.double() - codes.double()[reference.nearest_code(x, codes)]).square().sum()


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("n_codes", [1, 7, 100, 300])
def test_result_is_a_fixed_point_of_lloyds_iteration(init, n_codes):
    x = torch.randn(1500, 3) + 5
    codes, counts, found, iterations = fastvq.kmeans(x, n_codes, init=init, tolerance=0, max_iterations=300)
    indices = reference.nearest_code(x, codes)
    assert torch.equal(counts, torch.bincount(indices, minlength=n_codes))
    assert counts.min() > 0
    assert 0 < iterations < 300
    means = torch.stack([x[indices == k].double().mean(0) for k in range(n_codes)])
    # Float32 sums of at most 1,500 terms below 10, and the inertia of codes that far off.
    assert torch.allclose(codes.double(), means, atol=1e-4)
    assert found == pytest.approx(float(inertia(x, codes)), rel=1e-5)


def test_plus_plus_finds_clusters_that_a_random_start_merges():
    centres = 100 * torch.randn(200, 8)
    x = (centres[:, None] + torch.randn(200, 20, 8)).flatten(0, 1)
    found = [
        fastvq.kmeans(x, 200, init=init, generator=torch.Generator().manual_seed(1)) for init in ("k-means++", "random")
    ]
    assert found[0].inertia < 4 * float(inertia(x, centres))
    assert found[0].inertia < 0.1 * found[1].inertia


def test_tolerance_and_iterations_end_it_early():
    x = torch.randn(2000, 4)
    seeds = [torch.Generator().manual_seed(0) for _ in range(4)]
    exact, loose, three, none = (
        fastvq.kmeans(x, 50, generator=generator, **options)
        for generator, options in zip(
            seeds, ({"tolerance": 0}, {"tolerance": 0.05}, {"max_iterations": 3}, {"max_iterations": 0}), strict=True
        )
    )
    assert none.iterations == 0 < loose.iterations < exact.iterations
    assert three.iterations == 3
    assert exact.inertia < three.inertia < none.inertia
    assert (none.codes[:, None] == x).all(2).any(1).all()


def test_batches_masks_and_views_give_what_one_tensor_gives():
    x = torch.randn(40, 30, 5).transpose(0, 1)
    mask = torch.rand(30, 40) < 0.7
    dirty = torch.where(mask[..., None], x, 1e6)
    dirty[0, 0], mask[0, 0] = torch.nan, True
    clean = dirty[mask & dirty.isfinite().all(2)]
    options = {"tolerance": 0, "max_iterations": 300}
    masked = fastvq.kmeans(dirty, 20, mask=mask, **options)
    batched = fastvq.kmeans([clean[:0], clean[:100], clean[100:]], 20, **options)
    for found in (masked, batched):
        assert found.counts.sum() == len(clean)
        assert found.codes.abs().max() < 10
        assert found.inertia == pytest.approx(float(inertia(clean, found.codes)), rel=1e-5)
    start = torch.Generator().manual_seed(3)
    again = fastvq.kmeans(clean, 20, generator=start, **options)
    assert torch.equal(again.codes, fastvq.kmeans(clean, 20, generator=start.manual_seed(3), **options).codes)


def test_cosine_clusters_directions():
    x = torch.randn(2000, 4) * torch.logspace(-3, 3, 2000)[:, None]
    found = fastvq.kmeans(x, 30, metric="cosine")
    assert torch.allclose(found.codes.norm(dim=1), torch.ones(30))
    unit = x / x.norm(dim=1, keepdim=True)
    assert found.inertia == pytest.approx(float(inertia(unit, found.codes)), rel=1e-4)
    assert found.inertia < 0.7 * float(inertia(unit, unit[:30]))


@pytest.mark.parametrize("n_distinct", [1, 5])
def test_fewer_distinct_tokens_than_codes_are_all_found(n_distinct):
    x = torch.randn(n_distinct, 3).repeat(40, 1)
    found = fastvq.kmeans(x, 12)
    assert found.iterations < 20
    assert (found.counts > 0).sum() >= n_distinct
    # Means of 40 equal tokens, below 3, summed in float32.
    assert (torch.cdist(found.codes, x).amin(0) < 3 * 40 * 2.0**-24 * 3**0.5).all()


def test_codes_that_lost_their_tokens_restart():
    x = torch.cat([torch.rand(100, 2), torch.rand(100, 2) + 50])
    # All codes in one place, so that all but one are empty at first.
    found = fastvq.kmeans(x, 20, init=torch.zeros(20, 2))
    assert found.counts.min() > 0
    assert found.inertia < 40


def test_drawn_rows_follow_their_weights_without_replacement():
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.arange(5.0)[:, None], torch.tensor([0.0, 1, 2, 3, 4])
    firsts = torch.zeros(5)
    for _ in range(3000):
        rows = seeding.draw_rows([(values[:2], weights[:2]), (values[2:], weights[2:])], 1, generator, ALL)
        firsts[int(rows)] += 1
    # Six standard deviations of a share of 3,000 are at most 3/√3000.
    assert ((firsts / 3000 - weights / 10).abs() < 0.055).all()
    assert firsts[0] == 0
    rows = seeding.draw_rows([(values, weights)], 9, generator, ALL)
    assert torch.equal(rows[:, 0].sort().values, torch.arange(1.0, 5))


def test_it_never_holds_a_matrix_of_tokens_by_codes(monkeypatch):
    monkeypatch.setattr(greedy, "_TURNS", 4)  # the profiler behind the measurement is slow
    x = torch.randn(20_000, 2)
    peak = peak_extra_memory(lambda: fastvq.kmeans(x, 1000, max_iterations=1), torch.device("cpu"))
    assert peak < 4 * 20_000 * 1000 / 4


def test_progress_is_shown_when_asked(capsys):
    fastvq.kmeans(torch.randn(50, 2), 3, progress=True)
    assert "k-means" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (iter([torch.randn(9, 2)]), {}, TypeError, "can be read more than once"),
        (["abc"], {}, TypeError, "x must be a floating-point tensor, got str"),
        (5, {}, TypeError, "x must be a tensor or an iterable that can be read more than once.*got int"),
        ([torch.randn(5, 3), torch.randn(5, 4)], {}, ValueError, "x must hold batches of one dimension, got 3 and 4"),
        (torch.randn(9, 2), {"n_codes": 2.5}, TypeError, "n_codes must be an integer, got float"),
        (torch.ones(9, 2, dtype=torch.int64), {}, TypeError, "x must be a floating-point tensor"),
        ([], {}, ValueError, "x must hold at least one batch"),
        (torch.full((9, 2), torch.nan), {}, ValueError, "x must hold at least one finite token"),
        (torch.randn(9, 2), {"mask": torch.ones(8, dtype=torch.bool)}, ValueError, r"mask must be \[9\]"),
        ([torch.randn(9, 2)], {"mask": torch.ones(9, dtype=torch.bool)}, ValueError, "mask must be None"),
        (torch.randn(9, 2), {"metric": "dot"}, ValueError, "metric must be one of 'euclidean', 'cosine', got 'dot'"),
        (torch.randn(9, 2), {"init": "first"}, ValueError, r"init must be one of 'k-means\+\+', 'random'"),
        (torch.randn(9, 2), {"tolerance": -1}, ValueError, "tolerance must be at least 0, got -1"),
        (torch.randn(9, 2), {"max_iterations": -1}, ValueError, "max_iterations must be at least 0, got -1"),
        (torch.randn(9, 2), {"n_codes": 0}, ValueError, "n_codes must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(x, options, error, message):
    with pytest.raises(error, match=message):
        fastvq.kmeans(x, **{"n_codes": 3, **options})
