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


def test_onednn_multiplies_few_sizes(monkeypatch):
    multiply_by(monkeypatch, "oneDNN")
    sizes = set()
    multiplied = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda a, *rest: sizes.add(len(a)) or multiplied(a, *rest), raising=False
    )
    for n in range(1, 101):
        assert len(matmul.product(torch.ones(n, 2), torch.ones(3, 2))) == n
    assert sizes == set(range(16, 113, 16))


def test_products_in_float64_are_float64(way):
    a, b = torch.randn(300, 40).double(), torch.randn(200, 40).double()
    exact = (a[:, None] * b).sum(2)
    assert ((matmul.product(a, b) - exact).abs() <= error_constant(40, torch.float64) * (a.abs() @ b.abs().t())).all()


@pytest.mark.parametrize(("vendor", "is_amd"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_the_vendor_is_read_from_the_system(monkeypatch, tmp_path, vendor, is_amd):
    described = tmp_path / "cpuinfo"
    described.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(tuning, "Path", lambda path: described)
    assert tuning._is_amd() == is_amd
    described.unlink()
    monkeypatch.setattr(tuning.platform, "processor", lambda: f"Family 25 Model 17, {vendor}")
    assert tuning._is_amd() == is_amd
