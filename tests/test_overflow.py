"""Tokens too large for averages in float32: nothing that is not finite is written, and the user is told once."""

import copy
import warnings

import pytest
import torch

import fastvq
from fastvq.backends.choose import BACKENDS
from fastvq.common.ema_step import EMAStep


def codebook(backend="auto", device="cpu", **options):
    """Four codes, the last two far out and apart."""
    codes = torch.tensor([[0.0, 0], [10, 10], [2e33, 2e33], [-1e30, 1e30]])
    module = fastvq.EMACodebook(4, 2, backend=backend, device=device, **options)
    module.load_state_dict({"embeddings": codes, "N": torch.ones(4), "z_avg": codes})
    return module


def state_of(module):
    return [tensor.detach().cpu().clone() for tensor in (module.embeddings, module.N, module.z_avg)]


TOKENS = {
    "3e38": torch.full((120, 2), 3e38),
    "float64 beyond float32": torch.full((4, 2), 1e41, dtype=torch.float64),
    "float64 beyond itself": torch.full((3, 2), 1.7e308, dtype=torch.float64),
    "one coordinate": torch.tensor([[3e38, 1.0]]).repeat(120, 1),
}


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("name", list(TOKENS))
def test_a_code_that_would_overflow_keeps_its_place_and_the_others_move(name, backend, kernel_device):
    large = TOKENS[name]
    small = torch.randn(6, 2, dtype=large.dtype) + torch.tensor([[0.0], [10]]).repeat(3, 1)
    module = codebook(backend, kernel_device)
    before = state_of(module)
    with pytest.warns(UserWarning, match="1 of 4 codes kept their place instead of becoming infinite") as warned:
        _, indices, _ = module(torch.cat([small, large]).to(kernel_device))
    (code,) = indices[6:].unique().tolist()
    told = [str(warning.message) for warning in warned if warning.category is UserWarning]
    assert [text[text.index("infinite") :] for text in told] == [
        f"infinite: {code}. Codes do so from now on without a warning"
    ]
    after = state_of(module)
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a[code], b[code])
        assert a.isfinite().all()
    without = codebook(backend, kernel_device)
    without(small.to(kernel_device))
    # N and the averages of the others do not depend on the large tokens, their codes only through the sum of all N.
    for a, b in zip(after[1:], state_of(without)[1:], strict=True):
        others = [k for k in range(4) if k != code]
        assert torch.equal(a[others], b[others])
    torch.testing.assert_close(after[0][others], state_of(without)[0][others], rtol=1e-6, atol=1e-6)


def test_a_code_learns_again_after_the_step():
    module = codebook()
    with pytest.warns(UserWarning, match="kept their place"):
        module(TOKENS["3e38"])
    for _ in range(200):
        module(torch.tensor([[2e33, 3e33]]).repeat(5, 1))
    assert state_of(module)[0].isfinite().all()
    torch.testing.assert_close(module.embeddings[2], torch.tensor([2e33, 3e33]), rtol=0.2, atol=0)
    assert not torch.equal(module.embeddings[2], torch.full((2,), 2e33))


def test_sums_beyond_float32_are_no_overflow_while_their_averages_are_within():
    module = codebook()
    module(torch.full((300_000, 2), 2e33))  # their sum is 6e38
    # The code was there, with z_avg = N E.
    torch.testing.assert_close(module.embeddings[2], torch.full((2,), 2e33), rtol=1e-6, atol=0)
    torch.testing.assert_close(module.N[2], torch.tensor(0.99 + 3000), rtol=1e-6, atol=0)
    mixed = torch.tensor([[3e38], [3e38], [-3e38], [-3e38], [5.0]])
    for name, backend in BACKENDS.items():
        for deterministic in (False, True):
            (total,) = backend.code_statistics(mixed, torch.zeros(5, dtype=torch.int64), 1, deterministic)[1]
            assert abs(total.item()) < 1e24, name  # infinite, or NaN, in float32


def test_the_user_is_told_once_and_copies_start_anew():
    module = codebook()
    with pytest.warns(UserWarning, match="kept their place"):
        module(TOKENS["3e38"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(TOKENS["3e38"])
        module.eval()
        module.state_dict()
    again = copy.deepcopy(module).train()
    with pytest.warns(UserWarning, match="kept their place"):
        again(TOKENS["3e38"])


@pytest.mark.parametrize("look", [lambda module: module.eval(), lambda module: module.state_dict()])
def test_where_steps_may_not_read_the_device_the_user_is_told_later(monkeypatch, look):
    monkeypatch.setattr("fastvq.nn.overflow.may_read", lambda tensor: False)
    module = codebook()
    module(TOKENS["3e38"])
    module(torch.randn(5, 2))
    with pytest.warns(UserWarning, match="1 of 4 codes"):
        look(module)


def test_compiled_steps_leave_a_record():
    module = codebook()
    step = torch.compile(module, fullgraph=True, backend="aot_eager")
    step(torch.randn(300, 2))
    before = state_of(module)
    step(TOKENS["3e38"])
    assert all(torch.equal(a[2], b[2]) for a, b in zip(state_of(module), before, strict=True))
    with pytest.warns(UserWarning, match="1 of 4 codes"):
        module.eval()


@pytest.mark.parametrize("resets", [False, True])
def test_no_code_restarts_from_a_token_that_float32_cannot_hold(resets):
    module = codebook(no_random_restart=False, restart_thres=1e9, restart_resets_statistics=resets)
    tokens = torch.cat([torch.randn(3, 2, dtype=torch.float64), torch.full((3, 2), 1e39, dtype=torch.float64)])
    for _ in range(3):
        module(tokens)
        assert all(tensor.isfinite().all() for tensor in state_of(module))
    assert (module.embeddings.abs() < 20).all()


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_backends_agree_on_who_stays(backend, kernel_device):
    k, d = 33, 130
    state = torch.randn(k, d), torch.rand(k) * 3, torch.randn(k, d)
    state[1][5], state[2][5] = 1e-30, 1e36  # finite average, infinite code
    counts, sums = torch.randint(0, 9, (k,)).double(), torch.randn(k, d, dtype=torch.float64)
    counts[5] = 0
    sums[0, 129], sums[7, 3], sums[8, 0], sums[9, 1] = 1e300, -torch.inf, torch.nan, 3.5e40
    sums[10, 2] = 3e40  # a hundredth of it is below the largest number
    rows = torch.randn(k, d)
    for given in (None, rows):
        ours, theirs = ([tensor.clone() for tensor in state] for _ in range(2))
        stayed = BACKENDS["reference"].ema_step(EMAStep(*theirs, counts, sums, given, None, 0.99, resets=True))
        moved = [t.to(kernel_device) if isinstance(t, torch.Tensor) else t for t in (*ours, counts, sums, given)]
        found = BACKENDS[backend].ema_step(EMAStep(*moved, None, 0.99, resets=True))
        assert stayed.nonzero()[:, 0].tolist() == [0, 5, 7, 8, 9]
        assert torch.equal(found.cpu(), stayed)
        for a, b, before in zip(moved[:3], theirs, state, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=0 if kernel_device.type == "cpu" else 1e-6, atol=0)
            assert torch.equal(b[stayed], before[stayed])
            assert b.isfinite().all()
