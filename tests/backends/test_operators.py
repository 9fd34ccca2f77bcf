"""Operators under opcheck, torch.compile and export."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastvq


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_search_operator_passes_opcheck(metric):
    for x, codebook in ((torch.randn(10, 4), torch.randn(5, 4)), (torch.randn(2, 10, 4), torch.randn(2, 5, 4))):
        torch.library.opcheck(torch.ops.fastvq.nearest_code, (x, codebook, metric, "auto"))


@pytest.mark.parametrize("deterministic", [None, True])
def test_statistics_operator_passes_opcheck(deterministic):
    args = (torch.randn(10, 4), torch.randint(-1, 5, (10,)), 5, deterministic)
    torch.library.opcheck(torch.ops.fastvq.code_statistics, args)


def run(module, step, batches):
    torch.manual_seed(3)
    results = []
    for z in batches:
        leaf = z.clone().requires_grad_()
        quantized, indices, loss = step(leaf)
        (quantized.pow(2).sum() + loss).backward()
        results.append(
            (quantized.detach(), indices, loss.detach(), leaf.grad, module.embeddings.clone(), module.N.clone())
        )
    return results


COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor", marks=pytest.mark.skipif(not shutil.which("c++"), reason="TorchInductor needs a C++ compiler")
    ),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_module_equals_eager_in_one_graph(compiler, training):
    torch._dynamo.reset()
    batches = [torch.randn(n, 8) for n in (70, 70, 50)]
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = fastvq.EMACodebook(24, 8, no_random_restart=False).train(training)
        step = torch.compile(module, fullgraph=True, backend=compiler) if compiled else module
        results.append(run(module, step, batches))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager[1], compiled[1])
        for a, b in zip(eager, compiled, strict=True):
            # The compiler may fuse a multiplication and an addition, so sums differ in the last place.
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_training_returns_the_codes_before_the_update(compiler, metric, channel_first):
    torch._dynamo.reset()
    module = fastvq.EMACodebook(20, 6, ema_decay=0.5, metric=metric, channel_first=channel_first)
    shape = (4, 6, 25) if channel_first else (4, 25, 6)
    module(torch.randn(shape))

    def step(z):
        quantized, indices, _ = module(z)
        return 2 * quantized, indices

    before = module.embeddings.clone()
    doubled, indices = torch.compile(step, fullgraph=True, backend=compiler)(torch.randn(shape))
    assert not torch.equal(module.embeddings, before)
    assert torch.equal(doubled.mT if channel_first else doubled, 2 * before[indices])


def test_functions_compile_in_one_graph():
    def step(x, codebook, mask):
        indices, distance = fastvq.nearest_code(x, codebook, mask=mask, return_distance=True, metric="cosine")
        statistics = [fastvq.code_statistics(x, indices, len(codebook), heads=heads) for heads in (False, True)]
        return fastvq.quantize(x, codebook, mask=mask), distance, statistics

    args = torch.randn(6, 5, 3), torch.randn(11, 3), torch.rand(6, 5) < 0.7
    expected = step(*args)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_number_of_tokens_may_change_without_recompiling_for_each():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = fastvq.EMACodebook(24, 8).eval()
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for n in (30, 31, 64, 500):
        assert torch.equal(compiled(torch.randn(n, 8)).indices >= 0, torch.ones(n, dtype=torch.bool))
    assert counter.frame_count == 1


OPTIONS = {
    "restart": {
        "no_random_restart": False,
        "restart_resets_statistics": True,
        "restart_threshold_relative": 0.5,
    },
    "cosine": {"metric": "cosine"},
    "channel first": {"channel_first": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_trains_in_one_graph_that_equals_eager(options):
    torch._dynamo.reset()
    batches = [torch.randn(3, 8, n) for n in (30, 20)]
    if "channel_first" not in options:
        batches = [z.transpose(1, 2) for z in batches]
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = fastvq.EMACodebook(24, 8, **options)
        step = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        outputs = []
        for z in batches:
            mask = torch.rand(3, z[:, 0, :].shape[1] if "channel_first" in options else z.shape[1]) < 0.8
            with module.accumulate():
                outputs.append(step(z, mask))
            outputs.append(step(z, mask))
        results.append([*outputs, module.state_dict().values()])
    for eager, compiled in zip(*results, strict=True):
        for a, b in zip(eager, compiled, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_training_compiles_for_the_first_batch_and_for_fewer_tokens_than_codes_only():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fastvq.EMACodebook(24, 8, no_random_restart=False), fullgraph=True, backend=counter)
    counts = []
    for n in (30, 31, 64, 500, 25, 20, 7, 9, 100):
        compiled(torch.randn(n, 8))
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_initialisation_by_kmeans_asks_to_be_called_before_compilation():
    module = fastvq.EMACodebook(24, 8, init="kmeans")
    compiled, z = torch.compile(module, fullgraph=True, backend="aot_eager"), torch.randn(60, 8)
    with pytest.raises(Exception, match=r"call initialize\(batch\) before the first step"):
        compiled(z)
    module.initialize(z)
    assert compiled(z).loss < module.embeddings.var()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
def test_a_traced_module_answers_for_other_tokens():
    module = fastvq.EMACodebook(300, 16).eval()
    traced = torch.jit.trace(module, torch.randn(40, 16), check_trace=False)
    z = torch.randn(40, 16)
    z[:20] = (module.embeddings[:20] + module.embeddings[20:40]) / 2
    z[20] = torch.nan
    assert torch.equal(traced(z)[1], module(z).indices)


def test_meta_tensors_have_the_right_shapes():
    quantized, indices, loss = fastvq.quantize(torch.empty(3, 5, 4, device="meta"), torch.empty(7, 4, device="meta"))
    assert quantized.shape == (3, 5, 4)
    assert indices.shape == (3, 5)
    assert indices.dtype == torch.int64
    assert loss.shape == ()
