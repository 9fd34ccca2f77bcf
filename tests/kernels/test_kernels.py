"""The certified search of the kernels, in the interpreter or on the GPU, against the float64 oracle."""

import pytest
import torch

from fastvq import reference
from fastvq_kernels.configs import TARGETS, RescanConfig, ScanConfig, packed_width, scan_config
from fastvq_kernels.search import rescan
from fastvq_kernels.search.pack_codes import pack_codebook
from fastvq_kernels.search.pipeline import certified_search, nearest_code

METRICS = ("euclidean", "cosine", "dot")


@pytest.fixture
def check(kernel_device):
    def compare(x, codebook, metric="euclidean"):
        indices = nearest_code(x.to(kernel_device), codebook.to(kernel_device), metric).cpu()
        assert torch.equal(indices, reference.nearest_code(x, codebook, metric))

    return compare


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 3, 8, 12, 18, 64, 100])
def test_indices_equal_float64_for_every_dimension(check, d, metric):
    check(torch.randn(33, d), torch.randn(150, d), metric)


@pytest.mark.parametrize(
    ("n", "k", "d"), [(17, 140, 192), (17, 140, 256), (17, 140, 512), (17, 140, 1024), (5, 20, 4100)]
)
def test_indices_equal_float64_for_long_rows(check, n, k, d):
    check(torch.randn(n, d), torch.randn(k, d))


@pytest.mark.parametrize("k", [1, 2, 7, 8, 127, 128, 129, 507])
def test_indices_equal_float64_for_every_codebook_size(check, k):
    check(torch.randn(65, 8), torch.randn(k, 8))


@pytest.mark.parametrize("n", [1, 3, 255, 257])
def test_indices_equal_float64_for_every_number_of_tokens(check, n):
    check(torch.randn(n, 16), torch.randn(64, 16))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [3.0, 1e4])
def test_indices_equal_float64_for_offset_data(check, offset, metric):
    check(torch.randn(40, 24) + offset, torch.randn(300, 24) + offset, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_indices_equal_float64_for_every_dtype(check, dtype, metric):
    x, codebook = torch.randn(40, 16), torch.randn(200, 16)
    check(x.to(dtype), codebook.to(dtype), metric)
    check(x, codebook.to(dtype), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_lowest_of_equal_codes_wins(check, metric):
    x, codebook = torch.randn(20, 12), torch.randn(60, 12)
    check(x, torch.cat([codebook, codebook.flip(0)]), metric)
    check(x[:8], codebook[:1].repeat(130, 1), metric)
    check(x[:4], torch.zeros(40, 12), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_ties_on_a_lattice(check, metric):
    x, codebook = torch.randint(-2, 3, (30, 4)).float(), torch.randint(-2, 3, (200, 4)).float()
    check(x / 2, codebook, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_codes_one_ulp_apart(check, metric):
    codebook = torch.randn(1, 16).repeat(60, 1)
    codebook[torch.arange(60), torch.arange(60) % 16] *= 1 + 2.0**-23
    check(torch.randn(10, 16), codebook, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factor", [1e3, 1e6, 1e30])
def test_one_code_far_out(check, factor, metric):
    x, codebook = torch.randn(20, 16), torch.randn(150, 16)
    codebook[77] *= factor
    check(x, codebook, metric)
    x[5] *= factor
    check(x, codebook, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("x_scale", "code_scale"), [(1e-30, 1e-30), (1e30, 1e30), (1e-30, 1.0), (1.0, 1e-5), (1e-42, 1e-42)]
)
def test_scales(check, x_scale, code_scale, metric):
    check(torch.randn(12, 16) * x_scale, torch.randn(150, 16) * code_scale, metric)


def test_mixed_magnitudes(check):
    x, codebook = torch.randn(20, 16), torch.randn(150, 16)
    check(x * 10.0 ** torch.linspace(-30, 10, 16), codebook * 10.0 ** torch.linspace(-20, 8, 16))
    check(x * 10.0 ** torch.linspace(-20, 20, 20)[:, None], codebook)
    check(x, codebook * 10.0 ** torch.linspace(-20, 15, 150)[:, None])


def test_float64_values_that_float32_cannot_tell_apart(check):
    x, codebook = torch.randn(12, 8, dtype=torch.float64), torch.randn(100, 8, dtype=torch.float64)
    check(1 + 1e-12 * x, 1 + 1e-12 * codebook)
    check(1e100 * x, 1e100 * codebook)
    check(1e-100 * x, 1e-100 * codebook)


@pytest.mark.parametrize("metric", METRICS)
def test_values_that_are_not_finite(check, metric):
    x, codebook = torch.randn(40, 16), torch.randn(200, 16)
    x[3, 2], x[9, 0], x[10, 5] = torch.nan, torch.inf, -torch.inf
    codebook[0, 0], codebook[150, 3], codebook[60, 1] = torch.nan, torch.inf, -torch.inf
    check(x, codebook, metric)
    check(x[:5], torch.full_like(codebook, torch.nan), metric)


def test_heads_and_strides(kernel_device):
    x, codebook = torch.randn(30, 2, 24, device=kernel_device), torch.randn(90, 2, 24, device=kernel_device)
    indices = nearest_code(x.transpose(0, 1), codebook.transpose(0, 1), "euclidean")
    for head in range(2):
        assert torch.equal(indices[head], reference.nearest_code(x[:, head], codebook[:, head]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("d", [3, 16, 64, 192, 512])
def test_indices_do_not_depend_on_the_configuration(d, target):
    """Tile sizes, layouts and loops of every chip, in the interpreter: none of them is a GPU's own business."""
    if torch.cuda.is_available():
        pytest.skip("a GPU runs its own configuration only, which the other tests cover")
    x, codebook = torch.randn(40, d), torch.randn(300, d)
    codebook[7] = codebook[250]
    x[3] = codebook[7]
    config = scan_config(packed_width(d), target)
    indices, n_open = certified_search(x[None], pack_codebook(codebook, config=config))
    assert torch.equal(indices[0], reference.nearest_code(x, codebook))
    assert n_open <= 3


def test_small_tiles_of_the_first_scan_leave_no_code_out_of_the_second(monkeypatch):
    """Ranges of an odd number of steps of 32 codes, against steps of 64 in the second scan."""
    x, codebook = torch.randn(30, 16), torch.randn(5, 16).repeat(32, 1) + 1e-4 * torch.randn(160, 16)
    monkeypatch.setattr(rescan, "rescan_config", lambda width: RescanConfig(block_n=64))
    packed = pack_codebook(codebook, config=ScanConfig(block_n=32, block_d=16))
    indices, n_open = certified_search(x[None], packed)
    assert torch.equal(indices[0], reference.nearest_code(x, codebook))
    assert n_open > 10


def test_columns_per_product_have_to_divide_the_rows():
    with pytest.raises(ValueError, match=r"config.block_d must divide the 16 columns of packed rows, got 64"):
        pack_codebook(torch.randn(9, 16), config=ScanConfig())


def test_ordinary_tokens_are_proved_without_float64(kernel_device):
    x, codebook = torch.randn(1, 256, 64, device=kernel_device), torch.randn(1000, 64, device=kernel_device)
    _, n_open = certified_search(x, pack_codebook(codebook))
    assert n_open <= 2


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_mean_of_half_squares_is_measured_in_the_frame(kernel_device, offset, scale):
    codebook = scale * (torch.randn(2, 300, 12) + offset)
    packed = pack_codebook(codebook.to(kernel_device))
    shift, factor = packed.shift.cpu().double()[:, None], packed.scale.cpu().double()[:, None, None]
    expected = ((codebook.double() - shift) * factor).square().sum(2).mean(1) / 2
    # Of squares around the first code, at most four standard deviations off, 16 parts are subtracted from 17: of sums
    # and roots in fp32, with errors of 2^-22.
    assert torch.allclose(packed.mean_sq.cpu().double(), expected, rtol=33 * 2.0**-22, atol=0)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_products_have_no_mean_of_half_squares(kernel_device, metric):
    assert not pack_codebook(torch.randn(2, 100, 12, device=kernel_device) + 3, metric).mean_sq.any()
