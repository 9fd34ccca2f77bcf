"""What never reaches the codebook: broken tokens, padding, empty batches, reduced precision, broken gradients."""

import pytest
import torch
from states import assert_equal_states

import fastvq


def test_autocast_changes_neither_indices_nor_state():
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        module = fastvq.EMACodebook(30, 8)
        z = torch.randn(4, 60, 8) + 3
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            results.append((module(z).indices, module.embeddings, module.N))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"init": "kmeans"}, {"restart_resets_statistics": True}], ids=str)
def test_the_default_dtype_changes_nothing(options):
    """Not even what is drawn at random."""
    batches, states = torch.randn(3, 60, 8), []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            torch.manual_seed(0)
            module = fastvq.EMACodebook(30, 8, no_random_restart=False, **options)
            with module.accumulate():
                module(batches[0])
            states.append([*[module(z.requires_grad_()) for z in batches[1:]], module.state_dict().values()])
        finally:
            torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(*states, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options", [{}, {"init": "kmeans"}, {"no_random_restart": False}, {"metric": "cosine"}], ids=str
)
def test_tensors_stay_on_their_device_whatever_the_default(options):
    module, (first, second) = fastvq.EMACodebook(300, 8, **options), torch.randn(2, 1600, 8)
    codebooks = torch.randn(2, 300, 8)
    with torch.device("meta"):
        indices = module(first.requires_grad_()).indices
        with module.accumulate():
            module(second, torch.ones_like(second[:, 0], dtype=torch.bool))
        found = [
            *module(second),
            *module.eval()(second),
            module.dictionary_lookup(indices),
            module.perplexity,
            *fastvq.nearest_code(torch.stack([second, second]), codebooks, return_distance=True),
            *fastvq.code_statistics(second, indices, 300),
            *fastvq.quantize(torch.stack([second, second]), codebooks),
            fastvq.kmeans(second, 20).codes,
        ]
    assert all(tensor.device.type == "cpu" for tensor in found)


def test_nan_and_padding_never_reach_the_state():
    batches = [torch.randn(40, 4) for _ in range(20)]
    states = []
    for broken in (False, True):
        torch.manual_seed(0)
        module = fastvq.EMACodebook(10, 4)
        module(torch.randn(40, 4))
        for step, batch in enumerate(batches):
            z, mask = batch.clone(), torch.ones(40, dtype=torch.bool)
            if step == 10 and broken:
                z[5, 2], z[6] = torch.nan, torch.inf
                z[7:20] = 1e6
                mask[7:20] = False
            elif step == 10:
                z = torch.cat([z[:5], z[20:]])
                mask = mask[: len(z)]
            module(z, mask)
        states.append(module.state_dict())
    assert_equal_states(*states)


@pytest.mark.parametrize("real_tokens", [0, 3, 100])
def test_restart_and_initialisation_draw_real_tokens_only(real_tokens):
    module = fastvq.EMACodebook(10, 4, no_random_restart=False, restart_thres=1e9)
    z = torch.full((100, 4), 7.0)
    z[: 100 - real_tokens, 1] = torch.nan
    random_codes = module.embeddings.clone()
    for _ in range(2):
        module(z)
        assert module.embeddings.isfinite().all()
        if real_tokens:
            assert (module.embeddings == 7).all()
    if real_tokens == 0:
        # Nothing to learn from: the codes only decay together with their counts.
        assert torch.allclose(module.embeddings, random_codes, rtol=1e-5)


def test_empty_batch_is_harmless():
    module = fastvq.EMACodebook(10, 4, no_random_restart=False)
    quantized, indices, loss = module(torch.randn(0, 7, 4))
    assert module._need_init
    assert quantized.shape == (0, 7, 4)
    assert indices.shape == (0, 7)
    assert loss == 0
    module(torch.randn(30, 4))
    module(torch.randn(0, 4))
    assert module.embeddings.isfinite().all()


def test_state_without_any_count_survives_an_empty_batch():
    module = fastvq.EMACodebook(10, 4)
    module.load_state_dict(module.state_dict())
    before = module.embeddings.clone()
    module(torch.randn(0, 4))
    assert torch.equal(module.embeddings, before)


@pytest.mark.parametrize("autocast", [False, True])
def test_one_nan_in_200_steps_leaves_the_state_of_a_run_without_that_token(autocast):
    states = []
    for broken in (True, False):
        torch.manual_seed(0)
        module = fastvq.EMACodebook(10, 4)
        for step in range(200):
            z = torch.randn(40, 4).requires_grad_()
            if step == 10:
                z = z.detach()
                z[7, 1] = torch.nan
                z = z if broken else torch.cat([z[:7], z[8:]])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                quantized, _, loss = module(z)
            assert loss.isfinite()
            assert quantized.isfinite().all() == (not broken or step != 10)
        states.append(module.state_dict())
    assert all(value.isfinite().all() for value in states[0].values())
    assert_equal_states(*states)


def test_gradients_that_overflow_do_not_reach_the_codebook():
    """As with a GradScaler whose scale is too large: the step is skipped, and the codebook goes on."""
    results = []
    for scale in (1.0, torch.inf):
        torch.manual_seed(0)
        module = fastvq.EMACodebook(10, 4, no_random_restart=False)
        for _ in range(3):
            z = torch.randn(40, 4).requires_grad_()
            quantized, _, loss = module(z)
            ((quantized.sum() + loss) * scale).backward()
        assert z.grad.isfinite().all() == (scale == 1)
        results.append(module.state_dict())
    assert_equal_states(results[0], results[1])


OPTIONS = {
    "plain": {},
    "restart": {"no_random_restart": False, "restart_thres": 3.0},
    "restart, resets": {"no_random_restart": False, "restart_thres": 3.0, "restart_resets_statistics": True},
    "k-means": {"init": "kmeans"},
    "cosine": {"metric": "cosine", "no_random_restart": False, "restart_thres": 3.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("channel_first", [False, True])
def test_padding_takes_no_part_in_anything(options, channel_first):
    module = fastvq.EMACodebook(10, 4, channel_first=channel_first, **options)
    mask = torch.rand(6, 20) < 0.5
    # Whatever drew, searched or summed padding would carry its size into the state.
    z = torch.where(mask[..., None], torch.rand(6, 20, 4), 1e9)
    leaf = (z.movedim(-1, 1) if channel_first else z).clone().requires_grad_()
    for _ in range(5):
        quantized, indices, loss = module(leaf, mask)
    for value in module.state_dict().values():
        assert value.abs().max() < 100
    assert torch.equal(indices >= 0, mask)
    values, (gradient,) = quantized, torch.autograd.grad(quantized.sum() + loss, leaf)
    if channel_first:
        values, gradient = values.movedim(1, -1), gradient.movedim(1, -1)
    assert not values[~mask].any()
    assert not gradient[~mask].any()
    assert gradient[mask].any(1).all()
    tokens = torch.nn.functional.normalize(z, dim=-1) if options.get("metric") == "cosine" else z
    expected = 0.25 * (tokens - values)[mask].square().mean()
    # Means of a few hundred float32 terms.
    assert torch.allclose(loss, expected, rtol=1e-5)
    module(leaf, torch.zeros_like(mask))
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_nan_in_padding_has_no_gradient_by_cosine():
    module = fastvq.EMACodebook(9, 4, metric="cosine")
    z = torch.full((3, 4), torch.nan)
    z[0] = 1
    quantized, _, loss = module(z.requires_grad_(), torch.tensor([True, False, False]))
    (quantized[0, 0] + loss).backward()
    assert z.grad[0].isfinite().all()
    assert not z.grad[1:].any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_initialisation_waits_for_a_token(options):
    module = fastvq.EMACodebook(10, 4, **options)
    for z, mask in ((torch.randn(0, 4), None), (torch.randn(9, 4), torch.zeros(9, dtype=torch.bool))):
        module(z, mask)
        resumed = fastvq.EMACodebook(10, 4, **options)
        resumed.load_state_dict(module.state_dict())
        for waiting in (module, resumed):
            assert waiting._need_init
            assert not waiting.N.any()
    module(torch.randn(30, 4))
    assert not module._need_init


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "lloyd"}, "init must be one of 'first_batch', 'kmeans', got 'lloyd'"),
        ({"metric": "dot"}, "metric must be one of 'euclidean', 'cosine', got 'dot'"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"n_codes": 0}, "n_codes must be at least 1, got 0"),
        ({"embedding_dim": 0}, "embedding_dim must be at least 1, got 0"),
        ({"n_codes": 2.0}, "n_codes must be an integer, got float"),
        ({"kmeans_iterations": -1}, "kmeans_iterations must be at least 0, got -1"),
        ({"restart_thres": float("nan")}, "restart_thres must be at least 0, got nan"),
        ({"restart_threshold_relative": -1}, "restart_threshold_relative must be at least 0, got -1"),
        ({"backend": "jax"}, "backend must be one of 'auto'.*got 'jax'"),
    ],
)
def test_wrong_options_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fastvq.EMACodebook(**{"n_codes": 10, "embedding_dim": 4, **arguments})


def test_wrong_tokens_are_named():
    for channel_first, message in ((False, r"z must be \[\.\.\., 4\]"), (True, r"z must be \[b, 4, \.\.\.\]")):
        module = fastvq.EMACodebook(10, 4, channel_first=channel_first)
        with pytest.raises(ValueError, match=message + r" to match embedding_dim, got \[2, 3, 5\]"):
            module(torch.randn(2, 3, 5))
        for wrong, name in (([1.0], "list"), (torch.ones(2, 4, 4, dtype=torch.int64), "a tensor of torch.int64")):
            with pytest.raises(TypeError, match=f"z must be a floating-point tensor, got {name}"):
                module.eval()(wrong)


@pytest.mark.parametrize("init", ["first_batch", "kmeans"])
def test_wrong_masks_and_dtypes_raise_before_anything_is_learned(init):
    module = fastvq.EMACodebook(10, 4, init=init)
    before = module.embeddings.clone()
    for z, mask, message in (
        (torch.randn(9, 4), torch.ones(8, dtype=torch.bool), r"mask must be \[9\]"),
        (torch.randn(9, 4), torch.ones(9), "mask must be a boolean tensor"),
        (torch.ones(9, 4, dtype=torch.int64), None, "must be a floating-point tensor"),
    ):
        for learn in (module, module.initialize):
            with pytest.raises((ValueError, TypeError), match=message):
                learn(z, mask)
    with pytest.raises(ValueError, match="x must hold at least one batch, got none"):
        module.initialize([])
    assert module._need_init
    assert torch.equal(module.embeddings, before)
