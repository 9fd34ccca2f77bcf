"""A cached codebook is never used after the codes have changed."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastvq
from fastvq import reference
from fastvq.backends import codebook_cache
from fastvq.cpu import search, tuning


@pytest.fixture(autouse=True)
def small_problems_pack_as_large_ones_do(monkeypatch):
    for name in ("FEW_CODES", "FEW_SCORES", "FEW_TOKENS"):
        monkeypatch.setattr(tuning, name, 0)


@pytest.fixture(params=["torch", "triton"])
def evaluated(request, kernel_device):
    """A module in evaluation with a cached codebook, and a check of its indices on fresh tokens."""
    if request.param == "triton" and kernel_device.type == "cuda":
        pytest.skip("a GPU caches nothing unless the codebook is frozen")
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
def test_cached_codebook_is_never_used_after_a_change(evaluated, change):
    module, check = evaluated
    CHANGES[change](module)
    check()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_caches_of_their_own(evaluated, duplicate):
    module, check = evaluated
    assert "_codebook_cache" not in "".join(module.state_dict())
    other = duplicate(module)
    other.embeddings = torch.randn(70, 5)
    check(other)
    check()


def test_codebook_is_cached_while_nothing_is_learned(monkeypatch):
    packings = []
    pack = search.pack

    def count(codes, frame, dtype, in_bfloat16):
        if len(codes) == 70 and dtype == torch.float32:  # not what is searched again
            packings.append(codes)
        return pack(codes, frame, dtype, in_bfloat16)

    monkeypatch.setattr(search, "pack", count)
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


def test_small_problems_are_searched_without_packing(monkeypatch):
    monkeypatch.setattr(tuning, "FEW_SCORES", 70 * 40)
    module = fastvq.EMACodebook(70, 5).eval()
    module(torch.randn(40, 5))
    assert set(vars(module._codebook_cache._last.packed)) & {"plain", "packed"} == {"plain"}
    module(torch.randn(41, 5))
    assert "packed" in vars(module._codebook_cache._last.packed)


def test_threads_share_a_cached_codebook():
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
    monkeypatch.setattr(codebook_cache, "_counters", lambda codes: codebook_cache._Counters(0, codes._version, 0))
    prepare = codebook_cache.CodebookCache().keeping(lambda codes, metric: object())
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
def test_codebook_on_a_gpu_is_cached_where_it_is_frozen(frozen):
    module, z = fastvq.EMACodebook(70, 5, device="cuda").eval(), torch.randn(30, 5, device="cuda")
    module.freeze_codebook = frozen
    for change in (module.embeddings.neg_, lambda: module.load_state_dict(fastvq.EMACodebook(70, 5).state_dict())):
        assert torch.equal(module(z).indices, reference.nearest_code(z, module.embeddings))
        assert (module._codebook_cache._last is not None) == frozen
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
