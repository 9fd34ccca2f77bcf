"""Codes that could make every token hard: long, equal or nearly equal ones, zeros. What a search of them costs is
counted in the tokens that each step leaves."""

from fractions import Fraction
from typing import NamedTuple

import pytest
import torch

from bench.static.open_tokens import third_bounds, ties
from fastvq import reference
from fastvq_kernels.search.decide import decide
from fastvq_kernels.search.exhaustive import exhaustive
from fastvq_kernels.search.pack_codes import pack_codebook
from fastvq_kernels.search.pack_tokens import pack_tokens
from fastvq_kernels.search.pipeline import certified_search
from fastvq_kernels.search.refine import refine
from fastvq_kernels.search.rescan import rescan
from fastvq_kernels.search.scan import scan
from fastvq_kernels.search.scan_float64 import scan_float64

METRICS = ("euclidean", "cosine", "dot")
TOKENS, CODES, DIM = 48, 256, 16


class Counts(NamedTuple):
    """Tokens that the first two scans and the third leave."""

    open: int
    crowded: int
    exhaustive: int


def three_scans(x, packed):
    """Indices after the second scan, the open list, the crowded tokens and the bounds of the third scan."""
    tokens = pack_tokens(x, packed)
    bins = scan(tokens, x.shape[1], packed)
    indices, open_list = refine(x, packed, tokens, bins)
    crowded = decide(x, packed, open_list, rescan(packed, tokens, bins, open_list), indices)
    return indices, open_list, crowded, scan_float64(x, packed, crowded)


@pytest.fixture
def search(kernel_device):
    """Counts of a search, whose indices are those of the oracle."""

    def count(x, codebook, metric="euclidean"):
        tokens, packed = x.to(kernel_device)[None], pack_codebook(codebook.to(kernel_device), metric)
        indices, open_list, crowded, found = three_scans(tokens, packed)
        exhaustive(tokens, packed, crowded, found, indices)
        assert torch.equal(indices[0].cpu(), reference.nearest_code(x, codebook, metric))
        return Counts(int(open_list.count), int(crowded.count), ties(crowded, found))

    return count


def long_codes(ordinary, factor, dim=DIM, offset=0.0):
    """Codes of which all but `ordinary` are `factor` times as long, and tokens like the others."""
    codebook = torch.randn(CODES, dim) + offset
    codebook[torch.randperm(CODES)[ordinary:]] *= factor
    return torch.randn(TOKENS, dim) + offset, codebook


def crowd(members, distance, dim=DIM):
    """Codes of equal length with a crowd of nearly equal ones among them, and tokens around the crowd."""
    codebook = torch.nn.functional.normalize(torch.randn(CODES, dim), dim=1) * dim**0.5
    center = codebook[0].clone()
    codebook[torch.randperm(CODES)[:members]] = center * (1 + distance * torch.randn(members, dim))
    return center + 0.1 * torch.randn(TOKENS, dim), codebook


@pytest.mark.parametrize("factor", [10.0, 1e3, 1e5, 1e10, 1e30])
@pytest.mark.parametrize("ordinary", [16, 64, 255])
def test_long_codes_leave_no_more_tokens_open_than_others(search, ordinary, factor):
    assert search(*long_codes(ordinary, factor)).open <= 2


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("ordinary", [64, 254])
def test_long_codes_of_other_metrics_leave_few_tokens_open(search, metric, ordinary):
    assert search(*long_codes(ordinary, 1e4), metric).open <= 2


@pytest.mark.parametrize("dim", [3, 130])
def test_long_codes_of_every_width(search, dim):
    assert search(*long_codes(64, 1e5, dim)).open <= 2


@pytest.mark.parametrize("offset", [3.0, 30.0])
def test_long_codes_beside_codes_far_from_zero(search, offset):
    assert search(*long_codes(64, 1e4, offset=offset)).open <= 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_long_codes_of_every_dtype(search, dtype):
    x, codebook = long_codes(64, 1e3)
    assert search(x.to(dtype), codebook.to(dtype)).open <= 2


def test_tokens_near_long_codes_and_near_ordinary_ones(search):
    x, codebook = long_codes(128, 1e3)
    x[::2] = 1e3 * torch.randn(TOKENS // 2, DIM)
    assert search(x, codebook).crowded == 0
    assert search(x * 1e9, codebook).exhaustive == 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("members", [8, 33, 128, 256])
def test_equal_codes_are_searched_once(search, members, metric):
    x, codebook = crowd(members, 0.0)
    counts = search(x, codebook, metric)
    assert counts.crowded == 0
    if metric == "euclidean":
        assert counts.open <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_equal_codes_of_every_dtype(search, dtype):
    x, codebook = crowd(128, 0.0)
    assert search(x.to(dtype), codebook.to(dtype)).open <= 2


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("members", "distance"), [(33, 1e-7), (128, 1e-7), (128, 1e-5), (256, 1e-7)])
def test_nearly_equal_codes_never_need_the_walk(search, members, distance, metric):
    counts = search(*crowd(members, distance), metric)
    assert counts.open > 5 or metric != "cosine"
    assert counts.exhaustive == 0


def test_float64_codes_that_float32_cannot_tell_apart_never_need_the_walk(search):
    x, codebook = crowd(128, 0.0)
    near = codebook.double() * (1 + 1e-9 * torch.randn(CODES, DIM, dtype=torch.float64))
    counts = search(x.double(), near)
    assert (counts.crowded, counts.exhaustive) == (TOKENS, 0)


@pytest.mark.parametrize("metric", METRICS)
def test_zero_codes_are_searched_once(search, metric):
    x, codebook = torch.randn(TOKENS, DIM), torch.randn(CODES, DIM)
    codebook[::2] = 0.0
    codebook[4::8] = -0.0
    assert search(0.01 * x, codebook, metric).crowded == 0
    assert search(x, torch.where(codebook == 0, codebook, -0.0), metric).crowded == 0


@pytest.mark.parametrize("metric", METRICS)
def test_zero_tokens_never_need_the_walk(search, metric):
    x, codebook = torch.randn(TOKENS, DIM), torch.randn(CODES, DIM)
    x[1::2] = 0.0
    codebook[0, 3] = torch.nan
    assert search(x, codebook, metric).exhaustive == 0


@pytest.mark.parametrize("metric", METRICS)
def test_tokens_that_are_codes_are_not_open(search, metric):
    codebook = torch.randn(CODES, DIM)
    assert search(codebook[:TOKENS], codebook, metric).open <= 2


def test_true_ties_of_many_codes_go_to_the_lowest(search):
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 7)
    assert search(torch.zeros(TOKENS, 7), signs).exhaustive == TOKENS


def test_crowds_in_heads_and_many_tiles(kernel_device):
    heads = [crowd(40, 1e-7) for _ in range(2)]
    x = torch.stack([tokens.repeat(2, 1) for tokens, _ in heads]).to(kernel_device)
    x[1, 5:] = torch.randn_like(x[1, 5:])
    codebook = torch.stack([codes for _, codes in heads])
    indices, _ = certified_search(x, pack_codebook(codebook.to(kernel_device)))
    for head in range(2):
        assert torch.equal(indices[head].cpu(), reference.nearest_code(x[head].cpu(), codebook[head]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_only_the_first_of_equal_codes_can_win(kernel_device, dtype):
    rows = torch.randn(2, 100, 5).to(dtype)
    rows[:, 7] = 0
    choice = torch.randint(100, (2, 500))
    codebook = torch.stack([head[chosen] for head, chosen in zip(rows, choice, strict=True)])
    codebook[:, 1::2] = torch.where(codebook[:, 1::2] == 0, -0.0, codebook[:, 1::2])
    packed = pack_codebook(codebook.to(kernel_device))
    for head in range(2):
        seen: set[int] = set()
        repeats = torch.tensor([chosen in seen or bool(seen.add(chosen)) for chosen in choice[head].tolist()])
        never = packed.half_sq[head].cpu() == torch.inf
        assert not (never & ~repeats).any()
        # A few may be overlooked, where other codes hold their slots.
        assert (repeats & ~never).sum() <= 2


@pytest.mark.parametrize(("metric", "offset"), [("euclidean", 0.0), ("euclidean", 1e4), ("dot", 0.0)])
def test_bounds_of_the_third_scan_hold_in_exact_arithmetic(kernel_device, offset, metric):
    x, codebook = crowd(200, 1e-7, dim=5)
    x, codebook = x[:6].double() + offset, codebook.double() + offset
    packed = pack_codebook(codebook.to(kernel_device), metric)
    _, _, crowded, found = three_scans(x[None].to(kernel_device), packed)
    number = int(crowded.count)
    assert number > 0
    half = Fraction(1, 2) if metric == "euclidean" else 0
    shift = packed.shift[0].tolist() if metric == "euclidean" else [0.0] * 5
    can_win = codebook[(packed.half_sq[0] < torch.inf).cpu()]
    bounds = torch.stack(third_bounds(crowded, found), 1).tolist()
    for token, (upper, others, lower) in zip(x[crowded.tokens[0, :number].cpu()].tolist(), bounds, strict=True):
        scores = sorted(
            sum(
                ((Fraction(a) - Fraction(m)) - half * (Fraction(e) - Fraction(m))) * (Fraction(e) - Fraction(m))
                for a, e, m in zip(token, code, shift, strict=True)
            )
            for code in can_win.tolist()
        )
        assert lower < scores[-1] < upper
        assert scores[-2] < others
