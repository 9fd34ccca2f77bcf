"""A training step by the kernels never waits for the device: it reads no value on the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastvq

# Operators that need a value on the host, or whose result has a shape that depends on values.
WAITING = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "bincount", "unique_dim", "_unique2",
    "unique_consecutive", "equal", "is_nonzero", "repeat_interleave",
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Refuses the operators above, and indexing by a boolean tensor, while they stand for a GPU's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in WAITING, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{name} by a mask waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_check_notices_a_wait():
    for wait in (lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: bool(t.any()), torch.Tensor.nonzero):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait(torch.ones(3))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """No function looks at values, as on a GPU."""
    monkeypatch.setattr("fastvq.functional._check_range", lambda indices, n_codes: None)
    for module in ("learning.restart", "nn.first_codes", "nn.overflow"):
        monkeypatch.setattr(f"fastvq.{module}.may_read", lambda tensor: False)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_training_step_does_not_wait(as_on_a_gpu, kernel_device, deterministic, restarts):
    module = fastvq.EMACodebook(11, 4, no_random_restart=not restarts, backend="triton", device=kernel_device)
    x = torch.randn(20, 4, device=kernel_device, requires_grad=True)
    mask = torch.arange(20, device=kernel_device) % 3 > 0
    module(x, mask)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with NoWaiting():
            quantized, _, loss = module(x, mask)
            (quantized.sum() + loss).backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert x.grad is not None


def test_first_codes_of_unknown_buffers_do_not_wait(as_on_a_gpu, kernel_device):
    """The first step, and steps of ``functional_call``: the device decides from the buffers."""
    modules = [fastvq.EMACodebook(11, 4, backend="triton", device=kernel_device) for _ in range(2)]
    x = torch.randn(20, 4, device=kernel_device)
    with NoWaiting():
        modules[0](x)
        for _ in range(2):
            torch.func.functional_call(modules[0], dict(modules[1].named_buffers()), (x,))
    for module in modules:
        codes = module.embeddings[module.N < 0.995]
        assert (codes[:, None] == x).all(2).any(1).all()
