"""Indices of the search against the float64 oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multiplying import multiply_by, set_product_values
from strategies import METRICS, problems

import fastvq
from fastvq import reference
from fastvq.common.precision import full_precision
from fastvq.cpu import bounds, matmul, search, tuning

ALWAYS, NEVER = (lambda *size: True), (lambda *size: False)
MANY, NONE = 1 << 20, 0
# What each way to search a problem, which follows from its size, takes the place of; and how it multiplies.
GROUPS = {(tuning, name): NONE for name in ("FEW_CODES", "FEW_SCORES", "FEW_TOKENS")}
WAYS = {
    "by size": ("oneDNN", {}),
    "scores": ("MKL", {(tuning, "FEW_CODES"): MANY, (tuning, "FEW_SCORES"): NONE}),
    "groups": ("oneDNN", GROUPS),
    "float64": ("MKL", {}),
    "groups in float64": ("MKL", GROUPS),
    "bf16": ("MKL", GROUPS | {(tuning, "FEWEST_REFINED"): 2}),
}


@pytest.fixture(autouse=True, scope="module", params=WAYS)
def way(request):
    """Small problems are searched in the ways of larger ones as well."""
    with pytest.MonkeyPatch.context() as patch:
        multiplying, values = WAYS[request.param]
        multiply_by(patch, multiplying)
        for (module, name), value in values.items():
            patch.setattr(module, name, value)
        if request.param != "by size":
            patch.setattr(matmul, "bf16_pays", ALWAYS if request.param == "bf16" else NEVER)
        if request.param == "scores":
            set_product_values(patch, 1 << 9)
        if "float64" in request.param:
            patch.setitem(search.Prepared.__init__.__kwdefaults__, "dtype", torch.float64)
        yield


def brute_force(x, codebook, metric):
    """The definition in Python floats, one pair at a time."""
    indices = []
    for token in x.double().tolist():
        scores = []
        for code in codebook.double().tolist():
            if metric == "euclidean":
                total = 0.0
                for a, b in zip(token, code, strict=True):
                    total += (a - b) * (a - b)
                scores.append(-total)
                continue
            total = norm = 0.0
            for a, b in zip(token, code, strict=True):
                total += a * b
                norm += b * b
            scores.append(total if metric == "dot" else (total / math.sqrt(norm) if norm else 0.0))
        indices.append(scores.index(max(scores)))
    return torch.tensor(indices)


@pytest.mark.parametrize("metric", METRICS)
def test_oracle_is_the_definition(metric):
    x, codebook = torch.randn(30, 7), torch.randn(40, 7)
    codebook[20:30] = codebook[5:15]
    codebook[3] = 0
    assert torch.equal(reference.nearest_code(x, codebook, metric), brute_force(x, codebook, metric))


def test_oracle_keeps_ties_across_its_tiles_at_the_lowest_index():
    codebook = torch.randn(1, 3).repeat(5000, 1)
    assert torch.equal(reference.nearest_code(torch.randn(70, 3), codebook), torch.zeros(70, dtype=torch.int64))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (513, 1025, 3), (700, 252, 17), (100, 507, 123), (65, 3000, 64)])
@pytest.mark.parametrize("offset", [0, 30])
def test_indices_equal_float64(n, k, d, offset, metric):
    x, codebook = torch.randn(n, d) + offset, torch.randn(k, d) + offset
    assert torch.equal(search.nearest_code(x, codebook, metric), reference.nearest_code(x, codebook, metric))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_indices_equal_float64_for_every_dtype(dtype, metric):
    x, codebook = (torch.randn(600, 12) + 3).to(dtype), (torch.randn(900, 12) + 3).to(dtype)
    assert torch.equal(search.nearest_code(x, codebook, metric), reference.nearest_code(x, codebook, metric))
    mixed = codebook.float() + 1e-4
    assert torch.equal(search.nearest_code(x, mixed, metric), reference.nearest_code(x, mixed, metric))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems())
def test_indices_equal_float64_whatever_the_data(problem):
    x, codebook, metric = problem
    assert torch.equal(search.nearest_code(x, codebook, metric), reference.nearest_code(x, codebook, metric))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_indices_equal_float64_whatever_is_searched_again(problem):
    x, codebook, metric = problem
    expected = reference.nearest_code(x, codebook, metric)
    for values, most, closer in ((1 << 9, 64, 8), (1 << 9, 1, 1), (1 << 18, 1, 10**9)):
        with pytest.MonkeyPatch.context() as patch:
            set_product_values(patch, values)
            patch.setattr(tuning, "CLOSER", closer)
            patch.setattr(tuning, "most_candidates", lambda n_codes, most=most: most)
            assert torch.equal(search.nearest_code(x, codebook, metric), expected)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 50))
def test_indices_equal_float64_in_blocks_of_the_codebook(problem, codes):
    x, codebook, metric = problem
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FEW_CODES", "FEW_SCORES", "FEW_TOKENS"):
            patch.setattr(tuning, name, NONE)
        patch.setattr(tuning, "CODES_PER_BLOCK", codes)
        patch.setattr(tuning, "LEAST_CODE_VALUES", 0)
        assert torch.equal(search.nearest_code(x, codebook, metric), reference.nearest_code(x, codebook, metric))


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("metric", METRICS)
def test_tokens_that_are_not_finite_get_minus_one_and_codes_never_win(n, metric):
    x, codebook = torch.randn(n, 9), torch.randn(300, 9)
    x[::3, 4] = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(len(x[::3])) % 3]
    assert torch.equal(search.nearest_code(x, codebook, metric), reference.nearest_code(x, codebook, metric))
    codebook[::7, 2], codebook[1::50, 3] = torch.nan, torch.inf
    assert torch.equal(search.nearest_code(x, codebook, metric), reference.nearest_code(x, codebook, metric))
    x = torch.randn(n, 9)
    assert torch.equal(search.nearest_code(x, codebook, metric), reference.nearest_code(x, codebook, metric))


@pytest.mark.parametrize("spread", [0, 1e-7, 1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("clumps", [1, 2, 40])
def test_indices_equal_float64_for_tight_clumps_of_codes(clumps, spread):
    codebook = torch.randn(clumps, 16)[torch.arange(1500) % clumps] + spread * torch.randn(1500, 16)
    x = torch.cat([torch.randn(300, 16), codebook[:300] + spread * torch.randn(300, 16)])
    assert torch.equal(search.nearest_code(x, codebook), reference.nearest_code(x, codebook))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(-600, 600), st.integers(-600, 600), st.sampled_from(METRICS))
def test_indices_equal_float64_at_the_edges_of_float64(seed, token_exponent, code_exponent, metric):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64) * 2.0**token_exponent
    codebook = torch.randn(30, 5, generator=generator, dtype=torch.float64) * 2.0**code_exponent
    assert torch.equal(search.nearest_code(x, codebook, metric), reference.nearest_code(x, codebook, metric))


@pytest.mark.parametrize("step", [1, 7, 100, 512, 513])
def test_indices_do_not_depend_on_the_batch_split(step):
    x, codebook = (2 * torch.randn(1030, 6)).round(), (2 * torch.randn(700, 6)).round()
    split = torch.cat([search.nearest_code(part, codebook) for part in x.split(step)])
    assert torch.equal(split, search.nearest_code(x, codebook))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_indices_do_not_depend_on_the_number_of_threads(threads):
    x, codebook = (2 * torch.randn(3000, 6)).round(), (2 * torch.randn(700, 6)).round()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        indices = search.nearest_code(x, codebook)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(indices, reference.nearest_code(x, codebook))


def test_indices_do_not_depend_on_block_sizes(monkeypatch):
    x, codebook = (2 * torch.randn(300, 6)).round(), (2 * torch.randn(700, 6)).round()
    expected = reference.nearest_code(x, codebook)
    for tokens, codes, values, most in ((7, 64, 1, 1), (1, 128, 1000, 100), (512, 1024, 1 << 21, 10**6)):
        set_product_values(monkeypatch, codes * tokens)
        sizes = {
            "TOKENS_PER_BLOCK": 3 * tokens,
            "TOKENS_PER_PRODUCT": tokens,
            "most_candidates": lambda n_codes, most=most: most,
            "REFINED_VALUES": values,
            "TOKENS_PER_BATCH": tokens,
            "GROUPS": ((0, codes // 8),),
            "DECIDE_VALUES": values,
        }
        for name, size in sizes.items():
            monkeypatch.setattr(tuning, name, size)
        assert torch.equal(search.nearest_code(x, codebook), expected)


PRECISIONS = (torch.backends, torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)


@pytest.fixture(params=["function", "products on the CPU", "products on CUDA", "everything"])
def reduced_precision(request):
    """Float32 products may be computed in TF32 or bfloat16, by each of the ways to say so."""
    places = {
        "products on the CPU": torch.backends.mkldnn.matmul,
        "products on CUDA": torch.backends.cuda.matmul,
        "everything": torch.backends,
    }
    if request.param == "function":
        torch.set_float32_matmul_precision("medium")
    else:
        places[request.param].fp32_precision = "bf16" if request.param == "products on the CPU" else "tf32"
    yield
    for place in PRECISIONS:
        place.fp32_precision = "none"


@pytest.mark.parametrize("autocast", [False, True])
def test_reduced_precision_settings_of_the_caller_change_nothing(reduced_precision, autocast):
    x, codebook = torch.randn(2000, 64) + 3, torch.randn(800, 64) + 3
    expected, before = reference.nearest_code(x, codebook), [place.fp32_precision for place in PRECISIONS]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert torch.equal(fastvq.nearest_code(x, codebook), expected)
        assert torch.equal(fastvq.nearest_code(x[:10], codebook), expected[:10])
    assert [place.fp32_precision for place in PRECISIONS] == before


def test_a_setting_inherited_from_a_wider_one_still_follows_it():
    torch.backends.fp32_precision = "tf32"
    try:
        fastvq.nearest_code(torch.randn(5, 4), torch.randn(3, 4))
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"


def test_searches_in_threads_keep_the_precision_until_the_last_one_ends():
    products = torch.backends.mkldnn.matmul
    products.fp32_precision = "bf16"
    try:
        first, second = full_precision(torch.device("cpu")), None
        with first:
            second = full_precision(torch.device("cpu"))
            second.__enter__()
        assert products.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert products.fp32_precision == "bf16"
    finally:
        products.fp32_precision = "none"


@pytest.fixture(params=[torch.float64, torch.float16], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("metric", METRICS)
def test_the_default_dtype_of_the_caller_changes_nothing(default_dtype, metric):
    x, codebook = torch.randn(700, 40, dtype=torch.float32), torch.randn(2100, 40, dtype=torch.float32)
    codebook[:4] = codebook[5]
    expected = reference.nearest_code(x, codebook, metric)
    indices, distance = fastvq.nearest_code(x, codebook, metric=metric, return_distance=True)
    assert torch.equal(indices, expected)
    assert distance.dtype == torch.float32


def test_rows_too_long_for_the_bounds_are_searched_by_the_oracle(monkeypatch):
    assert 0 < bounds.error_constant(bounds.MOST_COLUMNS) < 0.2
    x, codebook = torch.randn(9, bounds.MOST_COLUMNS + 1), torch.randn(5, bounds.MOST_COLUMNS + 1)
    answer = torch.arange(9)
    monkeypatch.setattr(reference, "nearest_code", lambda *args: answer)
    assert search.nearest_code(x, codebook) is answer


def test_norms_are_rounded_correctly():
    squares = torch.rand(1, 20_000, dtype=torch.float64)
    expected = torch.tensor([math.sqrt(value * value) for value in squares[0].tolist()], dtype=torch.float64)
    assert torch.equal(reference.root(squares[0].square()), expected)


def test_cosines_that_differ_in_the_last_place_are_told_apart_by_all_backends(kernel_device):
    for seed in (12, 13, 18):
        torch.manual_seed(seed)
        codebook, x = 1 + torch.randn(64, 2) * 1e-6, 1 + torch.randn(16, 2) * 1e-6
        expected = reference.nearest_code(x, codebook, "cosine")
        assert torch.equal(fastvq.nearest_code(x, codebook, metric="cosine"), expected)
        on_device = x.to(kernel_device), codebook.to(kernel_device)
        indices = fastvq.nearest_code(*on_device, metric="cosine", backend="triton")
        assert torch.equal(indices.cpu(), expected)


def test_expanded_formula_errs_where_the_search_does_not():
    x, codebook = torch.randn(2000, 128) + 30, torch.randn(1000, 128) + 30
    expected = reference.nearest_code(x, codebook)
    assert not torch.equal(reference.nearest_code_expanded(x, codebook), expected)
    assert torch.equal(search.nearest_code(x, codebook), expected)
