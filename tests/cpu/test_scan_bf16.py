"""What the products in bfloat16 promise about scores, computed in float64."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from strategies import METRICS, problems

from fastvq import reference
from fastvq.cpu import matmul, scan_bf16, search
from fastvq.cpu.bounds import UNIT_BF16
from fastvq.cpu.pack import pack, pack_tokens, round_tokens


def parts(x, codebook, metric):
    """Packed codes and tokens, those in bfloat16, and which tokens may be compared."""
    prepared = search.prepare(codebook, metric)
    assume(prepared.frame is not None)
    packed = pack(prepared.codes, prepared.frame, in_bfloat16=True)
    rows, lower = torch.empty(len(x), packed.rows.shape[2]), torch.full((len(x),), -torch.inf)
    factors = pack_tokens(x, packed.frame, out=rows)
    scan_bf16._raise_by_sample(lower, rows, packed, factors)
    tokens = round_tokens(rows, factors, lower, packed.rounded.ratio)
    return packed, rows, tokens, ~lower.isnan()


def scores(packed, rows):
    """``x'·e'_k - |e'_k|²/2``, float64 ``[groups, G, n]``; -inf for the codes that fill the last group."""
    dim = rows.shape[1] - 2
    codes = packed.rows[:, :, :dim].double()
    half = codes.square().sum(2) / 2 if packed.frame.metric == "euclidean" else torch.zeros(codes.shape[:2])
    half[packed.rows[:, :, dim].isinf()] = torch.inf
    return codes @ rows[:, :dim].double().t() - half[:, :, None]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems())
def test_products_bound_the_scores_from_both_sides(problem):
    packed, rows, tokens, valid = parts(*problem)
    products = torch.matmul(packed.rounded.rows, tokens.rows.t()).float()[:, :, valid]
    shift, factors = tokens.rows[valid, -1].double(), tokens.factors[:, valid].double()
    shifted = scores(packed, rows[valid]) + shift
    # A sum that is at least a number is at least this number rounded, once it is rounded itself.
    least = (shifted + factors[2]).float()
    assert (products >= torch.nextafter(least, torch.tensor(-torch.inf)).bfloat16()).all()

    best, largest = shifted.flatten(0, 1).amax(0), products.amax(1).double()
    lower = (1 - 2 * UNIT_BF16) * largest + packed.norms.double() @ factors
    assert (lower[largest >= 0] <= best.expand_as(lower)[largest >= 0]).all()
    assert (tokens.threshold[valid] >= 0).all()
    assert (tokens.threshold[valid] <= best).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_tokens_with_many_groups_in_reach_are_searched_in_float32(monkeypatch, metric, spread):
    """Where bfloat16 cannot tell many codes apart: in two clumps, and tokens near one of them."""
    again = []
    monkeypatch.setattr(matmul, "bf16_pays", lambda *size: True)
    merge = scan_bf16._with
    monkeypatch.setattr(scan_bf16, "_with", lambda found, others, at: again.append(len(at)) or merge(found, others, at))
    codebook = spread * torch.randn(4000, 64) + torch.tensor([[-1.0], [1.0]]).repeat(2000, 1)
    x = 1 + spread * torch.randn(500, 64)
    assert torch.equal(search.nearest_code(x, codebook, metric), reference.nearest_code(x, codebook, metric))
    assert (sum(again) > 250) == (spread < 1)


@pytest.mark.parametrize("metric", METRICS)
def test_a_cached_codebook_is_searched_alike(monkeypatch, metric):
    monkeypatch.setattr(matmul, "bf16_pays", lambda *size: True)
    x, codebook = torch.randn(300, 40) + 2, torch.randn(2100, 40) + 2
    prepared = search.prepare(codebook, metric)
    assert prepared.packed.rounded is not None
    expected = reference.nearest_code(x, codebook, metric)
    for pays in (True, False):
        monkeypatch.setattr(matmul, "bf16_pays", lambda *size, pays=pays: pays)
        assert torch.equal(search.nearest_code(x, codebook, metric, lambda *_: prepared), expected)


def test_sums_are_float32_inside():
    """Of many terms that cancel."""
    terms = torch.randn(64, 4096).bfloat16()
    others = torch.randn(512, 4096).bfloat16()
    exact = terms.double() @ others.double().t()
    magnitudes = terms.double().abs() @ others.double().abs().t()
    assert (
        ((terms @ others.t()).double() - exact).abs().le(UNIT_BF16 * exact.abs() + 4096 * 2.0**-24 * magnitudes).all()
    )


def codes(*size):
    return torch.empty(1).expand(size)


def test_a_search_pays_with_many_tokens_and_codes(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert matmul.bf16_pays(4096, codes(8192, 64))
    assert matmul.bf16_pays(math.inf, codes(4096, 32))
    assert not matmul.bf16_pays(100, codes(8192, 64))
    assert not matmul.bf16_pays(8192, codes(1000, 64))
    assert not matmul.bf16_pays(8192, codes(8192, 8))
    assert not matmul.bf16_pays(0, codes(8192, 64))
    assert not matmul.bf16_pays(4096, codes(8192, 64).to("meta"))


def test_without_matrix_units_it_pays_where_the_processor_multiplies_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert matmul.bf16_pays(8192, codes(2048, 64))
    assert matmul.bf16_pays(8192, codes(8192, 16))
    assert not matmul.bf16_pays(2048, codes(2048, 64))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not matmul.bf16_pays(8192, codes(8192, 64))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not matmul.bf16_pays(8192, codes(8192, 64))
