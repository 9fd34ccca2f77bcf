"""k-means: what it accepts, and what each argument means."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastvq


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(found, expected):
    return (
        torch.equal(found.codes, expected.codes)
        and torch.equal(found.labels, expected.labels)
        and found[2:] == expected[2:]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weighted_mean_is_exact(dtype):
    x, weights = (torch.randn(200, 2) + 1e5).to(dtype), torch.rand(200)
    found = fastvq.kmeans(x, 1, sample_weight=weights)
    total = sum(Fraction(w) for w in weights.tolist())
    for j in range(2):
        pairs = zip(weights.tolist(), x[:, j].tolist(), strict=True)
        expected = sum(Fraction(w) * Fraction(v) for w, v in pairs) / total
        assert found.codes[0, j].item() == pytest.approx(float(expected), rel=6e-8 if dtype == torch.float32 else 1e-15)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_whole_weights_are_repeated_tokens(metric):
    x, weights = torch.randn(10, 30, 3), torch.randint(0, 4, (10, 30))
    repeated = x.flatten(0, 1).repeat_interleave(weights.flatten(), 0)
    start = torch.randn(7, 3)
    found = fastvq.kmeans(x, 7, sample_weight=weights.float(), init=start, metric=metric, tolerance=0)
    expected = fastvq.kmeans(repeated, 7, init=start, metric=metric, tolerance=0)
    assert torch.equal(found.codes, expected.codes)
    assert found.inertia == pytest.approx(expected.inertia, rel=1e-12)
    assert (found.labels >= 0).all()  # of weight 0, too
    assert torch.equal(found.labels[weights > 0].repeat_interleave(weights[weights > 0]), expected.labels)
    assert found.counts.sum() == 300


def test_a_token_of_weight_0_becomes_no_code():
    x, weights = torch.randn(200, 2), torch.ones(200)
    x[:50], weights[:50] = 100.0, 0
    for init in ("k-means++", "random"):
        found = fastvq.kmeans(x, 20, sample_weight=weights, init=init)
        assert found.codes.abs().max() < 10
        assert found.inertia < 200


def test_it_starts_from_the_codes_given():
    x = torch.randn(500, 3)
    start = torch.randn(8, 3)
    found = fastvq.kmeans(x, 8, init=start, max_iterations=1, tolerance=0)
    labels = fastvq.nearest_code(x, start)
    counts, sums = fastvq.code_statistics(x.double(), labels, 8)
    assert torch.allclose(found.codes, sums / counts[:, None], rtol=1e-6, atol=1e-7)
    assert same(found, fastvq.kmeans(x, 8, init=start.numpy(), max_iterations=1, tolerance=0))
    assert torch.equal(fastvq.kmeans(x, 8, init=start, max_iterations=0).codes, start)
    unit = fastvq.kmeans(x, 8, init=start, metric="cosine", max_iterations=0).codes
    assert torch.allclose(unit, start / start.norm(dim=1, keepdim=True))


def test_the_best_of_several_starts_is_returned():
    x = torch.randn(300, 2)
    generator = seeded()
    found = fastvq.kmeans(x, 20, n_init=4, generator=generator)
    generator.manual_seed(0)
    each = [fastvq.kmeans(x, 20, generator=generator) for _ in range(4)]
    assert len({one.inertia for one in each}) > 1
    assert same(found, min(each, key=lambda one: one.inertia))


def test_heads_are_clustered_each_for_itself():
    x, mask, weights = torch.randn(3, 10, 20, 2), torch.rand(3, 10, 20) < 0.9, torch.rand(3, 10, 20)
    found = fastvq.kmeans(x, 5, heads=True, mask=mask, sample_weight=weights, generator=seeded())
    assert found.codes.shape == (3, 5, 2)
    generator = seeded()
    each = [fastvq.kmeans(x[h], 5, mask=mask[h], sample_weight=weights[h], generator=generator) for h in range(3)]
    for h, one in enumerate(each):
        assert torch.equal(found.codes[h], one.codes)
        assert torch.equal(found.counts[h], one.counts)
        assert torch.equal(found.labels[h], one.labels)
    assert found.inertia == sum(one.inertia for one in each)
    start = torch.randn(3, 5, 2)
    assert torch.equal(fastvq.kmeans(x, 5, heads=True, init=start, max_iterations=0).codes, start)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numpy_arrays_are_clustered_as_tensors_are(dtype):
    array = np.random.default_rng(0).normal(size=(90, 4)).astype(dtype)[::-1, ::2]
    array.setflags(write=False)
    weights = np.linspace(0, 1, 90)
    found = fastvq.kmeans(array, 6, sample_weight=weights, mask=weights > 0.1, generator=seeded())
    tensors = torch.tensor(array.copy()), torch.tensor(weights)
    assert same(
        found, fastvq.kmeans(tensors[0], 6, sample_weight=tensors[1], mask=tensors[1] > 0.1, generator=seeded())
    )


X = torch.randn(70, 3, generator=seeded())
BATCHES = {
    "tensors": list(X.split(16)),
    "tuples": [(x,) for x in X.split(16)],
    "lists": [[x] for x in X.split(16)],
    "arrays": [x.numpy() for x in X.split(16)],
    "DataLoader": DataLoader(TensorDataset(X), batch_size=16),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_may_come_as_a_dataloader_gives_them(kind):
    found = fastvq.kmeans(BATCHES[kind], 5, generator=seeded(), tolerance=0)
    expected = fastvq.kmeans(list(X.split(16)), 5, generator=seeded(), tolerance=0)
    assert torch.equal(found.codes, expected.codes)
    assert [len(labels) for labels in found.labels] == [16, 16, 16, 16, 6]
    assert torch.equal(torch.cat(found.labels), fastvq.nearest_code(X, found.codes))
    for init in ("first_batch", "kmeans"):
        module = fastvq.EMACodebook(5, 3, init=init)
        module.initialize(BATCHES[kind])
        if init == "first_batch":
            assert (module.embeddings[:, None] == X).all(2).any(1).all()
        else:
            assert torch.cdist(module.embeddings, X).amin(1).max() < 3


def test_a_dataloader_may_shuffle():
    found = fastvq.kmeans(DataLoader(TensorDataset(X), batch_size=16, shuffle=True), 70, tolerance=0)
    assert found.inertia == 0
    assert torch.equal(found.counts, torch.ones(70, dtype=torch.int64))


def test_labels_have_the_shapes_of_their_batches():
    labels = fastvq.kmeans([torch.randn(2, 5, 3), torch.randn(0, 3), torch.randn(4, 1, 1, 3)], 2).labels
    assert [tuple(one.shape) for one in labels] == [(2, 5), (0,), (4, 1, 1)]


def test_zero_tokens_have_no_direction_and_become_no_code():
    x = torch.randn(60, 3)
    x[:40] = 0
    for init in ("k-means++", "random"):
        found = fastvq.kmeans(x, 30, metric="cosine", init=init)
        assert torch.allclose(found.codes.norm(dim=1), torch.ones(30))
        assert found.labels[:40].eq(-1).all()
        assert found.counts.sum() == 20
    for init in ("first_batch", "kmeans"):
        module = fastvq.EMACodebook(15, 3, init=init, metric="cosine")
        module.initialize(x)
        assert torch.allclose(module.embeddings.norm(dim=1), torch.ones(15))
    with pytest.raises(ValueError, match="x must hold at least one finite token"):
        fastvq.kmeans(torch.zeros(9, 3), 2, metric="cosine")


def test_a_result_is_a_tuple_of_four_with_labels_beside():
    found = fastvq.kmeans(X, 3)
    codes, counts, inertia, iterations = found
    assert (codes is found.codes, counts is found.counts) == (True, True)
    assert (inertia, iterations) == (found.inertia, found.iterations)
    for other in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert same(other, found)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (
            [(X, X)],
            {},
            TypeError,
            r"x must hold batches of one tensor each, got a tuple of \(a tensor of torch.float32, ",
        ),
        ([[]], {}, TypeError, r"batches of one tensor each, got a list of \(\)"),
        ([X, X.double()], {}, ValueError, "x must hold batches of one precision, got torch.float32 and torch.float64"),
        (np.ones((9, 2), dtype=int), {}, TypeError, "x must be a floating-point tensor, got a tensor of torch.int64"),
        (X, {"sample_weight": torch.ones(9)}, ValueError, r"sample_weight must be \[70\].*, got \[9\]"),
        (X, {"sample_weight": -torch.ones(70)}, ValueError, "sample_weight must be finite and at least 0, got -1"),
        (X, {"sample_weight": torch.zeros(70)}, ValueError, "x must hold at least one finite token of positive weight"),
        ([X], {"sample_weight": torch.ones(70)}, ValueError, "sample_weight must be None where x is an iterable"),
        (X, {"init": torch.ones(4, 3)}, ValueError, r"init must be \[3, 3\] to match n_codes and x, got \[4, 3\]"),
        (X, {"init": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "init must be a floating-point tensor"),
        (X, {"init": torch.full((3, 3), torch.nan)}, ValueError, "init must be finite"),
        (X, {"init": torch.ones(3, 3), "n_init": 2}, ValueError, "n_init must be 1 with start codes"),
        (X, {"n_init": 0}, ValueError, "n_init must be at least 1, got 0"),
        ([X], {"heads": True}, ValueError, r"x must be one tensor \[heads, ..., D\] with heads, got list"),
        (X[0], {"heads": True}, ValueError, r"x must be one tensor \[heads, ..., D\] with heads, got \[3\]"),
        (X[None], {"heads": True, "init": X[:3]}, ValueError, r"init must be \[1, n_codes, D\] to match the heads"),
    ],
)
def test_wrong_arguments_are_named(x, options, error, message):
    with pytest.raises(error, match=message):
        fastvq.kmeans(x, **{"n_codes": 3, **options})
