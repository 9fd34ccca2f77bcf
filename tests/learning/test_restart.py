"""Which codes restart, from which tokens, and what happens to their statistics."""

import pytest
import torch

import fastvq
from fastvq.common import distributed
from fastvq.learning import restart


def module_with(N, **options):
    """Codes far from all tokens but the first, so that only it wins, and moving counts ``N``."""
    codes = torch.full((len(N), 2), 1000.0)
    codes[0] = 0
    module = fastvq.EMACodebook(len(N), 2, no_random_restart=False, **options)
    counts = torch.tensor(N)
    module.load_state_dict({"embeddings": codes, "N": counts, "z_avg": codes * counts[:, None]})
    return module


def restarted(module, tokens):
    module(tokens)
    return (module.embeddings[:, None] == tokens).all(2).any(1)


def test_codes_below_the_threshold_restart_and_keep_their_statistics():
    module = module_with([50.0, 2.0, 0.5, 0.0])
    assert torch.equal(restarted(module, torch.randn(50, 2)), torch.tensor([False, False, True, True]))
    assert torch.allclose(module.N[1:], 0.99 * torch.tensor([2.0, 0.5, 0]))
    first = module.embeddings.clone()
    module(torch.randn(50, 2))
    assert not torch.equal(module.embeddings[2:], first[2:])  # drawn again


def test_reset_statistics_let_a_restarted_code_stay():
    module = module_with([50.0, 2.0, 0.5, 0.0], restart_resets_statistics=True)
    tokens = torch.randn(50, 2)
    assert torch.equal(restarted(module, tokens), torch.tensor([False, False, True, True]))
    assert torch.equal(module.N[2:], torch.ones(2))
    assert torch.equal(module.z_avg[2:], module.embeddings[2:])
    for _ in range(3):
        module(module.embeddings[[0, 2, 3]].repeat(20, 1))
    assert (module.N[2:] > 1).all()
    # Tokens on a code leave it where it is, up to the rounding of three divisions.
    assert torch.allclose(module.z_avg[2:] / module.N[2:, None], module.embeddings[2:], rtol=1e-5)


@pytest.mark.parametrize("tokens_per_step", [30, 3000])
def test_relative_threshold_does_not_depend_on_the_batch_size(tokens_per_step):
    shares = torch.tensor([0.7, 0.2, 0.06, 0.04])
    module = module_with((shares * tokens_per_step).tolist(), restart_threshold_relative=0.2)
    # A fifth of the mean is 5 % of all tokens.
    assert torch.equal(restarted(module, torch.randn(tokens_per_step, 2)), shares < 0.05)
    assert module.dead_codes == 1
    assert module.usage == 0.75


def test_without_restart_nothing_is_drawn(monkeypatch):
    module = fastvq.EMACodebook(10, 4)
    module(torch.randn(30, 4))
    for name in ("randperm", "rand", "randn_like"):
        monkeypatch.setattr(torch, name, lambda *args, **kwargs: pytest.fail("drew"))
    before = torch.get_rng_state()
    module(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n_real", [1, 3, 9, 40])
def test_draw_takes_real_tokens_only_and_each_once_before_it_repeats(n_real):
    tokens, real = torch.arange(40.0)[:, None].repeat(1, 2) * 100, torch.zeros(40, dtype=torch.bool)
    real[torch.randperm(40)[:n_real]] = True
    tokens[~real] = torch.nan
    rows, n_tokens = restart.draw_tokens(tokens, real, 7)
    assert n_tokens == n_real
    drawn = rows[: min(n_real, 7), 0] / 100
    assert len(drawn.unique()) == min(n_real, 7)
    assert real[drawn.long()].all()
    # What is repeated moves a little towards another, of which one token has none.
    assert len(rows.unique(dim=0)) == (7 if n_real > 1 else 1)
    assert (rows[:, :1] - rows[None, : min(n_real, 7), 0]).abs().amin(1).max() <= 0.01 * 4000


@pytest.mark.parametrize("n", [1, 5])
def test_fewer_tokens_than_codes_are_repeated_with_little_noise(n):
    tokens = 10 * torch.randn(n, 4)
    rows, _ = restart.draw_tokens(tokens, torch.ones(n, dtype=torch.bool), 12)
    assert rows.shape == (12, 4)
    assert len(rows.unique(dim=0)) == 12
    assert torch.cdist(rows, tokens).amin(1).max() < 0.05  # ten standard deviations of the noise, 0.01/√D


def test_merged_draws_are_fair_to_every_token():
    parts = [restart.Draw(torch.full((9000, 1), float(i)), torch.tensor(n)) for i, n in enumerate((100, 0, 300, 600))]
    merged = parts[0]
    for part in parts[1:]:
        merged = restart.merge(merged, part)
    assert merged.n_tokens == 1000
    shares = torch.bincount(merged.rows[:, 0].long(), minlength=4) / 9000
    # Six standard deviations of a share of 9,000 are at most 3/√9000.
    assert ((shares - torch.tensor([0.1, 0, 0.3, 0.6])).abs() <= 0.032).all()
    assert shares[1] == 0


@pytest.mark.parametrize("sizes", [(100, 0, 300), (100, 100, 100), (0, 0, 7), (0, 0, 0)])
def test_ranks_that_were_seeded_alike_agree_on_one_fair_draw(sizes, monkeypatch):
    """The collectives of three ranks, played by one process: once for all keys, then with the smallest of them."""
    draws = [restart.Draw(torch.full((9000, 2), float(r + 1)), torch.tensor(n)) for r, n in enumerate(sizes)]
    monkeypatch.setattr(distributed, "is_distributed", lambda ranks: True)
    monkeypatch.setattr(distributed, "world_size", lambda ranks: 3)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor, ranks: tensor)

    def run(all_reduce_min):
        monkeypatch.setattr(distributed, "all_reduce_min", all_reduce_min)
        for rank, draw in enumerate(draws):
            torch.manual_seed(0)
            monkeypatch.setattr(distributed, "rank", lambda ranks, rank=rank: rank)
            yield restart.over_ranks(draw, distributed.ALL)

    keys = []
    list(run(lambda tensor, ranks: keys.append(tensor) or tensor))
    smallest = torch.stack(keys).amin(0)
    rows, found = zip(*run(lambda tensor, ranks: smallest), strict=True)
    assert len({bool(one) for one in found}) == 1
    assert found[0] == (sum(sizes) > 0)
    owners = sum(rows)[:, 0].long()
    shares = torch.bincount(owners, minlength=4) / 9000
    expected = torch.tensor([0.0, *sizes]) / max(1, sum(sizes)) if sum(sizes) else torch.tensor([1.0, 0, 0, 0])
    assert ((shares - expected).abs() <= 0.032).all()
    assert not shares[expected == 0].any()
