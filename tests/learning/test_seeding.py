"""How good the first codes of k-means are, and how they are drawn."""

import statistics

import pytest
import torch

import fastvq
from fastvq.learning import greedy


def clusters(sizes, dim, spread, seed=1):
    generator = torch.Generator().manual_seed(seed)
    centres = spread * torch.rand(len(sizes), dim, generator=generator)
    x = centres.repeat_interleave(sizes, 0)
    return x + torch.randn(x.shape, generator=generator)


# Tokens, and the median inertia of 21 runs of scikit-learn 1.9.1: KMeans(K, n_init=1, max_iter=100).
CASES = {
    "50 blobs": (clusters(torch.full((50,), 100), 8, 20), 44_074),
    "50 flat blobs": (clusters(torch.full((50,), 100), 2, 80), 9_856),
    "256 blobs": (clusters(torch.full((256,), 24), 16, 20), 102_722),
    "20 imbalanced clusters": (clusters((5000 * 0.75 ** torch.arange(20)).long() + 5, 8, 10), 163_780),
}


@pytest.mark.parametrize("name", CASES)
def test_starts_are_level_with_scikit_learn(name):
    x, theirs = CASES[name]
    generators = [torch.Generator().manual_seed(seed) for seed in range(7)]
    ours = [fastvq.kmeans(x, int(name.split()[0]), generator=generator).inertia for generator in generators]
    # Medians of seven of our runs lie between 0.95 and 1.03 of theirs.
    assert statistics.median(ours) < 1.04 * theirs


def test_a_candidate_of_weight_0_is_never_picked_and_no_candidate_twice():
    candidates = torch.randn(40, 3)
    weights = (torch.arange(40) % 2).double()
    picked = greedy.pick_codes(candidates, weights, 40, torch.Generator().manual_seed(0))
    assert torch.equal(picked.unique(dim=0), candidates[1::2].unique(dim=0))
    assert len(picked) == 20


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e34])
@pytest.mark.parametrize("offset", [0, 1e3])
def test_distances_to_the_codes_picked_are_exact(scale, offset):
    candidates = scale * (offset + torch.randn(300, 5))
    points = greedy._Points(candidates, torch.ones(300, dtype=torch.float64))
    for new in ([3], [7, 100, 200], [5]):
        points.pick(torch.tensor(new))
    rows = candidates.double()
    expected = (rows[:, None] - rows[points.picked]).square().sum(2).amin(1)
    factor = expected.amax() / points.nearest.amax()
    assert torch.allclose(points.nearest * factor, expected, rtol=1e-9, atol=0)
    assert (points.nearest[points.picked] == 0).all()


def test_several_codes_of_one_turn_are_different(monkeypatch):
    monkeypatch.setattr(greedy, "_TURNS", 3)
    candidates = torch.randn(60, 2)
    picked = greedy.pick_codes(candidates, torch.ones(60).double(), 60, torch.Generator().manual_seed(0))
    assert len(picked.unique(dim=0)) == len(picked) == 60
