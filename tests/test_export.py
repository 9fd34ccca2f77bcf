"""Programs that leave Python: saved exports, AOTInductor packages, TorchScript traces."""

import io
import shutil

import pytest
import torch
from torch import nn

import fastvq
from fastvq import functional

SIZE = torch.export.Dim("n", min=2, max=4096)


class Model(nn.Module):
    """A codebook inside of a larger model, and a result inside of a container."""

    def __init__(self, **options):
        super().__init__()
        self.layer, self.codebook = nn.Linear(8, 8), fastvq.EMACodebook(300, 8, **options)

    def forward(self, x):
        result = self.codebook(self.layer(x))
        return result, [2 * result.quantized]


class Quantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(300, 8))

    def forward(self, x):
        return fastvq.quantize(x, self.codes)


class Search(Quantizer):
    def forward(self, x):
        return fastvq.nearest_code(x, self.codes, return_distance=True)


MODULES = {
    "codebook": lambda: fastvq.EMACodebook(300, 8),
    "cosine": lambda: fastvq.EMACodebook(300, 8, metric="cosine"),
    "model": Model,
    "quantize": Quantizer,
    "search": Search,
}


@pytest.fixture(params=MODULES)
def module(request):
    return MODULES[request.param]().eval()


def through_a_file(save, load, program):
    file = io.BytesIO()
    save(program, file)
    file.seek(0)
    return load(file)


def exported(module, grad=True):
    with torch.set_grad_enabled(grad):
        return torch.export.export(module, (torch.randn(40, 8),), dynamic_shapes=({0: SIZE},))


@pytest.mark.parametrize("grad", [True, False])
def test_a_saved_program_equals_its_module(module, grad):
    loaded = through_a_file(torch.export.save, torch.export.load, exported(module, grad)).module()
    x = torch.randn(77, 8)
    x[3] = torch.nan
    actual, expected = loaded(x), module(x)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PyTorch's own
@pytest.mark.skipif(not shutil.which("c++"), reason="AOTInductor needs a C++ compiler")
def test_a_package_of_aotinductor_equals_its_module(tmp_path):
    module = fastvq.EMACodebook(300, 8).eval()
    path = torch._inductor.aoti_compile_and_package(exported(module, False), package_path=str(tmp_path / "m.pt2"))
    x = torch.randn(77, 8)
    actual, expected = torch._inductor.aoti_load_package(path)(x), module(x)
    assert type(actual) is fastvq.Quantized
    assert torch.equal(actual.indices, expected.indices)
    assert torch.equal(actual.quantized, expected.quantized)
    torch.testing.assert_close(actual.loss, expected.loss)  # sums in another order


def traced(module, *inputs, grad=True):
    with torch.set_grad_enabled(grad):
        return through_a_file(torch.jit.save, torch.jit.load, torch.jit.trace(module, inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
class TestTrace:
    @pytest.mark.parametrize("grad", [True, False])
    def test_a_saved_trace_equals_its_module(self, module, grad):
        x = torch.randn(77, 8)
        x[3] = torch.nan
        actual, expected = traced(module, torch.randn(40, 8), grad=grad)(x), module(x)
        # A trace knows tuples, but no names.
        for a, b in zip(*map(torch.utils._pytree.tree_leaves, (actual, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("channel_first", [True, False])
    def test_a_trace_knows_masks_and_layouts(self, channel_first):
        def inputs(n):
            z = torch.randn(n, 7, 8)
            return z.transpose(1, 2) if channel_first else z, torch.rand(n, 7) < 0.7

        module = fastvq.EMACodebook(300, 8, channel_first=channel_first).eval()
        z, mask = inputs(11)
        for actual, expected in zip(traced(module, *inputs(5))(z, mask), module(z, mask), strict=True):
            assert torch.equal(actual, expected)

    def test_gradients_pass_through_a_trace(self):
        model, x = Model().eval(), torch.randn(20, 8)
        gradients = []
        for step in (model, traced(model, torch.randn(20, 8))):
            leaf = x.clone().requires_grad_()
            result, double = step(leaf)
            (double[0].pow(2).sum() + result[2]).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)
        assert gradients[0].any()

    def test_a_trace_of_distances_holds_for_any_number_of_tokens(self, monkeypatch):
        monkeypatch.setattr(functional, "_BLOCK_VALUES", 80)  # ten tokens to a block
        module, x = Search(), torch.randn(77, 8)
        for actual, expected in zip(traced(module, torch.randn(40, 8))(x), module(x), strict=True):
            assert torch.equal(actual, expected)
