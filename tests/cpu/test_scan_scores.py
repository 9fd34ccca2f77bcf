"""Few codes are searched as they are; what cannot be decided so is undefined to packed codes, and no more."""

import pytest
import torch
from multiplying import set_product_values
from strategies import METRICS

from fastvq import reference
from fastvq.cpu import scan_scores, search, tuning
from fastvq.cpu.scan_scores import Each
from fastvq.cpu.scan_table import ONE, Table


@pytest.fixture(params=[1 << 9, 1 << 18], ids=["table", "one by one"], autouse=True)
def product_values(request, monkeypatch):
    set_product_values(monkeypatch, request.param)
    monkeypatch.setattr(tuning, "TOKENS_PER_BLOCK", 200)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_packed_where_few_codes_are_far_apart(monkeypatch, metric, dtype):
    monkeypatch.setattr(search, "pack", None)
    x, codebook = torch.randn(500, 16).to(dtype), torch.randn(300, 16).to(dtype)
    assert torch.equal(search.nearest_code(x, codebook, metric), reference.nearest_code(x, codebook, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_a_block_that_may_not_be_compared_and_all_after_it_are_undefined(metric):
    x, codebook = torch.randn(600, 16), torch.randn(300, 16)
    x[450] = torch.nan
    indices, undefined = scan_scores.search(x, codebook, metric)
    end = 600 - len(undefined)
    assert 0 <= end <= 450
    assert torch.equal(undefined, torch.arange(end, 600))
    assert torch.equal(indices[:end], reference.nearest_code(x[:end], codebook, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])
def test_codes_that_may_not_be_compared_leave_all_tokens(metric, value):
    x, codebook = torch.randn(300, 16), torch.randn(300, 16)
    codebook[7, 3] = value
    assert torch.equal(scan_scores.search(x, codebook, metric)[1], torch.arange(300))


def test_a_token_with_very_many_candidates_is_left_alone():
    codebook = torch.randn(300, 16)
    codebook[100:170] = codebook[100]
    x = torch.randn(400, 16)
    x[[3, 333]] = codebook[100]
    indices, undefined = scan_scores.search(x, codebook, "euclidean")
    expected = reference.nearest_code(x, codebook)
    known = torch.ones(400, dtype=torch.bool).index_fill_(0, undefined, False)
    assert {3, 333} <= set(undefined.tolist())
    assert torch.equal(undefined, (expected == 100).nonzero()[:, 0])
    assert torch.equal(indices[known], expected[known])


@pytest.mark.parametrize(("n_rows", "n_columns"), [(1, 64), (5, 3), (32, 64)])
def test_the_only_row_and_column_name_the_code_where_they_cross(n_rows, n_columns):
    reaches = torch.zeros(n_rows * n_columns, n_rows + n_columns)
    numbers = torch.arange(n_rows * n_columns)
    reaches[numbers, numbers // n_columns] = 1
    reaches[numbers, n_rows + numbers % n_columns] = 1
    codes = Table(None, n_rows * n_columns, n_rows, n_columns, 1)
    assert torch.equal(codes.named(reaches), numbers.float())
    for third in range(n_rows + n_columns):
        more = reaches.clone()
        more[:, third] = 1
        assert (codes.named(more) >= ONE)[more.sum(1) > 2].all()
    assert (codes.named(torch.zeros(3, n_rows + n_columns)) < 0).all()


def test_a_single_one_names_its_column():
    codes = Each(None)
    assert torch.equal(codes.named(torch.eye(100)), torch.arange(100.0))
    assert (codes.named(torch.ones(5, 2)) >= ONE).all()
