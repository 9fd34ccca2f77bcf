"""When the first codes are taken from tokens, and which codes stay: the buffers alone decide."""

import copy
import pickle

import pytest
import torch
from states import assert_equal_states

import fastvq
from fastvq.learning import restart


def fresh(seed=0, **options):
    torch.manual_seed(seed)
    return fastvq.EMACodebook(12, 4, **options)


def trained(**options):
    module = fresh(**options)
    module(torch.randn(60, 4))
    return module


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def are_tokens(codes, tokens):
    return (codes[:, None] == tokens).all(2).any(1).all()


def moved(state, z, indices, decay=0.99):
    """The codes after a step, in float64: codes with N = 0 start from where they are as if they had won themselves."""
    embeddings, N, z_avg = (state[name].double() for name in ("embeddings", "N", "z_avg"))
    counts = torch.bincount(indices, minlength=len(N)).double()
    starts = (N == 0) & (counts > 0)
    N, z_avg = torch.where(starts, 1, N), torch.where(starts[:, None], embeddings, z_avg)
    N = decay * N + (1 - decay) * counts
    z_avg = decay * z_avg + (1 - decay) * torch.zeros_like(z_avg).index_add_(0, indices, z.double())
    weights = (N + 1e-7) / (N.sum() + len(N) * 1e-7) * N.sum()
    return torch.where((N > 0)[:, None], z_avg / weights[:, None], embeddings)


@pytest.mark.parametrize(
    "options", [{}, {"init": "kmeans"}, {"metric": "cosine"}, {"no_random_restart": False}], ids=str
)
@pytest.mark.parametrize("own", [fresh, trained])
def test_a_functional_call_decides_from_its_own_state(options, own):
    module, state, z = own(**options), copy_of(fresh(1, **options)), 5 + torch.randn(40, 4)
    before = copy_of(module)
    torch.manual_seed(2)
    result = torch.func.functional_call(module, state, (z,))
    assert_equal_states(module, before)
    assert module._need_init == (own is fresh)
    # What a module with that state does.
    other = fresh(1, **options)
    torch.manual_seed(2)
    for a, b in zip(other(z), result, strict=True):
        assert torch.equal(a, b)
    assert_equal_states(other, state)
    for _ in range(3):
        module(z)
        torch.func.functional_call(module, state, (z,))
    for codes in (module.embeddings, state["embeddings"]):
        assert codes.abs().max() < 20


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_functional_call_decides_from_its_own_state(compiler):
    module, z = fresh(), 5 + torch.randn(40, 4)
    call = torch.compile(lambda s, x: torch.func.functional_call(module, s, (x,)), fullgraph=True, backend=compiler)
    states = [copy_of(fresh(1)), copy_of(trained())]
    learned, own = copy_of(trained()), copy_of(module)
    for state in states:
        call(state, z)
    assert_equal_states(module, own)
    assert are_tokens(states[0]["embeddings"][states[0]["N"] < 0.991], z)
    assert torch.allclose(states[1]["N"].sum(), 0.99 * learned["N"].sum() + 0.01 * 40)
    module(z)
    assert are_tokens(module.embeddings[module.N < 0.991], z)


def by_copy(module, codes):
    module.embeddings.copy_(codes)


def by_data(module, codes):
    module.embeddings.data.copy_(codes)


def by_assignment(module, codes):
    module.embeddings = codes.clone()


def by_loading(module, codes):
    module.load_state_dict({**copy_of(module), "embeddings": codes})


@pytest.mark.parametrize("write", [by_copy, by_data, by_assignment, by_loading])
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_codes_written_by_hand_stay_until_they_win_tokens(write, backend):
    module, codes, z = fresh(backend=backend), 100 * torch.randn(12, 4), 100 * torch.randn(5, 4)
    write(module, codes)
    before = copy_of(module)
    for _ in range(3):
        quantized, indices, _ = module(z)
        assert torch.equal(quantized, before["embeddings"][indices])
        expected = moved(before, z, indices)
        # Averages and a division, each rounded to float32.
        assert torch.allclose(module.embeddings.double(), expected, rtol=1e-5, atol=1e-4)
        before = copy_of(module)
    rest = torch.ones(12, dtype=torch.bool).index_fill_(0, indices, False)
    assert rest.any()
    assert torch.equal(module.embeddings[rest], codes[rest])


def test_one_code_written_by_hand_is_enough():
    module = fresh()
    module.embeddings[3] = 7.0
    module(torch.randn(2, 4))
    assert (module.embeddings[3] == 7).all()


@pytest.mark.parametrize("z_avg", [torch.zeros(12, 4), torch.full((12, 4), 9.0), torch.full((12, 4), torch.nan)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("counts", [torch.zeros(12), torch.arange(12.0) % 3])
def test_a_code_without_a_count_stays_whatever_its_average(z_avg, decay, counts):
    codes, z = torch.randn(12, 4), torch.randn(3, 4)
    state = {
        "embeddings": codes,
        "N": counts,
        "z_avg": torch.where(counts[:, None] > 0, codes * counts[:, None], z_avg),
    }
    for restart_options in ({}, {"no_random_restart": False, "restart_thres": 0.0}):
        module = fresh(ema_decay=decay, **restart_options)
        module.load_state_dict(state)
        indices = module(z).indices
        assert torch.allclose(module.embeddings.double(), moved(state, z, indices, decay), atol=1e-5)
        unused = (counts == 0).index_fill_(0, indices, False)
        assert torch.equal(module.embeddings[unused], codes[unused])
        assert module.embeddings.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"no_random_restart": False, "restart_thres": 0.0}, {"metric": "cosine"}])
def test_set_codes_starts_the_averages_there(options):
    codes, counts = torch.randn(12, 4, dtype=torch.float64), torch.arange(12)
    for module in (fresh(**options), trained(**options)):
        with module.accumulate():
            module(torch.randn(9, 4) + 50)  # statistics of other codes
        module.set_codes(codes, counts)
        norms = codes.norm(dim=1, keepdim=True) if module.metric == "cosine" else 1
        assert torch.allclose(module.embeddings.double(), codes / norms, atol=1e-7)
        assert torch.equal(module.N, counts.float())
        assert torch.equal(module.z_avg, module.embeddings * counts[:, None])
        before = module.embeddings.clone()
        quantized, indices, _ = module(codes.float())
        assert torch.equal(quantized, before[indices])
        # A code without a count starts with 1 when it wins a token.
        assert torch.allclose(module.N, 0.99 * counts.clamp(min=1) + 0.01 * torch.bincount(indices, minlength=12))
        assert (module.embeddings - before).abs().max() < 1e-4
        module.set_codes(codes)
        assert torch.equal(module.N, torch.ones(12))
        assert torch.equal(module.z_avg, module.embeddings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(11, 4),), r"codes must be \[12, 4\], got \[11, 4\]"),
        ((torch.ones(12, 4, dtype=torch.int64),), "codes must be a floating-point tensor, got a tensor of torch.int64"),
        (([[1.0]],), "codes must be a floating-point tensor, got list"),
        ((torch.full((12, 4), torch.inf),), "codes must be finite in float32"),
        ((torch.full((12, 4), 1e39, dtype=torch.float64),), "codes must be finite in float32"),
        ((torch.randn(12, 4), torch.ones(11)), r"counts must be \[12\], got \[11\]"),
        ((torch.randn(12, 4), torch.zeros(12)), "counts must be finite, at least 0 and not all 0"),
        ((torch.randn(12, 4), -torch.ones(12)), "counts must be finite, at least 0 and not all 0"),
        ((torch.randn(12, 4), torch.ones(12, dtype=torch.bool)), "counts must be a tensor of numbers"),
        ((torch.zeros(12, 4),), "codes must have no zero row with metric='cosine'"),
    ],
)
def test_set_codes_names_what_is_wrong_and_changes_nothing(arguments, message):
    module = trained(metric="cosine")
    before = copy_of(module)
    with pytest.raises((TypeError, ValueError), match=message):
        module.set_codes(*arguments)
    assert_equal_states(module, before)


def test_the_flag_of_the_published_classes_writes_the_buffers():
    module, z = fresh(), torch.randn(30, 4)
    codes = module.embeddings.clone()
    module._need_init = False
    assert torch.equal(module(z).quantized, codes[module.eval()(z).indices]) or not module._need_init
    assert torch.allclose(module.N.sum(), torch.tensor(0.99 * 12 + 0.01 * 30))
    module.train()._need_init = True
    assert module._need_init
    assert are_tokens(module(z).quantized, z)


def test_modules_pickled_with_a_flag_keep_their_codes():
    for flag in (True, False):
        module = fresh()
        state = {**module.__getstate__(), "_need_init": flag}
        other = fastvq.EMACodebook.__new__(fastvq.EMACodebook)
        other.__setstate__(copy.deepcopy(state))
        assert other._need_init == flag
        assert torch.equal(other.embeddings, module.embeddings)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("made", [fresh, trained])
def test_copies_decide_as_the_original(duplicate, made):
    module = made()
    other, z = duplicate(module), torch.randn(30, 4)
    results = []
    for one in (module, other):
        torch.manual_seed(3)
        results.append(one(z).quantized)
    assert torch.equal(*results)
    assert_equal_states(module, other)


def test_a_checkpoint_that_comes_in_pieces_is_the_checkpoint():
    state = copy_of(trained())
    for order in (("N", "embeddings", "z_avg"), ("embeddings", "N", "z_avg"), ("embeddings", "z_avg", "N")):
        module = fresh(5)
        for name in order:
            module.load_state_dict({name: state[name]}, strict=False)
        assert_equal_states(module, state)
        assert not module._need_init


def test_a_step_that_may_not_look_draws_for_unknown_buffers_only(monkeypatch):
    """As a compiled step, and a GPU's."""
    monkeypatch.setattr("fastvq.nn.first_codes.may_read", lambda tensor: False)
    draws, draw_codes = [], restart.draw_codes
    monkeypatch.setattr(restart, "draw_codes", lambda *args: draws.append(1) or draw_codes(*args))
    module, z = fresh(), torch.randn(30, 4)
    for _ in range(3):
        module(z)
    assert len(draws) == 1
    before = copy_of(module)
    state = copy_of(fresh(1))
    torch.func.functional_call(module, state, (z,))
    assert_equal_states(module, before)
    assert are_tokens(state["embeddings"][state["N"] < 0.991], z)
    state = copy_of(trained())
    counts = state["N"].clone()
    torch.func.functional_call(module, state, (z,))
    assert torch.allclose(state["N"].sum(), 0.99 * counts.sum() + 0.3)
    module(z)
    assert torch.allclose(module.N.sum(), 0.99 * before["N"].sum() + 0.3)
    draws.clear()
    module.load_state_dict(state)
    module(z)
    module.set_codes(torch.randn(12, 4))
    module(z)
    assert not draws


@pytest.mark.parametrize("init", ["first_batch", "kmeans"])
def test_a_gpu_is_read_until_codes_were_seen(monkeypatch, init):
    """A GPU played by the CPU: reading its buffers is possible, and worth it for the module's own alone."""
    monkeypatch.setattr("fastvq.nn.first_codes._reads_freely", lambda tensor: False)
    module, z = fresh(init=init), 5 + torch.randn(40, 4)
    module(z[:0])
    assert module._need_init
    module(z)
    assert (module.embeddings - 5).abs().max() < 6
    assert not module._need_init
    with monkeypatch.context() as patch:
        patch.setattr(fastvq.EMACodebook, "_need_init", property(lambda self: pytest.fail("waited")))
        patch.setattr(restart, "draw_codes", lambda *args: pytest.fail("drew"))
        for _ in range(2):
            module(z)
    before, states = copy_of(module), [copy_of(fresh(1)), copy_of(trained())]
    counts = states[1]["N"].sum()
    for state in states:
        torch.func.functional_call(module, state, (z,))
    assert_equal_states(module, before)
    assert (states[0]["embeddings"] - 5).abs().max() < 6
    assert torch.allclose(states[1]["N"].sum(), 0.99 * counts + 0.4)
    for _ in range(2):
        module(z)
    assert torch.allclose(module.N.sum(), 0.99**2 * before["N"].sum() + (1 - 0.99**2) * 40)


@pytest.mark.parametrize("made", [fresh, trained])
def test_compiled_modules_initialise_once(made):
    module, z = made(), 5 + torch.randn(40, 4)
    before = copy_of(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(z)
    if made is fresh:
        assert (module.embeddings - 5).abs().max() < 6
        assert torch.allclose(module.N.sum(), torch.tensor(0.99**2 * 12 + (1 - 0.99**2) * 40))
    else:
        assert torch.allclose(module.N.sum(), 0.99**2 * before["N"].sum() + (1 - 0.99**2) * 40)
    # By-hand codes stay in compiled steps as well.
    other, codes = fresh(), 100 * torch.randn(12, 4)
    other.embeddings.copy_(codes)
    quantized, indices, _ = torch.compile(other, fullgraph=True, backend="aot_eager")(z)
    assert torch.equal(quantized, codes[indices])
