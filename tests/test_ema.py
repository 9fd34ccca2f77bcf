"""The step of the moving averages: by every backend, and as an operator."""

import pytest
import torch
from states import assert_equal_states

import fastvq
from fastvq.backends.choose import BACKENDS
from fastvq.backends.operators import RECORDED
from fastvq.common.ema_step import EMAStep
from fastvq.cpu import ema, tuning
from fastvq.testing.measure import peak_extra_memory

DECAY = 0.99


def problem(k, d, batch=9):
    """Embeddings, N and z_avg of a codebook that has learnt; counts, with zeros, and sums of a step; rows."""
    state = torch.randn(k, d), torch.rand(k) * batch / 3, torch.randn(k, d)
    return state, (torch.randint(0, batch, (k,)).double(), torch.randn(k, d, dtype=torch.float64)), torch.randn(k, d)


def after(step, state, counts, sums, rows=None, found=None, **options):
    """The state after a step, on the CPU; the state given stays."""
    state = tuple(tensor.clone() for tensor in state)
    step(EMAStep(*state, counts, sums, rows, found, decay=DECAY, **options))
    return state


OPTIONS = [
    {},
    {"smoothing": 1e-5},
    {"rows": True},
    {"rows": True, "found": torch.tensor([[True]])},
    {"rows": True, "found": torch.tensor(False)},
    {"rows": True, "resets": True},
    {"rows": True, "resets": True, "restart_thres_relative": 0.7},
    {"rows": True, "restart_thres": 2.5},
]


@pytest.fixture(params=list(BACKENDS))
def step(request, kernel_device):
    """One step on CPU tensors, in place, by a backend."""
    backend = BACKENDS[request.param]

    def run(given):
        moved = EMAStep(*[x.to(kernel_device) if isinstance(x, torch.Tensor) else x for x in given])
        backend.ema_step(moved)
        for tensor, result in zip(given[:3], moved[:3], strict=True):
            tensor.copy_(result)

    return run


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_backends_agree_on_every_bit(monkeypatch, step, kernel_device, options):
    monkeypatch.setattr(tuning, "EMA_VALUES", 500)
    for k, d in ((1, 1), (7, 3), (300, 8), (33, 130)):
        state, statistics, rows = problem(k, d)
        state[1][::3] = 0  # codes without a count, of which some win tokens
        given = {**options, "rows": rows} if "rows" in options else options
        ours = theirs = state
        for _ in range(3):
            theirs = after(ema.ema_step, theirs, *statistics, **given)
            ours = after(step, ours, *statistics, **given)
            if kernel_device.type == "cpu":  # a GPU adds up N in another order
                for a, b in zip(ours, theirs, strict=True):
                    assert torch.equal(a, b)
            torch.testing.assert_close(ours, theirs)


def test_step_is_the_formula_up_to_rounding(step):
    k = 50
    (embeddings, N, z), (counts, sums), _ = problem(k, 6)
    ours = after(step, (embeddings, N, z), counts, sums)
    # decay and 1 - decay are rounded to float32 as well.
    n = DECAY * N.double() + (1 - DECAY) * counts.double()
    average = DECAY * z.double() + (1 - DECAY) * sums.double()
    size = DECAY * z.double().abs() + (1 - DECAY) * sums.double().abs()
    weights = (n + 1e-7) / (n.sum() + k * 1e-7) * n.sum()
    u = 2.0**-24
    assert ((ours[1] - n).abs() <= 4 * u * n).all()
    assert ((ours[2] - average).abs() <= 4 * u * size).all()
    # A weight: N and twice its sum, each rounded K times at most, and eight operations; then one division.
    assert ((ours[0] - average / weights[:, None]).abs() <= (4 + 2 * (k + 4) + 8) * u * size / weights[:, None]).all()


def test_codes_stay_until_a_token_is_counted(step):
    state = torch.randn(5, 3), torch.zeros(5), torch.randn(5, 3)
    ours = after(step, state, torch.zeros(5), torch.zeros(5, 3))
    assert torch.equal(ours[0], state[0])
    assert torch.equal(ours[1], state[1])


def test_rare_codes_take_their_rows(step):
    state, (counts, sums), rows = problem(40, 5)
    moved = after(step, state, counts, sums)
    for resets in (False, True):
        embeddings, N, z = after(step, state, counts, sums, rows, restart_thres=1.5, resets=resets)
        rare = moved[1] < 1.5
        assert 0 < rare.sum() < 40
        assert torch.equal(embeddings, torch.where(rare[:, None], rows, moved[0]))
        assert torch.equal(N, torch.where(rare & resets, 1, moved[1]))
        assert torch.equal(z, torch.where((rare & resets)[:, None], rows, moved[2]))


def test_no_code_restarts_without_a_token_to_take(step):
    state, (counts, sums), rows = problem(40, 5)
    moved = after(step, state, counts, sums)
    ours = after(step, state, counts, sums, rows, torch.tensor(False), restart_thres=1e9, resets=True)
    for a, b in zip(ours, moved, strict=True):
        assert torch.equal(a, b)


def test_relative_threshold_does_not_depend_on_the_size_of_a_batch(step):
    state, (counts, sums), rows = problem(40, 5)
    restarted = []
    for factor in (1, 64):
        scaled = state[0], state[1] * factor, state[2]
        embeddings, N, _ = after(
            step, scaled, counts * factor, sums, rows, restart_thres_relative=0.5, restart_thres=1e9
        )
        restarted.append((embeddings == rows).all(1))
        assert torch.equal(restarted[-1], N.double() < 0.5 * N.double().mean())
    assert 0 < restarted[0].sum() < 40
    assert torch.equal(*restarted)


def test_step_takes_no_memory_that_grows_with_the_codes():
    state, statistics, rows = problem(1 << 16, 64)
    step = EMAStep(*state, *statistics, rows, None, DECAY, resets=True)
    assert peak_extra_memory(lambda: ema.ema_step(step), torch.device("cpu")) < state[0].nbytes / 2


def test_buffers_with_gaps_are_moved_as_well(step):
    state, (counts, sums), _ = problem(6, 4)
    expected = after(step, state, counts, sums)
    spread = torch.stack([state[0], state[0]], 2)[..., 0]
    step(EMAStep(spread, *state[1:], counts, sums.t().contiguous().t(), None, None, DECAY))
    for a, b in zip((spread, *state[1:]), expected, strict=True):
        assert torch.equal(a, b)


def test_writes_of_the_kernel_are_counted(kernel_device):
    state, statistics, _ = problem(6, 4)
    tensors = [t.to(kernel_device) for t in (*state, *statistics)]
    versions = [t._version for t in tensors[:3]]
    BACKENDS["triton"].ema_step(EMAStep(*tensors, None, None, DECAY))
    assert all(t._version > version for t, version in zip(tensors, versions, strict=False))


@pytest.mark.parametrize("found", [None, torch.tensor(True)])
def test_operator_passes_opcheck(found):
    state, statistics, rows = problem(6, 4)
    options = {"resets": True, "restart_thres_relative": 0.1}
    torch.library.opcheck(torch.ops.fastvq.ema_step, (*state, *statistics, rows, found, DECAY), options)


def test_step_compiles_in_one_graph():
    state, statistics, rows = problem(6, 4)
    compiled = torch.compile(RECORDED["auto"].ema_step, fullgraph=True, backend="aot_eager")
    ours, expected = (after(step, state, *statistics, rows, resets=True) for step in (compiled, ema.ema_step))
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("restarts", [False, True])
def test_training_by_every_backend_gives_the_same_codebook(restarts, kernel_device):
    """Integers, of which every sum is exact in any order."""
    batches = [torch.randint(-8, 8, (40, 4), device=kernel_device).float() for _ in range(4)]
    states = []
    for backend in BACKENDS:
        torch.manual_seed(1)
        codebook = fastvq.EMACodebook(12, 4, no_random_restart=not restarts, backend=backend, device=kernel_device)
        for batch in batches:
            codebook(batch)
        states.append(codebook.state_dict())
    for state in states[1:]:
        assert_equal_states(state, states[0])
