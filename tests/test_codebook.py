"""EMACodebook: the published semantics, and what the published classes get wrong."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastvq
from fastvq import cpu, kept, reference


def train(module, batches, seed=2):
    torch.manual_seed(seed)
    return [module(z).indices if isinstance(module, fastvq.EMACodebook) else module(z)[1] for z in batches]


def pair(*args, **kwargs):
    torch.manual_seed(0)
    ours = fastvq.EMACodebook(*args, **kwargs)
    torch.manual_seed(0)
    return ours, reference.EMACodebook(*args, **kwargs)


def state_within(ours, theirs, tolerance):
    for name, expected in theirs.state_dict().items():
        assert (ours.state_dict()[name] - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("no_random_restart", [True, False])
@pytest.mark.parametrize("tokens_per_step", [400, 60])
def test_training_follows_the_published_module(no_random_restart, tokens_per_step):
    ours, theirs = pair(128, 16, no_random_restart=no_random_restart)
    if tokens_per_step < 128:
        # Codes drawn from repeated tokens lie so close together that the published formula picks wrong ones.
        theirs.search = reference.nearest_code
    batches = [torch.randn(2, tokens_per_step // 2, 16) for _ in range(200)]
    for a, b in zip(train(ours, batches), train(theirs, batches), strict=True):
        assert torch.equal(a, b)
    state_within(ours, theirs, 1e-5)


def test_value_loss_and_gradient_follow_the_published_module():
    ours, theirs = pair(40, 6)
    z = torch.randn(3, 50, 6)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        leaf = z.clone().requires_grad_()
        quantized, indices, loss = module(leaf)
        (quantized.pow(2).sum() + 10 * loss).backward()
        results.append((quantized.detach(), indices, loss.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_returned_codes_are_those_before_the_update():
    module = fastvq.EMACodebook(10, 4)
    module(torch.randn(50, 4))
    before = module.embeddings.clone()
    quantized, indices, _ = module(torch.randn(50, 4))
    assert torch.equal(quantized, before[indices])
    assert not torch.equal(module.embeddings, before)


def test_update_between_forward_and_backward_does_not_change_the_gradient():
    z = torch.randn(50, 4)
    grads = []
    for further_steps in (0, 3):
        torch.manual_seed(0)
        module = fastvq.EMACodebook(10, 4, no_random_restart=False)
        leaf = z.clone().requires_grad_()
        quantized, _, loss = module(leaf)
        for _ in range(further_steps):
            module(torch.randn(50, 4))
        (quantized.pow(2).sum() + loss).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_a_loaded_state_is_never_initialised_again():
    published = reference.EMACodebook(12, 4)
    published(torch.randn(30, 4))
    module = fastvq.EMACodebook(12, 4)
    module.load_state_dict(published.state_dict())
    module.train()
    assert torch.equal(module(published.embeddings).quantized, published.embeddings)


def test_state_dict_keys_are_the_published_ones():
    ours, theirs = pair(12, 4)
    assert ours.state_dict().keys() == theirs.state_dict().keys() == {"embeddings", "N", "z_avg"}
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for embeddings"):
        fastvq.EMACodebook(13, 4).load_state_dict(ours.state_dict())


def test_nested_modules_load_without_initialising():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), fastvq.EMACodebook(12, 4))
    model(torch.randn(20, 4))
    state = copy.deepcopy(model).state_dict()
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), fastvq.EMACodebook(12, 4))
    model.load_state_dict(state)
    assert not model[1]._need_init


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_state_stays_float32_and_unrounded(cast):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), fastvq.EMACodebook(12, 4))
    embeddings = model[1].embeddings.clone()
    cast(model)
    assert model[0].weight.dtype != torch.float32
    assert torch.equal(model[1].embeddings, embeddings)
    assert {t.dtype for t in model[1].state_dict().values()} == {torch.float32}
    model.to("meta")
    assert model[1].embeddings.is_meta


def test_half_precision_training_accumulates_in_float32():
    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        module = fastvq.EMACodebook(2, 2).to(dtype)
        tokens = torch.tensor([[-1.0, 0], [1, 0]]).repeat(2043, 1).to(dtype)
        module.load_state_dict({"embeddings": tokens[:2], "N": torch.ones(2), "z_avg": tokens[:2]})
        for _ in range(601):
            quantized, _, _ = module(tokens)
        assert quantized.dtype == dtype
        counts.append(module.N)
    assert torch.equal(*counts)
    # N = 2043 - 2042 γ^601 per code, from N = 1 and 2043 tokens a step; 601 float32 steps of relative error 2^-23.
    assert torch.allclose(counts[0], torch.tensor(2043 - 2042 * 0.99**601), rtol=601 * 2.0**-23)


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
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name


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


def test_frozen_and_evaluated_codebooks_do_not_change():
    module = fastvq.EMACodebook(10, 4)
    before = copy.deepcopy(module.state_dict())
    module.freeze_codebook = True
    module(torch.randn(30, 4))
    module.freeze_codebook = False
    module.eval()
    module(torch.randn(30, 4))
    assert module._need_init
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_any_leading_shape_and_strides():
    module = fastvq.EMACodebook(10, 4).eval()
    z = torch.randn(4, 3, 5, 2).permute(3, 1, 2, 0)
    quantized, indices, _ = module(z)
    assert indices.shape == (2, 3, 5)
    assert torch.equal(quantized, module.dictionary_lookup(indices))
    assert torch.equal(indices, reference.nearest_code(z.reshape(-1, 4), module.embeddings).view(2, 3, 5))


def test_lookups():
    module = fastvq.EMACodebook(10, 4)
    weights = torch.rand(2, 3, 10)
    assert torch.equal(module.soft_codebook_lookup(weights), weights @ module.embeddings)
    assert torch.equal(
        module.dictionary_lookup(torch.tensor([3, -1])), torch.stack([module.embeddings[3], torch.zeros(4)])
    )
    assert module.reset_parameters() is None


def test_usage_and_perplexity_come_from_the_counts():
    module = fastvq.EMACodebook(4, 2)
    module.N.copy_(torch.tensor([3.0, 3, 0, 0]))
    assert module.usage == 0.5
    assert torch.allclose(module.perplexity, torch.tensor(2.0))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_continue_as_the_original(duplicate):
    module = fastvq.EMACodebook(10, 4)
    module(torch.randn(30, 4))
    other = duplicate(module)
    batch = torch.randn(30, 4)
    assert torch.equal(module(batch).indices, other(batch).indices)
    assert torch.equal(module.embeddings, other.embeddings)


@pytest.fixture(params=["torch", "triton"])
def evaluated(request, kernel_device):
    """A module in evaluation that has kept its codebook, and a check of its indices on fresh tokens."""
    if request.param == "triton" and kernel_device.type == "cuda":
        pytest.skip("nothing is kept on a GPU unless the codebook is frozen")
    module = fastvq.EMACodebook(70, 5, backend=request.param).eval()

    def check(codebook=module):
        for _ in range(2):
            z = torch.randn(17, 5)  # more than the CPU searches without packing
            with torch.no_grad():
                indices = codebook(z).indices
            assert torch.equal(indices, reference.nearest_code(z, codebook.embeddings))

    check()
    return module, check


def swap_storage(module):
    module.embeddings.data = torch.randn(70, 5)


def replace_buffer(module):
    module.embeddings = torch.randn(70, 5)


def write_in_inference_mode(module):
    with torch.inference_mode():
        module.embeddings.copy_(torch.randn(70, 5))


def one_training_step(module):
    module.train()
    module(torch.randn(40, 5))
    module.eval()


CHANGES = {
    "in place": lambda module: module.embeddings.mul_(-1),
    "one element": lambda module: module.embeddings.view(-1)[3:4].fill_(0.3),
    "data": lambda module: module.embeddings.data.copy_(torch.randn(70, 5)),
    "numpy": lambda module: module.embeddings.numpy().__setitem__(slice(None), 0.5 - module.embeddings.numpy()),
    "storage": lambda module: module.embeddings.untyped_storage().copy_(torch.randn(70, 5).untyped_storage()),
    "dlpack": lambda module: torch.from_dlpack(module.embeddings).mul_(-1),
    "other storage": swap_storage,
    "other buffer": replace_buffer,
    "inference mode": write_in_inference_mode,
    "training": one_training_step,
    "a state": lambda module: module.load_state_dict(fastvq.EMACodebook(70, 5).state_dict()),
    "an assigned state": lambda module: module.load_state_dict(fastvq.EMACodebook(70, 5).state_dict(), assign=True),
    "not finite": lambda module: module.embeddings[::3].fill_(torch.nan),
    "a cast": lambda module: module.half(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kept_codebook_is_never_used_after_a_change(evaluated, change):
    module, check = evaluated
    CHANGES[change](module)
    check()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_keep_codebooks_of_their_own(evaluated, duplicate):
    module, check = evaluated
    assert "_kept" not in "".join(module.state_dict())
    other = duplicate(module)
    other.embeddings = torch.randn(70, 5)
    check(other)
    check()


def test_codebook_is_kept_while_nothing_is_learned(monkeypatch):
    packings = []
    pack = cpu.pack
    monkeypatch.setattr(cpu, "pack", lambda *args: packings.append(args) or pack(*args))
    module, z = fastvq.EMACodebook(70, 5).eval(), torch.randn(40, 5)
    module(z), module(z[:20])
    assert len(packings) == 1
    module.embeddings.add_(1)
    module(z), module(z)
    assert len(packings) == 2
    module.reset_cache()
    module(z)
    assert len(packings) == 3
    module.load_state_dict(module.state_dict())
    module.train().freeze_codebook = True
    module(z), module(z)
    assert len(packings) == 4
    module.freeze_codebook = False
    module(z), module(z)
    assert len(packings) == 6


def test_few_tokens_are_searched_without_keeping_anything():
    module = fastvq.EMACodebook(70, 5).eval()
    module(torch.randn(16, 5))
    assert module._kept._last is None


def test_threads_share_a_kept_codebook():
    module, batches = fastvq.EMACodebook(70, 5).eval(), torch.randn(40, 30, 5)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda z: module(z).indices, batches))
    for z, indices in zip(batches, found, strict=True):
        assert torch.equal(indices, reference.nearest_code(z, module.embeddings))


def test_compiled_evaluation_sees_every_change():
    module = fastvq.EMACodebook(70, 5).eval()
    compiled, z = torch.compile(module, fullgraph=True, backend="aot_eager"), torch.randn(30, 5)
    for _ in range(2):
        module(z)
        assert torch.equal(compiled(z).indices, reference.nearest_code(z, module.embeddings))
        module.embeddings.data.copy_(torch.randn(70, 5))


def test_off_the_cpu_the_tensor_and_its_counted_writes_decide(monkeypatch):
    # On tensors without values, which show that none is compared, and with a GPU's counters.
    monkeypatch.setattr(kept, "_counters", lambda codes: kept._Counters(0, codes._version, 0))
    prepare = kept.KeptCodebook().keeping(lambda codes, metric: object())
    codes = torch.empty(5, 2, device="meta")
    packed = prepare(codes, "dot")
    assert prepare(codes, "dot") is packed
    codes.add_(1)
    assert prepare(codes, "dot") is not packed
    packed = prepare(codes, "dot")
    assert prepare(codes, "cosine") is not packed
    packed = prepare(codes, "dot")
    other = torch.empty(5, 2, device="meta").add_(1)
    assert other._version == codes._version
    assert prepare(other, "dot") is not packed


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [True, False])
def test_codebook_on_a_gpu_is_kept_where_it_is_frozen(frozen):
    module, z = fastvq.EMACodebook(70, 5, device="cuda").eval(), torch.randn(30, 5, device="cuda")
    module.freeze_codebook = frozen
    for change in (module.embeddings.neg_, lambda: module.load_state_dict(fastvq.EMACodebook(70, 5).state_dict())):
        assert torch.equal(module(z).indices, reference.nearest_code(z, module.embeddings))
        assert (module._kept._last is not None) == frozen
        change()
    module.embeddings.data.neg_()
    module.reset_cache()
    assert torch.equal(module(z).indices, reference.nearest_code(z, module.embeddings))


@pytest.mark.gpu
def test_captured_evaluation_packs_in_every_replay():
    module, z = fastvq.EMACodebook(70, 5, device="cuda").eval(), torch.randn(30, 5, device="cuda")
    module.freeze_codebook = True
    module(z)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = module(z).indices
    module.embeddings.neg_()
    graph.replay()
    assert torch.equal(indices, reference.nearest_code(z, module.embeddings))
