"""Layouts, cosine, accumulation, initialisation and the numbers that tell how a codebook is used."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from states import assert_equal_states

import fastvq
from fastvq import reference


def trained(seed=0, **options):
    torch.manual_seed(seed)
    module = fastvq.EMACodebook(12, 4, **options)
    module(torch.randn(50, 4).T[None] if options.get("channel_first") else torch.randn(50, 4))
    return module


def assert_close_state(a, b):
    for name, value in a.state_dict().items():
        assert (value - b.state_dict()[name]).norm() <= 1e-6 * value.norm(), name


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 7), (2, 4, 5, 3), (2, 4, 2, 3, 5)])
def test_channel_first_is_the_same_quantizer_in_another_layout(shape, metric):
    last, first = trained(metric=metric), trained(metric=metric, channel_first=True)
    z, mask = torch.randn(shape), torch.rand(shape[0], *shape[2:]) < 0.7
    leaves = z.movedim(1, -1).clone().requires_grad_(), z.clone().requires_grad_()
    expected, result = last(leaves[0], mask), first(leaves[1], mask)
    assert torch.equal(result.quantized.movedim(1, -1), expected.quantized)
    assert torch.equal(result.indices, expected.indices)
    assert result.quantized.stride() == z.stride()
    assert_equal_states(last, first)
    for quantized, _, loss in (expected, result):
        (quantized.square().sum() + loss).backward()
    assert torch.equal(leaves[1].grad.movedim(1, -1), leaves[0].grad)


def test_channels_last_memory_stays_what_it_is():
    z = torch.randn(2, 4, 5, 3).to(memory_format=torch.channels_last)
    assert trained(channel_first=True)(z).quantized.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cosine_follows_the_formula(dtype):
    module = trained(metric="cosine")
    before = copy.deepcopy(module.state_dict())
    z = (5 * torch.randn(60, 4)).to(dtype).requires_grad_()
    quantized, indices, loss = module(z)
    assert quantized.dtype == dtype

    u = F.normalize(z.to(torch.promote_types(dtype, torch.float32)), dim=-1)
    assert torch.equal(indices, reference.nearest_code(z.detach(), before["embeddings"], "cosine"))
    codes = before["embeddings"][indices]
    assert torch.equal(quantized, codes.to(dtype))
    expected = 0.25 * (u - codes).square().mean()
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(loss, 0.25 * 2 * (1 - (u * codes).sum(1)).mean() / 4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(quantized.sum() + loss, z)
    (expected_gradient,) = torch.autograd.grad((u + (codes - u).detach()).to(dtype).sum() + expected, z)
    tolerance = 1e-5 if dtype != torch.bfloat16 else 2.0**-7
    assert torch.allclose(gradient, expected_gradient, rtol=tolerance, atol=tolerance)

    counts, sums = reference.code_statistics(u.detach(), indices, 12)
    z_avg = 0.99 * before["z_avg"] + 0.01 * sums
    assert torch.allclose(module.N, 0.99 * before["N"] + 0.01 * counts)
    assert torch.allclose(module.z_avg, z_avg, atol=1e-6)
    assert torch.allclose(module.embeddings, F.normalize(z_avg, dim=1), atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e20, 1e38])
def test_cosine_does_not_depend_on_the_length_of_tokens(scale):
    z, results = torch.randn(50, 3).sign(), []
    for factor in (1.0, scale):
        torch.manual_seed(1)
        module = fastvq.EMACodebook(8, 3, metric="cosine")
        leaf = (z * factor).requires_grad_()
        quantized, _, loss = module(leaf)
        loss.backward()
        results.append((quantized, loss, module.embeddings, factor * leaf.grad))
    for a, b in zip(*results, strict=True):
        # Directions differ by the rounding of the scaled tokens.
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_cosine_codes_keep_norm_1_and_their_place_when_unused_for_long():
    module = trained(metric="cosine", ema_decay=0.5)
    before = module.embeddings.clone()
    for _ in range(300):  # 0.5^300 is far below float32
        module(before[:1])
    assert torch.allclose(module.embeddings.norm(dim=1), torch.ones(12))
    assert torch.allclose(module.embeddings[1:], before[1:], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"channel_first": True}])
def test_accumulated_batches_update_as_one(options):
    batches, mask = torch.randn(3, 4, 20, 4), torch.rand(3, 4, 20) < 0.8
    if options.get("channel_first"):
        batches = batches.transpose(2, 3)
    whole, parts = trained(**options), trained(**options)
    whole(batches.flatten(0, 1), mask.flatten(0, 1))
    before = copy.deepcopy(parts.state_dict())
    with parts.accumulate():
        parts(batches[0], mask[0])
        with parts.accumulate():
            parts(batches[1], mask[1])
        assert_equal_states(parts, before)
    parts(batches[2], mask[2])
    assert_close_state(whole, parts)
    parts(batches[0])
    whole(batches[0])
    assert_close_state(whole, parts)


def test_what_was_accumulated_does_not_outlive_its_codebook():
    start = trained().state_dict()
    far, z = torch.randn(1000, 4) + 50, torch.randn(10, 4)

    def again(module):
        module.load_state_dict(start)

    def fails(module):
        module.load_state_dict(start)
        with contextlib.suppress(KeyError), module.accumulate():
            module(far)
            raise KeyError

    expected = trained()
    expected.load_state_dict(start)
    expected(z)
    for drop in (again, fails):
        module = trained()
        if drop is again:
            with module.accumulate():
                module(far)
        drop(module)
        module(z)
        assert torch.equal(module.N, expected.N)
    with module.accumulate():
        module(far)
    module.initialize(z)
    module(z)
    assert module.embeddings.abs().max() < 10


def test_accumulated_restarts_draw_from_every_batch():
    torch.manual_seed(0)
    module = fastvq.EMACodebook(3000, 1, no_random_restart=False, restart_thres=1e9)
    module(torch.zeros(10, 1))
    with module.accumulate():
        module(torch.full((3000, 1), 1.0))
        module(torch.full((6000, 1), 2.0))
    module(torch.full((3000, 1), 3.0))
    shares = torch.bincount(module.embeddings[:, 0].long(), minlength=4)[1:] / 3000
    # Six standard deviations of a share of 3,000 are at most 3/√3000.
    assert ((shares - torch.tensor([0.25, 0.5, 0.25])).abs() < 0.055).all()


def test_evaluation_between_accumulated_batches_changes_nothing():
    whole, parts = trained(), trained()
    batches = torch.randn(2, 30, 4)
    with parts.accumulate():
        parts(batches[0])
    parts.eval()(torch.randn(9, 4))
    other = copy.deepcopy(parts.train())
    other(batches[1])
    whole(batches.flatten(0, 1))
    assert_close_state(whole, other)


def test_initialize_takes_tokens_of_all_batches_and_is_final():
    module = fastvq.EMACodebook(200, 2)
    batches = [torch.full((600, 2), float(i)) for i in (1, 2)]
    module.initialize(batches)
    shares = torch.bincount(module.embeddings[:, 0].long(), minlength=3)[1:] / 200
    assert ((shares - 0.5).abs() < 0.22).all()  # six standard deviations, 3/√200
    assert (module(torch.randn(50, 2)).quantized >= 1).all()
    with pytest.raises(ValueError, match="x must hold at least one finite token"):
        fastvq.EMACodebook(20, 2).initialize(torch.full((3, 2), torch.nan))


def test_kmeans_initialisation_starts_from_the_clusters_of_the_first_batch():
    centres = 20 * torch.randn(12, 4)
    z = (centres[:, None] + 0.1 * torch.randn(12, 30, 4)).flatten(0, 1)
    module = fastvq.EMACodebook(12, 4, init="kmeans")
    assert module(z).loss < 0.01
    assert (torch.cdist(centres, module.embeddings).amin(1) < 0.2).all()
    spherical = fastvq.EMACodebook(12, 4, init="kmeans", metric="cosine", channel_first=True)
    spherical.initialize([z.T[None], z[:7].T[None]])
    assert torch.allclose(spherical.embeddings.norm(dim=1), torch.ones(12))


def test_commitment_weight_scales_the_loss():
    z = torch.randn(30, 4)
    assert torch.equal(2 * trained()(z).loss, trained(commitment_weight=0.5)(z).loss)


def test_usage_numbers_come_from_the_counts():
    module = fastvq.EMACodebook(4, 2)
    module.N.copy_(torch.tensor([3.0, 3, 0.5, 0]))
    assert module.usage == 0.5
    assert module.dead_codes == 2
    module.N.copy_(torch.tensor([3.0, 3, 0, 0]))
    assert torch.allclose(module.perplexity, torch.tensor(2.0))


@pytest.mark.parametrize("options", [{}, {"restart_thres": 0}, {"restart_threshold_relative": 0.1}])
def test_usage_numbers_before_any_token(options):
    module = fastvq.EMACodebook(4, 2, **options)
    assert module.usage == 0
    assert module.dead_codes == 4
    assert module.perplexity == 0
