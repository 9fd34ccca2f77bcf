"""A zero token has no direction: with the cosine it has no gradient, becomes no code, and moves none."""

import pytest
import torch
import torch.nn.functional as F
from states import assert_equal_states

import fastvq
from fastvq import reference
from fastvq.common.directions import directions

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def with_zeros(z):
    """The tokens ``z`` with two zero tokens before each."""
    return torch.cat([torch.zeros_like(z), torch.zeros_like(z), z], -1).view(-1, z.shape[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_zero_token_has_gradient_0_and_the_others_theirs(dtype, scale, backend):
    module = fastvq.EMACodebook(9, 4, metric="cosine", backend=backend).eval()
    z, weights = torch.randn(20, 4).to(dtype), torch.randn(60, 4)
    leaf = with_zeros(z).requires_grad_()
    mask = torch.arange(60) % 5 > 0
    quantized, indices, loss = module(leaf, mask)
    # The gradient that a loss scaler multiplies reaches the tokens through the loss alone.
    gradients = torch.autograd.grad((quantized.float() * weights)[mask].mean() * scale + loss * scale, leaf)[0]
    assert not gradients[(leaf == 0).all(1)].any()
    assert torch.equal(indices[mask], reference.nearest_code(leaf.detach(), module.embeddings, "cosine")[mask])

    precise = z.double().requires_grad_()
    u, real = F.normalize(precise, dim=1), mask[2::3]
    codes = module.embeddings.double()[indices[2::3].clamp(min=0)]
    expected = (u + (codes - u).detach())[real].mul(weights.double()[2::3][real]).sum() / (mask.sum() * 4)
    expected = expected + 0.25 * (u - codes)[real].square().sum() / (mask.sum() * 4)
    (expected,) = torch.autograd.grad(expected * scale, precise)
    # Float32 sums of a few terms, and a rounding to the dtype.
    tolerance = max(torch.finfo(dtype).eps, 1e-5)
    assert torch.allclose(gradients[2::3].double(), expected, rtol=2 * tolerance, atol=tolerance * expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 3, 64])
def test_no_gradient_overflows_however_short_the_token(dtype, d):
    limits = torch.finfo(dtype)
    sizes = [0, limits.smallest_normal / 1000, limits.smallest_normal / 2, limits.smallest_normal, 1]
    x = (torch.tensor(sizes, dtype=torch.float64)[:, None] * torch.randn(5, d).sign()).to(dtype).requires_grad_()
    g = torch.randn(5, d, dtype=torch.float64)
    g = 3.4 * g / g.norm(dim=1, keepdim=True)
    u = directions(x)
    u.backward(g.to(u.dtype))
    assert x.grad.isfinite().all()
    assert not x.grad[:3].any()
    for i in (3, 4):
        unit = x[i].detach().sign().double() / d**0.5
        expected = g[i] - unit * (unit @ g[i])
        # A few roundings of g, and one of a gradient of at most |g| / |x|.
        assert ((x.grad[i].double() * sizes[i] * d**0.5 - expected).abs() < 20 * max(limits.eps, 2.0**-24)).all()


OPTIONS = [{}, {"init": "kmeans"}, {"no_random_restart": False, "restart_thres": 3.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n_real", [1, 5, 40])
def test_a_zero_token_never_becomes_a_code(options, n_real):
    real = torch.randn(n_real, 4)
    z = torch.zeros(400, 4)
    z[:: -(-400 // n_real)][:n_real] = real[: len(z[:: -(-400 // n_real)])]
    for learn in ("initialize", "forward"):
        module = fastvq.EMACodebook(12, 4, metric="cosine", **options)
        for _ in range(3):
            getattr(module, learn)(z)
            assert torch.allclose(module.embeddings.norm(dim=1), torch.ones(12))
        # Repeated tokens move a little.
        distances = torch.cdist(module.embeddings, F.normalize(real, dim=1)).amin(1)
        assert n_real < 12 or options or (distances < 0.2).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_of_zeros_initialises_nothing(options):
    module = fastvq.EMACodebook(12, 4, metric="cosine", **options)
    module(torch.zeros(50, 4))
    assert module._need_init
    assert not module.N.any()
    with pytest.raises(ValueError, match="x must hold at least one finite token"):
        module.initialize(torch.zeros(50, 4))
    module(torch.randn(50, 4))
    assert not module._need_init


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_zero_tokens_leave_the_state_of_a_run_without_them(backend):
    batches = [torch.randn(30, 4) for _ in range(3 if backend == "triton" else 20)]
    states = []
    for change in (lambda z: z, with_zeros):
        torch.manual_seed(0)
        module = fastvq.EMACodebook(12, 4, metric="cosine", backend=backend)
        module.set_codes(torch.randn(12, 4))
        for z in batches:
            module(change(z))
        module(torch.zeros(9, 4) if change is with_zeros else torch.zeros(0, 4))
        states.append(module.state_dict())
    assert_equal_states(*states)


def test_clusters_of_directions_ignore_zeros():
    found = fastvq.kmeans(torch.cat([torch.zeros(500, 4), torch.randn(60, 4)]), 8, metric="cosine")
    assert found.counts.sum() == 60
    assert torch.allclose(found.codes.norm(dim=1), torch.ones(8))
