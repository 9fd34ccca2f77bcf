"""The kernels, in the interpreter or on the GPU, on data built to mislead them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems

import fastvq
from fastvq import reference
from fastvq_kernels.configs import ScanConfig, packed_width, scan_config
from fastvq_kernels.search.pack_codes import pack_codebook
from fastvq_kernels.search.pipeline import certified_search, nearest_code

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The layouts the chips' own configurations are made of: threads per row of accumulators with one and four rows of
# eight codes each, both tile heights, rows that stay on chip or are loaded again, in one or two chunks with the bias
# before or after them, integer or float maxima.
LAYOUTS = [
    ScanConfig(block_m=64, block_n=32, block_d=16, lanes=4, resident=False),
    ScanConfig(block_m=128, block_n=128, lanes=4, int_max=True),
    ScanConfig(block_m=64, block_n=128, lanes=16),
    ScanConfig(block_m=128, block_n=512, block_d=16, lanes=16, resident=False, bias_first=False, int_max=True),
]
# The interpreter spends milliseconds on every column of an open token.
few = problems(max_tokens=3, max_codes=140, dims=(1, 2, 3, 8, 12, 20))


def search(x, codebook, metric):
    return nearest_code(x.to(DEVICE), codebook.to(DEVICE), metric).cpu()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(few)
def test_indices_equal_float64_whatever_the_data(problem):
    x, codebook, metric = problem
    assert torch.equal(search(x, codebook, metric), reference.nearest_code(x, codebook, metric))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(few, st.sampled_from([1e-6, 1.0, 1e6]))
def test_heads_do_not_mix(problem, scale):
    x, codebook, metric = problem
    xs, codebooks = torch.stack([x, x.flip(0) * scale]), torch.stack([codebook, codebook.flip(0) * scale])
    expected = [reference.nearest_code(x, codes, metric) for x, codes in zip(xs, codebooks, strict=True)]
    assert torch.equal(search(xs, codebooks, metric), torch.stack(expected))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(few, st.integers(1, 2))
def test_indices_do_not_depend_on_the_batch_split(problem, step):
    x, codebook, metric = problem
    split = torch.cat([search(part, codebook, metric) for part in x.split(step)])
    assert torch.equal(split, search(x, codebook, metric))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs its own layout only")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(problem=few)
def test_indices_do_not_depend_on_the_layout(layout, problem):
    x, codebook, metric = problem
    d = x.shape[1]
    width = packed_width(d)
    config = replace(layout, block_d=min(layout.block_d, scan_config(width).block_d))
    indices, _ = certified_search(x[None], pack_codebook(codebook, metric, config))
    assert torch.equal(indices[0], reference.nearest_code(x, codebook, metric))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(few)
def test_every_backend_gives_the_same_indices(problem):
    x, codebook, metric = problem
    x, codebook = x.to(DEVICE), codebook.to(DEVICE)
    results = [
        fastvq.nearest_code(x, codebook, metric=metric, backend=name) for name in ("reference", "torch", "triton")
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
