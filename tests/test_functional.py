"""The public functions: shapes, masks, values that are not finite, errors."""

from types import SimpleNamespace

import pytest
import torch

import fastvq
from fastvq import reference
from fastvq.backends import triton
from fastvq.backends.choose import choose, why_not_triton


@pytest.fixture(params=["torch", "reference", "triton"])
def backend(request, kernel_device):
    if request.param == "triton" and kernel_device.type == "cuda":
        torch.set_default_device(kernel_device)
        yield "triton"
        torch.set_default_device("cpu")
    else:
        yield request.param


def test_leading_shape_is_kept(backend):
    codebook = torch.randn(20, 5)
    for shape in ((), (3,), (2, 3), (2, 1, 4)):
        x = torch.randn(*shape, 5)
        indices = fastvq.nearest_code(x, codebook, backend=backend)
        assert indices.shape == shape
        assert indices.dtype == torch.int64
        assert torch.equal(indices.reshape(-1), reference.nearest_code(x.reshape(-1, 5), codebook))


def test_views_and_strides_are_read_as_they_are(backend):
    base = torch.randn(6, 9, 8)
    codebook = torch.randn(2 * 31, 6).t().contiguous().t()[::2]
    x = base.permute(2, 1, 0)[:, ::2]
    expected = reference.nearest_code(x.reshape(-1, 6), codebook).view(8, 5)
    assert torch.equal(fastvq.nearest_code(x, codebook, backend=backend), expected)


def test_empty_input_gives_empty_results(backend):
    x, codebook = torch.randn(0, 4), torch.randn(3, 4)
    assert fastvq.nearest_code(x, codebook, backend=backend).shape == (0,)
    quantized, indices, loss = fastvq.quantize(torch.randn(2, 0, 4), codebook, backend=backend)
    assert quantized.shape == (2, 0, 4)
    assert indices.shape == (2, 0)
    assert loss == 0


def test_each_head_searches_its_own_codebook(backend):
    x, codebooks = torch.randn(3, 7, 2, 4), torch.randn(3, 11, 4)
    indices = fastvq.nearest_code(x, codebooks, backend=backend)
    for head in range(3):
        assert torch.equal(indices[head].reshape(-1), reference.nearest_code(x[head].reshape(-1, 4), codebooks[head]))
    quantized = fastvq.quantize(x, codebooks, backend=backend).quantized
    assert torch.equal(quantized, fastvq.lookup(indices, codebooks))
    assert torch.equal(quantized[2, 3, 1], codebooks[2, indices[2, 3, 1]])


def test_tokens_that_are_not_finite_have_no_code(backend):
    x, codebook = torch.randn(6, 3), torch.randn(9, 3)
    expected = reference.nearest_code(x, codebook)
    x[1, 0], x[3, 2], x[4, 1] = torch.nan, torch.inf, -torch.inf
    expected[[1, 3, 4]] = -1
    quantized, indices, loss = fastvq.quantize(x, codebook, backend=backend)
    assert torch.equal(indices, expected)
    assert quantized[[1, 3, 4]].isnan().all()
    assert torch.equal(quantized[[0, 2, 5]], codebook[expected[[0, 2, 5]]])
    kept = x[[0, 2, 5]]
    assert torch.allclose(loss, 0.25 * (kept - codebook[expected[[0, 2, 5]]]).square().mean())


def test_codes_that_are_not_finite_are_never_chosen(backend):
    x, codebook = torch.randn(50, 3), torch.randn(9, 3)
    clean = fastvq.nearest_code(x, codebook[[1, 2, 4, 5, 6, 7]], backend=backend)
    codebook[0], codebook[3, 1], codebook[8, 0] = torch.nan, torch.inf, -torch.inf
    indices = fastvq.nearest_code(x, codebook, backend=backend)
    assert torch.equal(indices, torch.tensor([1, 2, 4, 5, 6, 7])[clean])
    codebook[:] = torch.nan
    assert (fastvq.nearest_code(x, codebook, backend=backend) == -1).all()


def test_masked_tokens_take_no_part(backend):
    x, codebook = torch.randn(4, 6, 3), torch.randn(9, 3)
    mask = torch.rand(4, 6) < 0.5
    quantized, indices, loss = fastvq.quantize(x, codebook, mask=mask, backend=backend)
    unmasked = fastvq.quantize(x[mask], codebook, backend=backend)
    assert (indices[~mask] == -1).all()
    assert (quantized[~mask] == 0).all()
    assert torch.equal(indices[mask], unmasked.indices)
    assert torch.allclose(loss, unmasked.loss)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_distance_is_the_float64_value(backend, metric):
    x, codebook = torch.randn(2, 5, 7) + 100, torch.randn(30, 7) + 100
    x[0, 0] = torch.nan
    indices, distance = fastvq.nearest_code(x, codebook, metric=metric, return_distance=True, backend=backend)
    assert distance.dtype == torch.float32
    assert distance[0, 0].isnan()
    tokens, codes = x.double().flatten(0, 1)[1:], codebook.double()[indices.flatten()[1:]]
    expected = {
        "euclidean": (tokens - codes).square().sum(1),
        "dot": (tokens * codes).sum(1),
        "cosine": torch.nn.functional.cosine_similarity(tokens, codes, dim=1),
    }[metric]
    # Float64 sums in another order, rounded to float32 once: one unit in the last place.
    assert torch.allclose(distance.flatten()[1:].double(), expected, rtol=2.0**-23, atol=0)


def test_lookup_gives_zero_for_minus_one_and_is_differentiable():
    codebook = torch.randn(5, 3, requires_grad=True)
    rows = fastvq.lookup(torch.tensor([[4, -1], [0, 4]]), codebook)
    assert torch.equal(rows[0, 1], torch.zeros(3))
    assert torch.equal(rows[1, 1], codebook[4])
    rows.sum().backward()
    assert torch.equal(codebook.grad[:, 0], torch.tensor([1.0, 0, 0, 0, 2]))


def test_inputs_are_left_alone():
    x, codebook = torch.randn(40, 3), torch.randn(20, 3)
    copies = x.clone(), codebook.clone()
    fastvq.quantize(x, codebook)
    assert torch.equal(x, copies[0])
    assert torch.equal(codebook, copies[1])


X, E = torch.randn(5, 4), torch.randn(7, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastvq.nearest_code(X, torch.randn(7, 3)), ValueError, r"codebook must be \[n_codes, 4\].*\[7, 3\]"),
        (lambda: fastvq.nearest_code(X.long(), E), TypeError, r"x must be a floating-point tensor.*int64"),
        (lambda: fastvq.nearest_code(X, E.int()), TypeError, r"codebook must be a floating-point tensor.*int32"),
        (lambda: fastvq.nearest_code(X.tolist(), E), TypeError, r"x must be a floating-point tensor, got list"),
        (lambda: fastvq.nearest_code(X, E[:0]), ValueError, r"codebook must hold at least one code, got \[0, 4\]"),
        (lambda: fastvq.nearest_code(X, E[0]), ValueError, r"codebook must be \[n_codes, D\].*got \[4\]"),
        (lambda: fastvq.nearest_code(X, E[None]), ValueError, r"x must be \[1, ..., 4\].*got \[5, 4\]"),
        (lambda: fastvq.nearest_code(torch.randn(()), E), ValueError, r"x must have a last dimension"),
        (lambda: fastvq.nearest_code(X[:, :0], E[:, :0]), ValueError, r"x must have a last dimension"),
        (lambda: fastvq.nearest_code(X, E.to("meta")), ValueError, r"codebook must be on cpu.*got meta"),
        (lambda: fastvq.nearest_code(X, E, metric="l1"), ValueError, r"metric must be one of 'euclidean'.*got 'l1'"),
        (lambda: fastvq.nearest_code(X, E, backend="jax"), ValueError, r"backend must be one of 'auto'.*got 'jax'"),
        (lambda: fastvq.nearest_code(X, E, mask=X[:, 0]), TypeError, r"mask must be a boolean tensor.*float32"),
        (lambda: fastvq.nearest_code(X, E, mask=X > 0), ValueError, r"mask must be \[5\].*got \[5, 4\]"),
        (lambda: fastvq.code_statistics(X, torch.zeros(5), 7), TypeError, r"indices must be an int64.*float32"),
        (lambda: fastvq.code_statistics(X, torch.arange(4), 7), ValueError, r"indices must be \[5\].*got \[4\]"),
        (lambda: fastvq.code_statistics(X, torch.arange(5), 0), ValueError, r"n_codes must be at least 1, got 0"),
        (
            lambda: fastvq.code_statistics(X[0], torch.tensor(1), 7, heads=True),
            ValueError,
            r"x must be \[heads, ..., D\]",
        ),
        (lambda: fastvq.lookup(X, E), TypeError, r"indices must be an int64 or int32 tensor.*float32"),
        (lambda: fastvq.lookup(torch.arange(3), E[0]), ValueError, r"codebook must be \[n_codes, D\]"),
        (lambda: fastvq.lookup(torch.arange(3), E[None]), ValueError, r"indices must be \[1, ...\].*got \[3\]"),
        (lambda: fastvq.code_statistics(X, torch.arange(5), 7.0), TypeError, r"n_codes must be an integer, got float"),
        (lambda: fastvq.code_statistics(X, torch.arange(5), 4), ValueError, r"indices must be in \[-1, 4\), got 4"),
        (
            lambda: fastvq.code_statistics(X, torch.arange(5) - 2, 4),
            ValueError,
            r"indices must be in \[-1, 4\), got -2",
        ),
        (
            lambda: fastvq.code_statistics(X.view(2, 5, 2), torch.arange(10).view(2, 5), 9, heads=True),
            ValueError,
            r"indices must be in \[-1, 9\), got 9",
        ),
        (lambda: fastvq.lookup(torch.arange(8), E), ValueError, r"indices must be in \[-1, 7\), got 7"),
        (lambda: fastvq.lookup(torch.tensor([-2]), E), ValueError, r"indices must be in \[-1, 7\), got -2"),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: tensors are on the CPU"):
        fastvq.nearest_code(X, E, backend="triton")


@pytest.mark.parametrize(
    ("hip", "chip", "capability", "words"),
    [
        (None, "", (7, 5), "compute capability 8.0, cuda has 7.5"),
        ("6.4", "gfx90a:sramecc+:xnack-", (9, 0), "made for gfx942 and gfx950, this is gfx90a"),
    ],
)
def test_chips_that_the_kernels_are_not_made_for_take_pytorch(monkeypatch, hip, chip, capability, words):
    monkeypatch.setattr(triton, "_obstacle_of_chip", triton._obstacle_of_chip.__wrapped__)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=chip))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose(torch.device("cuda")).name == "torch"
    assert words in why_not_triton(torch.device("cuda"))
    with pytest.raises(ValueError, match=words):
        choose(torch.device("cuda"), "triton")


@pytest.mark.parametrize(("hip", "chip"), [(None, ""), ("6.4", "gfx942:sramecc+:xnack-")])
def test_chips_that_the_kernels_are_made_for_take_them(monkeypatch, hip, chip):
    monkeypatch.setattr(triton, "_obstacle_of_chip", triton._obstacle_of_chip.__wrapped__)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=chip))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose(torch.device("cuda")).name == "triton"
