"""The state is float32, each buffer its own memory, whoever else writes it."""

import contextlib
import copy
import pickle

import pytest
import torch
from states import assert_equal_states
from torch.distributed.fsdp import _runtime_utils

import fastvq

DTYPES = [torch.bfloat16, torch.float16, torch.float64]


def built(**options):
    torch.manual_seed(0)
    module = fastvq.EMACodebook(12, 4, **options)
    module.set_codes(torch.randn(12, 4), 50 * torch.rand(12))
    return module


def by_data(module, dtype):
    for buffer in module.buffers():
        buffer.data = buffer.to(dtype)


def as_fsdp_does(module, dtype):
    _runtime_utils._cast_buffers_to_dtype_and_device(list(module.buffers()), [dtype] * 3, torch.device("cpu"))


def by_buffers(module, dtype):
    module._buffers.update({name: buffer.to(dtype) for name, buffer in module._buffers.items()})


def by_attribute(module, dtype):
    for name, buffer in module.named_buffers():
        setattr(module, name, buffer.to(dtype))


def by_swapped_conversion(module, dtype):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CASTS = [by_data, as_fsdp_does, by_buffers, by_attribute, by_swapped_conversion]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}], ids=str)
def test_a_cast_of_the_buffers_changes_nothing(cast, dtype, options):
    ours, expected = built(**options), built(**options)
    for step in range(30):
        if step in (0, 1, 20):
            cast(ours, dtype)
        z = torch.randn(20, 4)
        results = []
        for module in (ours.train(step != 20), expected.train(step != 20)):
            torch.manual_seed(step)
            results.append(module(z))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    assert {buffer.dtype for buffer in ours.buffers()} == {torch.float32}
    assert_equal_states(ours, expected)


@pytest.mark.parametrize("cast", CASTS)
def test_lookups_read_the_codes_of_before_a_cast(cast):
    module = built()
    codes, weights = module.embeddings.clone(), torch.rand(3, 12)
    cast(module, torch.bfloat16)
    assert torch.equal(module.dictionary_lookup(torch.tensor([3]), torch.float32)[0], codes[3])
    cast(module, torch.bfloat16)
    assert torch.equal(module.soft_codebook_lookup(weights), weights @ codes)


def test_counts_grow_though_they_were_cast_before_every_step():
    module = fastvq.EMACodebook(1, 2)
    module.set_codes(torch.ones(1, 2))
    for _ in range(601):
        by_data(module, torch.bfloat16)
        module(torch.ones(64, 2))
    # N = 64 - 63 γ^601; each of 601 float32 steps has a relative error of at most 2^-23.
    assert torch.allclose(module.N, torch.tensor(64 - 63 * 0.99**601), rtol=601 * 2.0**-23)


def test_numbers_written_in_half_precision_are_taken():
    module, codes = built(), torch.randn(12, 4).bfloat16()
    by_data(module, torch.bfloat16)
    module.embeddings.copy_(codes)
    assert torch.equal(module.eval()(codes).quantized, codes)
    assert torch.equal(module.embeddings, codes.float())
    assert torch.equal(module.N, built().N)


def test_a_functional_call_repairs_the_state_it_was_given():
    module, expected, z = built(), built(), torch.randn(20, 4)
    expected.set_codes(torch.randn(12, 4), 50 * torch.rand(12))
    state = {name: buffer.bfloat16() for name, buffer in expected.state_dict().items()}
    before = copy.deepcopy(module.state_dict())
    expected.load_state_dict(state)
    for _ in range(3):
        torch.func.functional_call(module, state, (z,))
        expected(z)
    assert_equal_states(module, before)
    assert_equal_states(state, expected)


def shared(codes):
    return {"embeddings": codes, "N": torch.ones(12), "z_avg": codes}


def views_of_one(codes):
    whole = torch.cat([codes, codes, codes[:1]])
    return {"embeddings": whole[:12], "N": torch.ones(12), "z_avg": whole[:24][6:18]}


def repeated(codes):
    return {"embeddings": codes[:1].expand(12, 4), "N": torch.ones(1).expand(12), "z_avg": codes}


def with_gradient(codes):
    return {"embeddings": codes.clone().requires_grad_(), "N": torch.ones(12), "z_avg": torch.nn.Parameter(codes)}


def of_inference_mode(codes):
    with torch.inference_mode():
        return {"embeddings": codes.clone(), "N": torch.ones(12), "z_avg": codes.clone()}


def of_whole_numbers(codes):
    return {"embeddings": codes.double(), "N": torch.ones(12, dtype=torch.int64), "z_avg": codes.half()}


@pytest.mark.parametrize("make", [shared, views_of_one, repeated, with_gradient, of_inference_mode, of_whole_numbers])
def test_assigned_checkpoints_train_as_copied_ones(make):
    state, modules = make(torch.randn(12, 4)), [fastvq.EMACodebook(12, 4) for _ in range(2)]
    values = {name: value.detach().clone() for name, value in state.items()}
    for module, given, assign in zip(modules, (values, state), (False, True), strict=True):
        module.load_state_dict(given, assign=assign)
    for _ in range(5):
        z = torch.randn(20, 4)
        assert torch.equal(*[module(z).indices for module in modules])
    assert_equal_states(*modules)


def test_checkpoints_that_fit_are_assigned_without_a_copy():
    state, module = built().state_dict(), fastvq.EMACodebook(12, 4)
    module.load_state_dict(state, assign=True)
    assert all(module.get_buffer(name).data_ptr() == value.data_ptr() for name, value in state.items())


def test_buffers_that_are_one_memory_cannot_be_trained():
    module = built()
    module.embeddings = module.z_avg = torch.randn(12, 4)
    module.eval()(torch.randn(20, 4))
    with pytest.raises(RuntimeError, match=r"z_avg and embeddings must not be the same memory; pass z_avg.clone()"):
        module.train()(torch.randn(20, 4))


def test_buffers_of_inference_mode_cannot_be_trained():
    module = built()
    with torch.inference_mode():
        module.N = torch.ones(12)
        module(torch.randn(20, 4))
    with pytest.raises(RuntimeError, match=r"N was made in inference mode and cannot be trained; pass N.clone()"):
        module(torch.randn(20, 4))


def load(module):
    other = fastvq.EMACodebook(12, 4)
    other.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)
    return other


@pytest.mark.parametrize(
    "make",
    [
        lambda module: built(),
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        load,
        lambda module: module.to(torch.float64),
        lambda module: module.to("meta").to_empty(device="cpu"),
    ],
)
def test_modules_of_inference_mode_train_later(make):
    modules = []
    for context in (torch.inference_mode(), contextlib.nullcontext()):
        with context:
            modules.append(make(built()))
    for _ in range(3):
        z, results = torch.randn(20, 4), []
        for module in modules:
            torch.manual_seed(0)
            leaf = z.clone().requires_grad_()
            quantized, indices, loss = module(leaf)
            (quantized.sum() + loss).backward()
            results.append((indices, leaf.grad))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    assert_equal_states(*modules)
