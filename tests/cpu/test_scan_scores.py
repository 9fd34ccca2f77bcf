"""Few codes are searched as they are; what cannot be decided so is searched again, and no more."""

import pytest
import torch
from multiplying import set_product_values
from strategies import METRICS

from fastvq import reference
from fastvq.cpu import scan_scores, search, tuning


@pytest.fixture(params=[1 << 9, 1 << 18], ids=["blocks", "at once"], autouse=True)
def product_values(request, monkeypatch):
    set_product_values(monkeypatch, request.param)
    monkeypatch.setattr(tuning, "FEW_SCORES", request.param)
    monkeypatch.setattr(tuning, "FEW_TOKENS", 0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_packed_where_few_codes_are_far_apart(monkeypatch, metric, dtype):
    monkeypatch.setattr(search, "pack", None)
    x, codebook = torch.randn(500, 16).to(dtype), torch.randn(300, 16).to(dtype)
    assert torch.equal(search.nearest_code(x, codebook, metric), reference.nearest_code(x, codebook, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_tokens_that_are_not_finite_are_not_searched_again(metric):
    x, codebook = torch.randn(600, 16), torch.randn(300, 16)
    x[450], x[3, 5] = torch.nan, torch.inf
    found = scan_scores.search(x, search.prepare(codebook, metric).plain)
    assert found.indices[[3, 450]].tolist() == [-1, -1]
    assert not set(found.crowded.tolist()) & {3, 450}
    assert not set(found.owners.tolist()) & {3, 450}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])
def test_codes_beyond_the_range_are_not_compared(metric, value):
    codebook = torch.randn(300, 16)
    codebook[7, 3] = value
    assert not scan_scores.are_comparable(torch.randn(300, 16), search.prepare(codebook, metric).plain)


def test_long_codes_are_not_compared_with_short_ones_unless_a_token_is_as_long():
    codebook, x = torch.randn(300, 16), torch.randn(40, 16)
    plain = search.prepare(codebook * 1e5 ** torch.linspace(0, 1, 300)[:, None], "euclidean").plain
    assert not scan_scores.are_comparable(x, plain)
    assert scan_scores.are_comparable(1e5 * x, plain)


@pytest.mark.parametrize("metric", METRICS)
def test_every_token_is_decided_or_has_its_winner_among_the_candidates(metric):
    x, codebook = (3 * torch.randn(400, 3)).round(), (3 * torch.randn(300, 3)).round()
    found = scan_scores.search(x, search.prepare(codebook[codebook.any(1)], metric).plain)
    expected = reference.nearest_code(x, codebook[codebook.any(1)], metric)
    pairs = set(zip(found.owners.tolist(), found.codes.tolist(), strict=True))
    crowded = set(found.crowded.tolist())
    for token, winner in enumerate(expected.tolist()):
        if token in crowded:
            assert found.reached[winner]
        else:
            assert found.indices[token] == winner or (token, winner) in pairs


def test_a_token_with_very_many_candidates_is_crowded():
    codebook = torch.randn(300, 16)
    codebook[100:170] = codebook[100]
    x = torch.randn(400, 16)
    x[[3, 333]] = codebook[100]
    found = scan_scores.search(x, search.prepare(codebook, "euclidean").plain)
    expected = reference.nearest_code(x, codebook)
    assert {3, 333} <= set(found.crowded.tolist())
    assert torch.equal(found.crowded, (expected == 100).nonzero()[:, 0])
    assert torch.equal(found.reached.nonzero()[:, 0], torch.arange(100, 170))
