"""Dtypes at the edges: what is accepted, in which precision it is computed, and what an error says to pass."""

import pytest
import torch

import fastvq
from fastvq import reference

BACKENDS = ["torch", "reference", "triton"]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize(
    ("backend", "dtype"), [*[("torch", d) for d in FLOAT8], *[(b, FLOAT8[0]) for b in BACKENDS[1:]]]
)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_float8_tokens_are_the_numbers_they_stand_for(backend, dtype, metric):
    x, codes = torch.randn(60, 8).to(dtype), torch.randn(20, 8)
    mask = torch.rand(60) < 0.8
    wide = x.float()
    expected = reference.nearest_code(wide, codes, metric).masked_fill(~mask, -1)
    indices, distances = fastvq.nearest_code(x, codes, metric=metric, mask=mask, return_distance=True, backend=backend)
    assert torch.equal(indices, expected)
    assert distances[mask].isfinite().all()
    statistics = [fastvq.code_statistics(tokens, indices, 20, backend=backend) for tokens in (x, wide)]
    for a, b in zip(*statistics, strict=True):
        assert torch.equal(a, b)
    modules = []
    for tokens in (x, wide):
        torch.manual_seed(1)
        modules.append(fastvq.EMACodebook(20, 8, metric=metric, backend=backend, no_random_restart=False))
        for _ in range(2):
            indices = modules[-1](tokens, mask).indices
    assert modules[0](x, mask).quantized.dtype == dtype
    modules[1](wide, mask)
    assert torch.equal(modules[0].embeddings, modules[1].embeddings)
    if metric == "euclidean":
        results = [fastvq.quantize(tokens, codes, mask=mask, backend=backend) for tokens in (x, wide)]
        assert results[0].quantized.dtype == dtype
        assert torch.equal(results[0].quantized.float(), results[1].quantized.to(dtype).float())
        assert torch.equal(results[0].loss, results[1].loss)
        assert torch.equal(results[0].indices, expected)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_codebooks_are_searched_and_looked_up(dtype):
    x, codes = torch.randn(60, 8), torch.randn(20, 8).to(dtype)
    indices = reference.nearest_code(x, codes.float())
    quantized = fastvq.quantize(x, codes)
    assert torch.equal(quantized.indices, indices)
    assert torch.equal(quantized.quantized, codes.float()[indices])
    assert torch.equal(fastvq.lookup(indices, codes).float(), codes.float()[indices])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [False, True])
def test_int32_indices_are_int64_indices(backend, heads):
    x, mask = torch.randn(3, 40, 4), torch.rand(3, 40) < 0.7
    indices = torch.randint(-1, 9, (3, 40))
    results = [
        fastvq.code_statistics(x, i, 9, heads=heads, mask=mask, backend=backend) for i in (indices, indices.int())
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    codes = torch.randn(3, 9, 4) if heads else torch.randn(9, 4)
    assert torch.equal(fastvq.lookup(indices, codes), fastvq.lookup(indices.int(), codes))
    module = fastvq.EMACodebook(9, 4)
    assert torch.equal(module.dictionary_lookup(indices), module.dictionary_lookup(indices.int()))


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.bool, torch.float32])
def test_other_indices_are_named(dtype):
    x, indices = torch.randn(5, 4), torch.zeros(5).to(dtype)
    for call in (
        lambda: fastvq.code_statistics(x, indices, 3),
        lambda: fastvq.lookup(indices, x),
        lambda: fastvq.EMACodebook(3, 4).dictionary_lookup(indices),
    ):
        with pytest.raises(TypeError, match=f"indices must be an int64 or int32 tensor, got a tensor of {dtype}"):
            call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_an_attention_mask_of_integers_is_told_what_to_be(dtype):
    x, codes, mask = torch.randn(6, 4), torch.randn(3, 4), torch.ones(6, dtype=dtype)
    message = rf"mask must be a boolean tensor, got a tensor of {dtype}; for one of 0 and 1 pass mask\.bool\(\)"
    for call in (
        lambda: fastvq.nearest_code(x, codes, mask=mask),
        lambda: fastvq.quantize(x, codes, mask=mask),
        lambda: fastvq.code_statistics(x, torch.zeros(6, dtype=torch.int64), 3, mask=mask),
        lambda: fastvq.kmeans(x, 2, mask=mask),
        lambda: fastvq.EMACodebook(3, 4)(x, mask),
        lambda: fastvq.EMACodebook(3, 4).initialize(x, mask),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(TypeError, match=r"mask must be a boolean tensor, got a tensor of torch\.float32$"):
        fastvq.nearest_code(x, codes, mask=mask.float())


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_mixtures_are_computed_in_float32_under_autocast(low, dtype, compiled):
    module = fastvq.EMACodebook(300, 16)
    weights = torch.rand(50, 300).softmax(1).to(dtype)
    mix = module.soft_codebook_lookup
    if compiled:
        mix = torch.compile(mix, fullgraph=True, backend="eager")
    with torch.autocast("cpu", dtype=low):
        mixtures = mix(weights)
    assert mixtures.dtype == dtype
    expected = weights.double() @ module.embeddings.double()
    # Weights add up to 1: float32 sums of 300 terms below the largest code, and a rounding to the dtype.
    largest = module.embeddings.abs().max()
    assert (mixtures.double() - expected).abs().max() <= largest * (300 * 2.0**-24 + torch.finfo(dtype).eps)


def test_mixtures_are_computed_in_float32_whatever_the_setting_of_products():
    module, weights = fastvq.EMACodebook(300, 16), torch.rand(50, 300).softmax(1)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        mixtures = module.soft_codebook_lookup(weights)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    expected = weights.double() @ module.embeddings.double()
    assert (mixtures - expected).abs().max() <= module.embeddings.abs().max() * 300 * 2.0**-24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_looked_up_codes_have_the_dtype_that_the_model_was_built_in(dtype):
    """As ``from_pretrained(dtype=...)`` builds it: under a default dtype, filled with float32 numbers."""
    state = fastvq.EMACodebook(9, 4).state_dict()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = torch.nn.Sequential(fastvq.EMACodebook(9, 4), torch.nn.Linear(4, 3))
        model[1].to_empty(device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in state.items():
        setattr(model[0], name, value)
    assert {buffer.dtype for buffer in model[0].buffers()} == {torch.float32}
    codes = model[0].dictionary_lookup(torch.tensor([3, -1]))
    assert codes.dtype == dtype
    assert torch.equal(codes[0], state["embeddings"][3].to(dtype))
    model[1](codes)
    assert model[0].dictionary_lookup(torch.tensor([3]), torch.float32).dtype == torch.float32
    assert model.float()[0].dictionary_lookup(torch.tensor([3])).dtype == torch.float32
