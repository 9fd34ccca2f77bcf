"""What goes wrong in the published classes does so here, in the same test in which ours does not."""

import pytest
import torch
import torch.distributed as dist
from published import PublishedCodebook

import fastvq
from fastvq.testing.measure import peak_extra_memory

BOTH = (PublishedCodebook, fastvq.EMACodebook)


def both(*args, **options):
    for kind in BOTH:
        torch.manual_seed(0)
        yield kind(*args, **options)


def test_without_a_defect_in_play_both_train_alike():
    states = []
    for module in both(12, 4, no_random_restart=False):
        for _ in range(20):
            module(torch.randn(2, 30, 4))
        states.append(module.state_dict())
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-5), name


def test_loaded_codebook_is_overwritten_by_the_first_batch():
    survives = []
    for module, trained in zip(both(12, 4), both(12, 4), strict=True):
        trained(torch.randn(1, 30, 4))
        codes = trained.state_dict()["embeddings"].clone()
        module.load_state_dict(trained.state_dict())
        module.train()
        quantized, indices, _ = module(torch.randn(1, 30, 4))
        survives.append(torch.equal(quantized, codes[indices]))
        # The published value is z + (q - z), rounded: a code of the checkpoint would still be that close.
        assert survives[-1] or (quantized - codes[indices]).abs().max() > 0.1
    assert survives == [False, True]


def test_restarted_codes_are_drawn_again_though_they_win_tokens():
    tokens = torch.randn(1, 40, 2)
    kept = []
    for module, options in zip(BOTH, ({}, {"restart_resets_statistics": True}), strict=True):
        torch.manual_seed(0)
        codebook = module(4, 2, no_random_restart=False, restart_thres=0.5, **options)
        far = torch.full((4, 2), 1e3)
        far[0] = 0
        counts = torch.tensor([10.0, 0, 0, 0])
        codebook.load_state_dict({"embeddings": far, "N": counts, "z_avg": far * counts[:, None]})
        codebook._need_init = False
        codebook(tokens)
        restarted = codebook.embeddings.clone()
        _, indices, _ = codebook(tokens)
        assert (torch.bincount(indices.flatten(), minlength=4) > 0).all()
        # In one step a code moves towards the mean of what it won, by at most a tenth for 10 tokens.
        kept.append(
            bool(((codebook.embeddings - restarted).norm(dim=1) < 0.1 * 6).all()) and bool((codebook.N > 0.5).all())
        )
    assert kept == [False, True]


def test_tokens_are_drawn_though_restart_is_off(monkeypatch):
    drawn = []
    for module in both(12, 4):
        module(torch.randn(1, 30, 4))
        with monkeypatch.context() as patch:
            calls, randperm = [], torch.randperm
            patch.setattr(torch, "randperm", lambda *a, calls=calls, f=randperm, **k: calls.append(a) or f(*a, **k))
            module(torch.randn(1, 30, 4))
        drawn.append(len(calls))
    assert drawn == [1, 0]


@pytest.mark.parametrize(
    "z", [torch.ones(2, 4, 7).transpose(1, 2), torch.ones(9, 4), torch.ones(2, 3, 5, 4)], ids=["strides", "2-D", "4-D"]
)
def test_other_strides_and_shapes_raise(z):
    published, ours = both(12, 4)
    with pytest.raises((RuntimeError, ValueError), match=r"view size is not compatible|values to unpack"):
        published.eval()(z)
    assert ours.eval()(z).indices.shape == z.shape[:-1]


def test_counts_stop_growing_in_half_precision():
    counts = []
    for module in both(1, 2):
        module.to(torch.bfloat16)
        tokens = torch.ones(1, 64, 2, dtype=torch.bfloat16)
        module.load_state_dict({"embeddings": tokens[0, :1], "N": torch.ones(1), "z_avg": tokens[0, :1]})
        module._need_init = False
        for _ in range(601):
            module(tokens)
        counts.append(float(module.N))
    # 601 float32 steps of relative error 2^-23.
    true = pytest.approx(64 - 63 * 0.99**601, rel=601 * 2.0**-23)
    assert counts[0] < 63 < 63.8 < counts[1]
    assert counts[1] == true


def test_one_nan_destroys_the_code_it_lands_on():
    finite = []
    for module in both(12, 4):
        module(torch.randn(1, 30, 4))
        z = torch.randn(1, 30, 4)
        z[0, 3, 1] = torch.nan
        module(z)
        finite.append(all(bool(value.isfinite().all()) for value in module.state_dict().values()))
    assert finite == [False, True]


def test_two_sums_over_the_ranks_per_step_with_the_graph_attached(monkeypatch):
    reduced = []

    class Done:
        def wait(self):
            pass

    def all_reduce(tensor, *args, async_op=False, **kwargs):
        reduced.append(tensor)
        return Done() if async_op else None

    sums = []
    for module in both(12, 4):
        module(torch.randn(1, 30, 4))
        reduced.clear()
        with monkeypatch.context() as patch:
            patch.setattr(dist, "is_initialized", lambda: True)
            patch.setattr(dist, "get_world_size", lambda group=None: 2)
            patch.setattr(dist, "get_rank", lambda group=None: 0)
            patch.setattr(dist, "broadcast", lambda *args: None)
            patch.setattr(dist, "all_reduce", all_reduce)
            module(torch.randn(1, 30, 4, requires_grad=True))
        sums.append((len(reduced), any(tensor.requires_grad for tensor in reduced)))
    assert sums == [(2, True), (1, False)]


def test_perplexity_needs_a_matrix_of_tokens_by_codes():
    z = torch.randn(1, 4000, 2)
    holds_matrix = []
    for module in both(1000, 2):
        module(z)

        def step(module=module):
            module(z)
            return module.perplexity

        holds_matrix.append(peak_extra_memory(step, torch.device("cpu")) >= 4 * 4000 * 1000)
    assert holds_matrix == [True, False]
