"""The portable form: ONNX files that give the exact index, ties, masks, NaN, and where it ends."""

import re
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkout import ROOT
from torch import nn

import fastvq
from fastvq import reference
from fastvq.backends.operators import backend_for

SIZE = torch.export.Dim("n", min=2, max=4096)


class Search(nn.Module):
    """The functions with a codebook of their own."""

    def __init__(self, metric, *heads):
        super().__init__()
        self.metric = metric
        self.register_buffer("codes", torch.randn(*heads, 200, 8))

    def forward(self, x, mask):
        indices, distances = fastvq.nearest_code(x, self.codes, metric=self.metric, mask=mask, return_distance=True)
        if self.metric != "euclidean":
            return indices, distances
        return indices, distances, *fastvq.quantize(x, self.codes, mask=mask)


class Model(nn.Module):
    """A codebook between two layers."""

    def __init__(self, **options):
        super().__init__()
        self.before, self.codebook = nn.Conv1d(5, 8, 1), fastvq.EMACodebook(200, 8, channel_first=True, **options)
        self.after = nn.Conv1d(8, 5, 1)

    def forward(self, x, mask):
        quantized, indices, loss = self.codebook(self.before(x), mask)
        return indices, self.after(quantized), loss


# A module, and the shape of its input and of its mask, with n tokens per row.
CASES = {
    "euclidean": (lambda: Search("euclidean"), lambda n: ((n, 8), (n,))),
    "cosine": (lambda: Search("cosine"), lambda n: ((n, 8), (n,))),
    "dot": (lambda: Search("dot"), lambda n: ((n, 8), (n,))),
    "heads": (lambda: Search("euclidean", 3), lambda n: ((3, n, 8), (3, n))),
    "model": (Model, lambda n: ((2, 5, n), (2, n))),
    "cosine model": (lambda: Model(metric="cosine"), lambda n: ((2, 5, n), (2, n))),
}


def inputs(shapes):
    x, mask = torch.randn(shapes[0]), torch.rand(shapes[1]) < 0.8
    x.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return x, mask


def export(module, shapes, file, dynamo):
    """The axis of tokens, 40 in the example, may have any size."""
    example = inputs(shapes(40))
    axes = [{tensor.shape.index(40): SIZE if dynamo else "n"} for tensor in example]
    if dynamo:
        torch.onnx.export(module, example, file, dynamo=True, dynamic_shapes=tuple(axes), verbose=False)
    else:
        names = {"input_names": ["x", "mask"], "dynamic_axes": dict(zip(("x", "mask"), axes, strict=True))}
        torch.onnx.export(module, example, file, dynamo=False, **names)


def types(file):
    """The types of constants, and those that values are cast to."""
    graph = onnx.load(file).graph
    cast = {attribute.i for node in graph.node for attribute in node.attribute if attribute.name == "to"}
    return cast | {constant.data_type for constant in graph.initializer}


PYTORCH_WARNS = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@PYTORCH_WARNS
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
@pytest.mark.parametrize("case", CASES)
def test_onnx_file_gives_the_exact_indices(case, dynamo, tmp_path):
    make, shapes = CASES[case]
    module, file = make().eval(), str(tmp_path / "model.onnx")
    with fastvq.portable():
        export(module, shapes, file, dynamo)
    assert onnx.TensorProto.DOUBLE not in types(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    given = inputs(shapes(77))
    feed = {slot.name: tensor.numpy() for slot, tensor in zip(session.get_inputs(), given, strict=True)}
    with torch.no_grad():
        expected = module(*given)
    indices, *others = (torch.from_numpy(np.asarray(output)) for output in session.run(None, feed))
    assert torch.equal(indices, expected[0])
    assert (indices == -1).sum() > (~given[1]).sum()
    for actual, wanted in zip(others, expected[1:], strict=True):
        torch.testing.assert_close(actual, wanted, equal_nan=True)


@PYTORCH_WARNS
def test_the_example_of_the_documentation_writes_both_files(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert {file.name for file in tmp_path.iterdir()} >= {"exact.pt2", "portable.onnx"}


def portable_search(x, codebook, metric="euclidean", **options):
    with fastvq.portable():
        return fastvq.nearest_code(x, codebook, metric=metric, **options)


def scores(x, codebook, metric):
    columns = codebook.double().t().contiguous()[:, None, :]
    return reference.pair_score(x.double().t().contiguous()[:, :, None], columns, metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_indices_are_exact_where_the_second_code_is_further_than_rounding(metric, dtype):
    x, codebook = torch.randn(150, 16).to(dtype), torch.randn(100, 16).to(dtype)
    first, second = scores(x, codebook, metric).topk(2, 1).values.unbind(1)
    # Sums of 16 products of lengths below 10, each rounded three times, twice for a comparison.
    clear = first - second > 2 * (16 + 3) * 2.0**-24 * 100
    assert clear.sum() > 140
    exact = fastvq.nearest_code(x, codebook, metric=metric)
    assert torch.equal(portable_search(x, codebook, metric)[clear], exact[clear])


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_an_offset_of_all_codes_does_not_enter_the_rounding(offset):
    # Spaced by 1/8, so that tokens and codes are exact beside the offset, with every distance that float32 can hold.
    x, codebook = (torch.randint(-16, 17, (n, 6)) / 8 + offset for n in (400, 100))
    assert torch.equal(portable_search(x, codebook), fastvq.nearest_code(x, codebook))


def test_long_codes_do_not_enter_the_rounding_of_the_others():
    x, codebook = torch.randn(150, 32), torch.randn(256, 32)
    codebook[64:] *= 1e5  # three quarters
    first, second = scores(x, codebook, "euclidean").topk(2, 1).values.unbind(1)
    clear = first - second > 1e-3
    assert clear.sum() > 140
    assert torch.equal(portable_search(x, codebook)[clear], fastvq.nearest_code(x, codebook)[clear])


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("n_codes", [5, 64, 1000])
def test_the_lowest_of_equal_codes_wins(metric, n_codes):
    codebook = torch.randn(n_codes, 7).repeat(3, 1)
    x = torch.randn(300, 7)
    found = portable_search(x, codebook, metric)
    assert (found < n_codes).all()
    codebook = torch.zeros(n_codes, 7)
    assert (portable_search(x, codebook, metric) == 0).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("broken", [1, 40, 64])
def test_what_is_not_finite_is_never_chosen_and_chooses_nothing(metric, broken):
    x, codebook = torch.randn(50, 7), torch.randn(64, 7)
    x[:3, 2] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for code in range(broken):
        codebook[code, code % 7] = (torch.nan, torch.inf, -torch.inf)[code % 3]
    mask = torch.arange(50) < 45
    expected = fastvq.nearest_code(x, codebook, metric=metric, mask=mask)
    assert torch.equal(portable_search(x, codebook, metric, mask=mask), expected)
    assert (expected == -1).sum() == (50 if broken == 64 else 8)


def test_training_inside_is_refused():
    module = fastvq.EMACodebook(20, 4)
    module(torch.randn(30, 4))
    with fastvq.portable(), pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
        module(torch.randn(30, 4))


def backend():
    return backend_for(torch.zeros(1, 1), "auto").name


def test_it_ends_with_the_block_and_holds_in_its_thread_only():
    names = {}

    def elsewhere():
        names["elsewhere"] = backend()

    with fastvq.portable():
        with fastvq.portable():
            names["inside"] = backend()
        names["still inside"] = backend()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    names["outside"] = backend()
    assert names == {"inside": "portable", "still inside": "portable", "elsewhere": "torch", "outside": "torch"}


def test_what_is_compiled_inside_stays_exact():
    torch._dynamo.reset()
    operators = []

    def note(graph, example):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(fastvq.nearest_code, fullgraph=True, backend=note)
    with fastvq.portable():
        compiled(torch.randn(5, 3), torch.randn(4, 3))
    assert any("fastvq.nearest_code" in operator for operator in operators)
    assert not any("argmax" in operator for operator in operators)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_has_no_operator_of_its_own(strict):
    module = Search("euclidean")
    with fastvq.portable():
        program = torch.export.export(module, inputs(((40, 8), (40,))), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.argmax.default" in targets
    assert {target.partition(".")[0] for target in targets} <= {"aten", "<built-in function getitem>"}
