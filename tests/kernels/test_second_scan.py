"""The second scan: what it names, what it leaves, and the bound behind it."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from fastvq import reference
from fastvq_kernels.configs import rescan_config
from fastvq_kernels.search import bounds
from fastvq_kernels.search.decide import decide
from fastvq_kernels.search.open_tokens import CANDIDATES
from fastvq_kernels.search.pack_codes import pack_codebook
from fastvq_kernels.search.pack_tokens import pack_tokens
from fastvq_kernels.search.refine import refine
from fastvq_kernels.search.rescan import rescan
from fastvq_kernels.search.scan import scan

METRICS = ("euclidean", "cosine", "dot")


@pytest.fixture(params=["sm_80", "sm_90"])
def search(kernel_device, monkeypatch, request):
    """Indices after the second scan, -1 for a crowded token; the open list; the number of crowded tokens.

    With the tiles of a chip on which all are of one size, and of one with smaller ones for few tokens.
    """

    if kernel_device.type == "cpu":
        monkeypatch.setattr("fastvq_kernels.search.rescan.rescan_config", partial(rescan_config, target=request.param))

    def steps(x, codebook, metric="euclidean", change=lambda packed: packed):
        x, codebook = x.to(kernel_device), codebook.to(kernel_device)
        packed = change(pack_codebook(codebook, metric))
        tokens = pack_tokens(x, packed)
        bins = scan(tokens, x.shape[1], packed)
        indices, open_list = refine(x, packed, tokens, bins)
        candidates = rescan(packed, tokens, bins, open_list)
        return indices, open_list, candidates, int(decide(x, packed, open_list, candidates, indices).count.sum())

    return steps


def close_codes(groups, members, d, distance):
    """Codes in groups, `distance` apart; the members of a group stand far from each other in the codebook."""
    return (torch.randn(groups, d) + distance * torch.randn(members, groups, d)).view(-1, d)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [3, 12, 64, 200])
def test_close_codes_are_decided_by_the_second_scan(search, metric, d):
    codebook = close_codes(40, 6, d, 1e-4)
    x = codebook[None, :40] + 1e-3 * torch.randn(1, 40, d)
    indices, open_list, _, crowded = search(x, codebook, metric)
    assert int(open_list.count) > 10
    assert crowded == 0
    assert torch.equal(indices[0].cpu(), reference.nearest_code(x[0], codebook, metric))


def test_candidates_hold_the_nearest_code_and_few_others(search):
    codebook = close_codes(60, 4, 32, 1e-4)
    x = codebook[None, :60] + 1e-3 * torch.randn(1, 60, 32)
    _, open_list, candidates, _ = search(x, codebook)
    nearest = reference.nearest_code(x[0], codebook)
    for i in range(int(open_list.count)):
        token, found = int(open_list.tokens[0, i]), int(open_list.found[0, i])
        named = candidates[0, i, :found].tolist()
        assert int(nearest[token]) in named
        assert {code % 60 for code in named} == {int(nearest[token]) % 60}
        assert len(set(named)) == found <= 4


def test_tokens_with_more_candidates_than_there_is_room_for_are_crowded(search):
    codebook = close_codes(10, CANDIDATES + 1, 16, 1e-7)
    indices, open_list, _, crowded = search(torch.randn(1, 20, 16), codebook)
    assert crowded == int(open_list.count) == 20
    assert (indices == -1).all()


def test_as_many_candidates_as_there_is_room_for_are_decided(search):
    codebook = close_codes(10, CANDIDATES, 16, 1e-7)
    x = torch.randn(1, 20, 16)
    indices, open_list, _, crowded = search(x, codebook)
    assert (int(open_list.count), crowded) == (20, 0)
    assert torch.equal(indices[0].cpu(), reference.nearest_code(x[0], codebook))


def test_heads_have_lists_of_their_own(search):
    codebook = torch.stack([close_codes(20, 5, 24, 1e-4), torch.randn(100, 24), close_codes(10, 10, 24, 1e-4)])
    x = codebook[:, :40] + 1e-3 * torch.randn(3, 40, 24)
    indices, open_list, _, crowded = search(x, codebook)
    first, second, third = open_list.count.tolist()
    assert min(first, third) > 10 > second
    assert crowded == 0
    for head in range(3):
        assert torch.equal(indices[head].cpu(), reference.nearest_code(x[head], codebook[head]))


@pytest.fixture
def eight_ranges(monkeypatch):
    """A codebook of 1,024 codes is scanned in eight ranges of 128."""
    monkeypatch.setattr("fastvq_kernels.search.scan.splits", lambda *_: 8)


def test_ranges_where_only_the_best_codes_of_bins_can_win_are_not_scanned_again(search, eight_ranges):
    codebook, close = torch.randn(1024, 32), torch.randn(20, 32)
    for place in (40, 300, 700, 900):
        codebook[place : place + 20] = close + 1e-4 * torch.randn(20, 32)
    x = close[None] + 1e-3 * torch.randn(1, 20, 32)

    def without_second_scan(packed):
        return replace(packed, fine=torch.full_like(packed.fine, torch.nan))

    indices, open_list, _, crowded = search(x, codebook, change=without_second_scan)
    assert int(open_list.count) == 20
    assert crowded == 0
    assert torch.equal(indices[0].cpu(), reference.nearest_code(x[0], codebook))
    assert (open_list.found[0, :20] == 4).all()


def test_codes_of_one_bin_are_found_where_other_ranges_are_not_scanned(search, eight_ranges):
    codebook, close = torch.randn(1024, 32), torch.randn(1, 32)
    # Neighbours share a bin: 520 and 521 do, and their range is scanned again; the others are the best of theirs.
    near = [130, 260, 388, 516, 520, 521, 640, 769]
    codebook[near] = close + 1e-4 * torch.randn(8, 32)
    x = close[None] + 1e-3 * torch.randn(1, 1, 32)
    indices, open_list, candidates, crowded = search(x, codebook)
    assert (int(open_list.count), crowded) == (1, 0)
    assert torch.equal(indices[0].cpu(), reference.nearest_code(x[0], codebook))
    named = candidates[0, 0, : int(open_list.found[0, 0])].tolist()
    assert sorted(named) == near


@pytest.mark.parametrize("ranges", [1, 3, 8])
def test_open_tokens_of_many_tiles_in_few_or_many_ranges(search, monkeypatch, ranges):
    monkeypatch.setattr("fastvq_kernels.search.scan.splits", lambda *_: ranges)
    codebook = close_codes(170, 6, 16, 1e-4)
    x = codebook[None, :170].repeat(1, 2, 1) + 1e-3 * torch.randn(1, 340, 16)
    indices, open_list, _, crowded = search(x, codebook)
    assert int(open_list.count) > 256
    assert crowded == 0
    assert torch.equal(indices[0].cpu(), reference.nearest_code(x[0], codebook))


@pytest.mark.parametrize("n_open", [30, 64, 65, 100])
@pytest.mark.parametrize("groups", [10, 31, 32, 50])
def test_few_open_tokens_and_codes_are_scanned_in_small_tiles(search, n_open, groups):
    """Two tiles of up to 64 tokens and a few of 64 codes: fewer, and not fewer, than the four programs."""
    codebook = close_codes(groups, 4, 20, 1e-4)
    x = codebook[None, torch.arange(n_open) % groups] + 1e-3 * torch.randn(1, n_open, 20)
    indices, open_list, _, crowded = search(x, codebook)
    assert (int(open_list.count), crowded) == (n_open, 0)
    assert torch.equal(indices[0].cpu(), reference.nearest_code(x[0], codebook))


@pytest.mark.parametrize("d", [6, 24, 130])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_bound_is_above_every_score_even_if_all_sums_err_at_most_downwards(kernel_device, d, scale):
    codebook = close_codes(30, 5, d, 1e-4)
    codebook[::7] *= scale
    x = codebook[None, :50] + 1e-3 * torch.randn(1, 50, d)
    x, codebook = x.to(kernel_device), codebook.to(kernel_device)
    packed = pack_codebook(codebook)
    tokens = pack_tokens(x, packed)
    _, open_list = refine(x, packed, tokens, scan(tokens, 50, packed))
    at = open_list.tokens[0, : int(open_list.count)]
    assert len(at) > 5
    c, w, _ = open_list.factors[0, : len(at)].double().unbind(1)
    k, width = len(codebook), packed.half.shape[2]
    half, parts = packed.half[0, :k].double(), tokens.rows[0, at].double()
    product = parts @ half.T
    if not packed.split:
        low = open_list.low[0, : len(at)].double()
        product += low @ half.T + parts @ packed.low[0, :k].double().T
    lengths = tokens.norm[0, at].double()[:, None] * packed.length[0].double()
    product -= bounds.fine_accumulation(width) * lengths
    bias, slack = packed.fine[0, :k].double().unbind(1)
    upper = product + c[:, None] * bias + w[:, None] * slack
    # The score in the packed frame, from the given values.
    scale_x, scale_e, shift = tokens.scale[0, 0].double(), packed.scale[0].double(), packed.shift[0].double()
    moved, codes = scale_x * (x[0, at].double() - shift), scale_e * (codebook.double() - shift)
    score = moved @ codes.T - c[:, None] * codes.square().sum(1) / 2
    assert (upper >= score + c[:, None] * packed.mean_sq.double()).all()
