"""Operators under opcheck, torch.compile and export."""

import shutil

import pytest
import torch

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
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = fastvq.EMACodebook(24, 8).eval()
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for n in (30, 31, 64, 500):
        assert torch.equal(compiled(torch.randn(n, 8)).indices >= 0, torch.ones(n, dtype=torch.bool))
    assert counter.frame_count == 1


def test_module_exports_in_evaluation():
    module = fastvq.EMACodebook(24, 8).eval()
    z = torch.randn(4, 30, 8)
    exported = torch.export.export(module, (z,))
    for a, b in zip(exported.module()(z), module(z), strict=True):
        assert torch.equal(a, b)


def test_meta_tensors_have_the_right_shapes():
    quantized, indices, loss = fastvq.quantize(torch.empty(3, 5, 4, device="meta"), torch.empty(7, 4, device="meta"))
    assert quantized.shape == (3, 5, 4)
    assert indices.shape == (3, 5)
    assert indices.dtype == torch.int64
    assert loss.shape == ()
