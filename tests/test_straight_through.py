"""Value and gradient of the straight-through estimator."""

import pytest
import torch

import fastvq
from fastvq import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_value_is_exactly_the_code(dtype):
    x, codebook = torch.randn(3, 50, 8, dtype=dtype), torch.randn(20, 8)
    quantized, indices, loss = fastvq.quantize(x, codebook)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, codebook[indices].to(dtype))
    assert loss.dtype == torch.promote_types(dtype, torch.float32)


def test_gradient_is_incoming_plus_commitment():
    x = torch.randn(3, 50, 8, dtype=torch.float64, requires_grad=True)
    codebook, incoming = torch.randn(20, 8, dtype=torch.float64), torch.randn(3, 50, 8, dtype=torch.float64)
    quantized, indices, loss = fastvq.quantize(x, codebook, commitment_weight=0.7)
    ((quantized * incoming).sum() + 3 * loss).backward()
    expected = incoming + 3 * 0.7 * 2 * (x.detach() - codebook[indices]) / x.numel()
    # One rounding of each operation in float64.
    assert torch.allclose(x.grad, expected, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("masked", [False, True])
def test_value_gradient_and_loss_are_those_of_the_detach_formula(masked):
    x, codebook = torch.randn(4, 30, 6), torch.randn(25, 6)
    mask = torch.rand(4, 30) < 0.7 if masked else None
    results = []
    for module in (fastvq, reference):
        leaf = x.clone().requires_grad_()
        quantized, indices, loss = module.quantize(leaf, codebook, mask=mask)
        (quantized.pow(2).sum() + 10 * loss).backward()
        results.append((indices, quantized, loss, leaf.grad))
    ours, theirs = results
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        # x + (e - x) rounds to within one unit of the larger operand; gradients follow.
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_those_of_the_formula():
    x, codebook = torch.randn(5, 3).double().requires_grad_(), torch.randn(7, 3).double()
    mask = torch.arange(5) != 2
    # A step of 1e-6 crosses no boundary between two codes here.
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: fastvq.quantize(x, codebook, mask=mask).loss, x)
    for module in (fastvq, reference):
        quantized = module.quantize(x, codebook, mask=mask).quantized
        gradient = torch.autograd.grad(quantized.square().sum(), x, create_graph=True)[0]
        assert torch.equal(torch.autograd.grad(gradient.sum(), x)[0], 2.0 * mask[:, None].expand(5, 3))


def test_residuals_beyond_float16_give_the_gradient_of_the_formula():
    x = torch.full((1, 2), 40000.0, dtype=torch.float16, requires_grad=True)
    quantized, _, loss = fastvq.quantize(x, torch.full((1, 2), -40000.0))
    (quantized.float().sum() + loss).backward()
    assert torch.equal(x.grad, torch.full((1, 2), 1 + 0.25 * 80000.0, dtype=torch.float16))


def test_gradient_of_a_small_loss_survives_float16():
    x = torch.randn(512, 256, dtype=torch.float16, requires_grad=True)
    codebook = torch.randn(16, 256)
    _, indices, loss = fastvq.quantize(x, codebook)
    (loss * 65536.0).backward()
    expected = 65536 * 0.5 * (x.detach().float() - codebook[indices]) / x.numel()
    # The residual and the gradient are each rounded to float16 once, by at most 2^-11, or 2^-25 if subnormal.
    assert torch.allclose(x.grad.float(), expected, rtol=2.0**-10 + 2.0**-22, atol=2.0**-24)
    assert x.grad.abs().max() > 0


def test_masked_tokens_get_no_gradient_and_others_do():
    x = torch.randn(10, 4, requires_grad=True)
    mask = torch.arange(10) < 6
    quantized, _, loss = fastvq.quantize(x, torch.randn(5, 4), mask=mask)
    (quantized.sum() + loss).backward()
    assert (x.grad[6:] == 0).all()
    assert (x.grad[:6] != 0).all()


def test_nan_reaches_the_output_but_not_the_other_gradients():
    x = torch.randn(10, 4)
    x[3, 1] = torch.nan
    x.requires_grad_()
    quantized, _, loss = fastvq.quantize(x, torch.randn(5, 4))
    assert quantized[3].isnan().all()
    assert loss.isfinite()
    (quantized[:3].sum() + loss).backward()
    assert x.grad.isfinite().all()


def test_backward_ignores_changes_of_the_codebook_after_the_forward():
    x, codebook = torch.randn(30, 4), torch.randn(9, 4)
    grads = []
    for change in (False, True):
        leaf, codes = x.clone().requires_grad_(), codebook.clone()
        quantized, _, loss = fastvq.quantize(leaf, codes)
        if change:
            codes.fill_(torch.nan)
        (quantized.sum() + loss).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_no_gradient_reaches_the_codebook():
    x, codebook = torch.randn(30, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    quantized, _, loss = fastvq.quantize(x, codebook)
    (quantized.sum() + loss).backward()
    assert codebook.grad is None


def test_tensors_without_gradient_stay_without():
    quantized, _, loss = fastvq.quantize(torch.randn(5, 3), torch.randn(4, 3))
    assert not quantized.requires_grad
    assert not loss.requires_grad
