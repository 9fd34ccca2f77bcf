"""Float32 products by either library, against float64."""

import itertools

import pytest
import torch
from multiplying import WAYS, multiply_by

from fastvq.cpu import matmul, tuning
from fastvq.cpu.bounds import error_constant


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch is built without oneDNN")
    multiply_by(monkeypatch, request.param)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # of which each gets a part


def views(n, dim):
    """The same sizes in other strides."""
    return (
        torch.randn(n, dim),
        torch.randn(dim, n).t(),
        torch.randn(3 * n, dim)[::3],
        torch.randn(n, 2 * dim)[:, ::2],
        torch.randn(n + 1, dim + 1)[1:, 1:],
        torch.randn(1, dim).expand(n, dim),
        torch.randn(n, 1).expand(n, dim),
    )


@pytest.mark.parametrize(
    ("m", "n", "dim"),
    [(1, 1, 1), (8, 2, 3), (1, 999, 64), (8, 1000, 16), (64, 100, 5), (200, 64, 1), (300, 1000, 33), (96, 70, 700)],
)
def test_product_is_that_of_float64_whatever_the_strides(way, m, n, dim):
    for a, b, bias in itertools.product(views(m, dim), views(n, dim), (None, torch.randn(2 * n)[::2])):
        exact = a.double() @ b.double().t()
        magnitudes = a.double().abs() @ b.double().abs().t()
        if bias is not None:
            exact, magnitudes = exact + bias, magnitudes + bias.abs()
        computed = matmul.product(a, b, bias)
        assert ((computed - exact).abs() <= error_constant(dim) * magnitudes).all()


def test_product_keeps_what_is_not_finite_and_what_is_subnormal(way):
    a, b = torch.ones(80, 4), torch.eye(4).repeat(20, 1)
    a[0], a[1, 0], a[2] = torch.nan, torch.inf, 2.0**-140
    computed = matmul.product(a, b)
    assert computed[0].isnan().all()
    assert not computed[1].isfinite().any()
    assert (computed[2] == 2.0**-140).all()


def test_onednn_multiplies_few_sizes():
    assert {len(matmul._padded(torch.empty(n, 2))) for n in range(1, 1001)} == set(range(16, 1009, 16))


@pytest.mark.parametrize(
    ("tokens", "coordinates", "by_onednn"), [(1024, 8, True), (64, 8, False), (1024, 64, False), (1024, 256, True)]
)
def test_with_avx2_onednn_is_for_many_results_of_short_or_long_rows(monkeypatch, tokens, coordinates, by_onednn):
    monkeypatch.setattr(tuning, "AMD", True)
    monkeypatch.setattr(tuning, "AVX512_AMD", False)
    monkeypatch.setattr(matmul, "_by_onednn", lambda a, b, bias: None)
    computed = matmul.product(torch.randn(tokens, coordinates), torch.randn(1024, coordinates))
    assert isinstance(computed, torch.Tensor) != by_onednn


@pytest.mark.parametrize(("vendor", "is_amd"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_the_vendor_is_read_from_the_system(monkeypatch, tmp_path, vendor, is_amd):
    described = tmp_path / "cpuinfo"
    described.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(tuning, "Path", lambda path: described)
    assert tuning._is_amd() == is_amd
    described.unlink()
    monkeypatch.setattr(tuning.platform, "processor", lambda: f"Family 25 Model 17, {vendor}")
    assert tuning._is_amd() == is_amd
