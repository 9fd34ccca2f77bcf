"""The state of a codebook through checkpoints, casts, copies, devices and crashes."""

import copy
import pickle
import signal
from pathlib import Path

import pytest
import torch
from checkout import run
from states import assert_equal_states

import fastvq
from fastvq import reference


def test_a_loaded_state_is_never_initialised_again():
    published = reference.EMACodebook(12, 4)
    published(torch.randn(30, 4))
    module = fastvq.EMACodebook(12, 4)
    module.load_state_dict(published.state_dict())
    module.train()
    assert torch.equal(module(published.embeddings).quantized, published.embeddings)


def test_state_dict_keys_are_the_published_ones():
    ours, theirs = fastvq.EMACodebook(12, 4), reference.EMACodebook(12, 4)
    assert ours.state_dict().keys() == theirs.state_dict().keys() == {"embeddings", "N", "z_avg"}
    theirs.load_state_dict(ours.state_dict())
    ours(torch.randn(30, 4))
    assert ours.state_dict().keys() == {"embeddings", "N", "z_avg"}


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
        tokens = torch.tensor([[-1.0, 0], [1, 0]]).repeat(32, 1).to(dtype)
        module.load_state_dict({"embeddings": tokens[:2], "N": torch.ones(2), "z_avg": tokens[:2]})
        for _ in range(601):
            quantized, _, _ = module(tokens)
        assert quantized.dtype == dtype
        counts.append(module.N)
    assert torch.equal(*counts)
    # N = 32 - 31 γ^601 per code, from N = 1 and 32 tokens a step; 601 float32 steps of relative error 2^-23.
    assert torch.allclose(counts[0], torch.tensor(32 - 31 * 0.99**601), rtol=601 * 2.0**-23)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_continue_as_the_original(duplicate):
    module = fastvq.EMACodebook(10, 4)
    module(torch.randn(30, 4))
    other = duplicate(module)
    batch = torch.randn(30, 4)
    assert torch.equal(module(batch).indices, other(batch).indices)
    assert torch.equal(module.embeddings, other.embeddings)


def trained(**options):
    module = fastvq.EMACodebook(12, 4, **options)
    for _ in range(3):
        module(torch.randn(30, 4))
    return module


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_lookups_fit_the_model_that_was_cast(dtype):
    module = fastvq.EMACodebook(12, 4).to(dtype).to("cpu").share_memory()
    weights = torch.rand(3, 12, dtype=dtype)
    assert module.dictionary_lookup(torch.tensor([1])).dtype == dtype
    mixtures = module.soft_codebook_lookup(weights)
    assert mixtures.dtype == dtype
    # Twelve float32 products, and one rounding to the dtype.
    expected = weights.double() @ module.embeddings.double()
    assert torch.allclose(mixtures.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert module.float().dictionary_lookup(torch.tensor([1])).dtype == torch.float32


def test_a_refused_checkpoint_leaves_the_codebook_alone():
    module = fastvq.EMACodebook(4, 2)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict({"embeddings": torch.randn(3, 2)}, strict=False)
    assert module._need_init
    assert_equal_states(module, before)


def test_averages_that_a_checkpoint_lacks_are_those_of_its_codes():
    module = fastvq.EMACodebook(4, 2)
    codes = torch.full((4, 2), 9.0)
    module.load_state_dict({"embeddings": codes, "N": torch.full((4,), 5.0)}, strict=False)
    module(codes)
    assert torch.allclose(module.embeddings, codes)


def test_wrong_shapes_are_named():
    model = torch.nn.ModuleDict({"codebook": fastvq.EMACodebook(13, 4)})
    state = {f"codebook.{name}": value for name, value in trained().state_dict().items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for codebook\.embeddings(?s:.)*codebook\.N(?s:.)*z_avg"):
        model.load_state_dict(state)


@pytest.mark.parametrize("prefix", ["", "codebook.", "vqvae.codebook."])
def test_published_checkpoints_load_under_any_prefix(prefix):
    published = reference.EMACodebook(12, 4)
    published(torch.randn(30, 4))
    model = module = fastvq.EMACodebook(12, 4)
    for name in reversed(prefix.split(".")[:-1]):
        model = torch.nn.ModuleDict({name: model})
    model.load_state_dict({prefix + name: value for name, value in published.state_dict().items()})
    assert not module._need_init
    assert_equal_states(module, published)


def test_state_saved_before_the_first_batch_is_initialised_by_it():
    module, batch = fastvq.EMACodebook(12, 4), torch.randn(30, 4)
    module.load_state_dict(fastvq.EMACodebook(12, 4).state_dict())
    before = module.embeddings.clone()
    codes = module(batch).quantized
    assert not torch.equal(module.embeddings, before)
    assert (codes[:, None] == batch).all(2).any(1).all()


def test_codes_that_were_learned_elsewhere_are_kept():
    codes = torch.randn(12, 4)
    module = fastvq.EMACodebook(12, 4)
    module.load_state_dict({"embeddings": codes}, strict=False)
    quantized, indices, _ = module(torch.randn(30, 4))
    assert torch.equal(quantized, codes[indices])
    by_hand = fastvq.EMACodebook(12, 4)
    by_hand.embeddings.copy_(codes)
    by_hand.z_avg.copy_(codes)
    by_hand.N.fill_(1)
    quantized, indices, _ = by_hand(torch.randn(30, 4))
    assert torch.equal(quantized, codes[indices])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_of_other_precision_become_float32(assign, dtype):
    state = {name: value.to(dtype) for name, value in trained().state_dict().items()}
    module = fastvq.EMACodebook(12, 4)
    module.load_state_dict(state, assign=assign)
    for name, value in module.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name].float())
    module(torch.randn(30, 4))


def test_built_on_meta_and_loaded_it_is_the_same_module():
    module = trained()
    with torch.device("meta"):
        other = fastvq.EMACodebook(12, 4)
    assert other(torch.empty(3, 5, 4, device="meta")).indices.shape == (3, 5)
    other.to_empty(device="cpu")
    assert not other.N.any()
    other.load_state_dict(module.state_dict())
    assert_equal_states(other, module)
    batch = torch.randn(30, 4)
    assert torch.equal(other(batch).quantized, module(batch).quantized)
    assert_equal_states(other, module)


def test_built_on_meta_and_not_loaded_it_is_initialised():
    module = fastvq.EMACodebook(12, 4, device="meta").to_empty(device="cpu")
    assert module(torch.randn(30, 4)).quantized.isfinite().all()
    assert module.embeddings.isfinite().all()
    assert module.N.sum() > 12


def test_modules_pickled_by_earlier_versions_get_the_defaults():
    module = trained()
    published = {"n_codes", "embedding_dim", "no_random_restart", "restart_thres", "ema_decay", "freeze_codebook"}
    old = {name: value for name, value in module.__dict__.items() if name in published}
    state = {**torch.nn.Module().__dict__, "_buffers": module._buffers, "_need_init": False, **old}
    other = fastvq.EMACodebook.__new__(fastvq.EMACodebook)
    other.__setstate__(copy.deepcopy(state))
    assert other.__dict__.keys() == module.__dict__.keys()
    batch = torch.randn(30, 4)
    for mode in (True, False):
        assert torch.equal(other.train(mode)(batch).quantized, module.train(mode)(batch).quantized)
    assert_equal_states(other, module)


def test_evaluation_of_every_option_exports():
    for options in ({}, {"metric": "cosine"}, {"channel_first": True}):
        module = fastvq.EMACodebook(24, 8, **options).eval()
        z = torch.randn(4, 8, 8)
        for a, b in zip(torch.export.export(module, (z,)).module()(z), module(z), strict=True):
            assert torch.equal(a, b)


CRASH = """
import os, signal, sys
import torch, fastvq
torch.set_num_threads(1)
folder, crashes = sys.argv[1], sys.argv[2] == "crash"
options = dict(no_random_restart=False, restart_resets_statistics=True)
module, first = fastvq.EMACodebook(12, 4, **options), 0
torch.manual_seed(0)
if os.path.exists(f"{folder}/saved.pt"):
    saved = torch.load(f"{folder}/saved.pt")
    module.load_state_dict(saved["model"])
    torch.set_rng_state(saved["random"])
    first = 50
for step in range(first, 100):
    if step == 50 and crashes:
        torch.save({"model": module.state_dict(), "random": torch.get_rng_state()}, f"{folder}/saved.pt")
    if step == 53 and crashes:
        os.kill(os.getpid(), signal.SIGKILL)
    module(torch.randn(30, 4))
torch.save(module.state_dict(), f"{folder}/result.pt")
"""


def test_a_killed_training_resumes_bit_for_bit(tmp_path):
    states = []
    for attempts in (("whole",), ("crash", "resume")):
        folder = tmp_path / attempts[0]
        folder.mkdir()
        for attempt in attempts:
            done = run("-c", CRASH, folder, attempt, timeout=500)
            assert done.returncode == (-signal.SIGKILL if attempt == "crash" else 0)
        states.append(torch.load(folder / "result.pt"))
    assert_equal_states(states[0], states[1])


@pytest.mark.parametrize("file", ["before_wings.pt", "before_wings.pickle"])
def test_modules_pickled_before_their_files_moved_load_and_go_on(file):
    path = Path(__file__).parent / "data" / file
    # 6 codes in 3 dimensions, cosine, restarts, one training step, and 9 tokens collected since.
    module = torch.load(path, weights_only=False) if file.endswith(".pt") else pickle.loads(path.read_bytes())
    assert type(module) is fastvq.EMACodebook
    assert (module.metric, module.no_random_restart, module._need_init) == ("cosine", False, False)
    assert module._pending.counts.sum() == 9
    assert not hasattr(module, "_kept")
    z = torch.randn(5, 3)
    assert torch.equal(module.eval()(z).indices, reference.nearest_code(z, module.embeddings, "cosine"))
    before = module.N.clone()
    module.train()(z)
    torch.testing.assert_close(module.N.sum(), 0.99 * before.sum() + 0.01 * (9 + 5))
