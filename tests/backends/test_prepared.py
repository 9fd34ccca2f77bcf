"""A prepared codebook is taken wherever a codebook is, gives the same results and never changes."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastvq
from fastvq import reference
from fastvq.cpu import scan_scores

METRICS = ("euclidean", "cosine", "dot")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(300, 16), (3, 130, 8)])
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_results_are_those_of_the_codebook(backend, shape, metric, kernel_device):
    codebook = torch.randn(shape, device=kernel_device)
    prepared = fastvq.prepare(codebook)
    for n in (1, 40):
        x = torch.randn(*shape[:-2], n, shape[-1], device=kernel_device)
        expected = fastvq.nearest_code(x, codebook, metric=metric, backend=backend)
        for _ in range(2):
            assert torch.equal(fastvq.nearest_code(x, prepared, metric=metric, backend=backend), expected)


def test_every_function_takes_it():
    x, codebook = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    prepared = fastvq.prepare(codebook)
    for found, expected in zip(fastvq.quantize(x, prepared), fastvq.quantize(x, codebook), strict=True):
        assert torch.equal(found, expected)
    indices, distance = fastvq.nearest_code(x, prepared, return_distance=True)
    assert torch.equal(distance, fastvq.nearest_code(x, codebook, return_distance=True)[1])
    assert torch.equal(fastvq.lookup(indices, prepared), codebook[indices])


def test_it_is_a_copy():
    codebook = torch.randn(50, 4, requires_grad=True)
    prepared, x, before = fastvq.prepare(codebook), torch.randn(20, 4), codebook.detach().clone()
    with torch.no_grad():
        codebook.add_(1)
    assert torch.equal(fastvq.nearest_code(x, prepared), reference.nearest_code(x, before))
    assert not prepared.codes.requires_grad


def test_the_codes_are_made_ready_once(monkeypatch):
    made, plain_codes = [], scan_scores.plain_codes
    monkeypatch.setattr("fastvq.cpu.search.plain_codes", lambda *args: made.append(args) or plain_codes(*args))
    prepared = fastvq.prepare(torch.randn(50, 4))
    for _ in range(3):
        fastvq.nearest_code(torch.randn(5, 4), prepared)
    assert len(made) == 1
    fastvq.nearest_code(torch.randn(5, 4), prepared, metric="cosine")
    assert len(made) == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_and_pickles_hold_the_codes(duplicate):
    prepared, x = fastvq.prepare(torch.randn(50, 4)), torch.randn(20, 4)
    expected = fastvq.nearest_code(x, prepared)
    other = duplicate(prepared)
    assert not other._made
    assert torch.equal(fastvq.nearest_code(x, other), expected)


def test_threads_share_it():
    prepared, batches = fastvq.prepare(torch.randn(70, 5)), torch.randn(40, 30, 5)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda x: fastvq.nearest_code(x, prepared), batches))
    assert all(torch.equal(i, reference.nearest_code(x, prepared.codes)) for i, x in zip(found, batches, strict=True))


def test_a_compiled_function_takes_it():
    prepared, x = fastvq.prepare(torch.randn(50, 4)), torch.randn(20, 4)
    search = torch.compile(lambda x: fastvq.nearest_code(x, prepared), fullgraph=True, backend="aot_eager")
    assert torch.equal(search(x), fastvq.nearest_code(x, prepared))


@pytest.mark.parametrize("codebook", [torch.ones(3), torch.ones(0, 3), torch.ones(3, 4).long(), None])
def test_what_is_no_codebook_is_refused(codebook):
    with pytest.raises((TypeError, ValueError), match="codebook must"):
        fastvq.prepare(codebook)
