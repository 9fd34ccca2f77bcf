"""Real processes over gloo: one codebook, bit for bit, and the one that a single process would have learned."""

import math
import subprocess
import sys

import pytest
import rank_programs
import torch
from checkout import environment
from rank_programs import CODES, STEPS, batch, batches_of_model, encoder, far_tokens, fit, trained_codebook

from fastvq import reference

PAIR = (
    "data_parallel",
    "data_parallel_without_broadcast",
    "fully_sharded",
    "cast_by_fsdp",
    "loaded_by_rank_0",
    "clustered",
    "clustered_with_weights",
    "accumulated",
    "far_from_zero",
    "compiled",
    "compiled_data_parallel",
    "local",
)


def launch(programs, world_size, folder):
    command = [sys.executable, rank_programs.__file__, *programs]
    return [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(folder)], env=environment(), stderr=subprocess.PIPE, text=True
        )
        for rank in range(world_size)
    ]


def run(programs, world_size, folder):
    """Results of the programs by name, a list with an entry for every rank."""
    ranks = launch(programs, world_size, folder)
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=500)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
    results = [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]
    return {name: [result[name] for result in results] for name in programs}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run(("with_restart", "without_restart"), 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return run(("subgroup",), 3, tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(PAIR, 2, tmp_path_factory.mktemp("two"))


def assert_same_on_every_rank(results):
    first, *others = results
    for other in others:
        for a, b in zip(first, other, strict=True):
            for name in a:
                assert torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])), name


def assert_close(state, expected, tolerance=1e-6):
    for name, value in expected.items():
        assert (state[name] - value).norm() <= tolerance * value.norm(), name


def real_tokens(step, ranks):
    pairs = [batch(step, rank) for rank in ranks]
    return [tokens[mask & tokens.isfinite().all(1)] for tokens, mask in pairs]


@pytest.mark.parametrize("program", ["with_restart", "without_restart"])
def test_four_ranks_agree_bitwise_after_each_of_100_steps(four, program):
    assert_same_on_every_rank(four[program])
    assert len(four[program][0]) == STEPS


def test_four_ranks_learn_what_one_process_learns_from_all_tokens(four):
    module = trained_codebook()
    for step in range(STEPS):
        module(torch.cat(real_tokens(step, range(4))))
        assert_close(four["without_restart"][0][step], module.state_dict())


def test_restarted_codes_are_tokens_of_any_rank_and_all_others_follow_the_formula(four):
    owners, expected_owners = torch.zeros(4), torch.zeros(4)
    states = four["with_restart"][0]
    for step in range(1, STEPS):
        before, after = states[step - 1], states[step]
        parts = real_tokens(step, range(4))
        tokens = torch.cat(parts)
        counts, sums = reference.code_statistics(tokens, reference.nearest_code(tokens, before["embeddings"]), CODES)
        expected = {"N": 0.99 * before["N"] + 0.01 * counts, "z_avg": 0.99 * before["z_avg"] + 0.01 * sums}
        assert_close(after, expected)
        n = expected["N"].sum()
        codes = expected["z_avg"] / ((expected["N"] + 1e-7) / (n + CODES * 1e-7) * n)[:, None]
        dead = after["N"] < 1
        assert_close({"kept": after["embeddings"][~dead]}, {"kept": codes[~dead]})
        if len(tokens) < CODES:
            continue  # a rank with few tokens repeats them with noise
        sizes = torch.tensor([len(part) for part in parts])
        expected_owners += dead.sum() * sizes / sizes.sum()
        owner = torch.repeat_interleave(torch.arange(4), sizes)
        for row in after["embeddings"][dead]:
            apart, nearest = (tokens - row).abs().amax(1).min(0)
            assert apart < 0.05  # ten standard deviations of the noise, 0.01/√D
            owners[owner[nearest]] += 1
    assert owners.sum() > 100
    # Each token is as likely as any other; with n draws of two outcomes six standard deviations are at most 3√n.
    assert ((owners - expected_owners).abs() < 3 * owners.sum().sqrt()).all()


def test_first_batch_is_drawn_where_there_are_tokens(four):
    assert len(real_tokens(0, [0])[0]) == 0
    tokens = torch.cat(real_tokens(0, range(4)))
    first = four["with_restart"][0][0]
    codes = (first["z_avg"] / 0.99)[first["N"] < 0.9901]  # codes that won nothing in the first step
    assert len(codes) > 0
    assert (torch.cdist(codes, tokens).amin(1) < 0.05).all()


@pytest.mark.parametrize("program", [name for name in PAIR if name != "local"])
def test_two_ranks_agree_bitwise(two, program):
    assert_same_on_every_rank(two[program])


@pytest.mark.parametrize("program", ["data_parallel", "data_parallel_without_broadcast", "fully_sharded"])
def test_wrapped_models_learn_what_one_process_learns(two, program):
    model = encoder()
    fit(model, [torch.cat(parts) for parts in zip(*map(batches_of_model, range(2)), strict=True)])
    # Ten steps of an encoder whose gradients are summed in another order.
    assert_close(two[program][0][0], model[1].state_dict(), 1e-5)


def test_a_cast_of_the_buffers_by_fsdp_changes_no_bit(two):
    plain, cast = two["cast_by_fsdp"][0]
    for name, value in plain.items():
        assert torch.equal(cast[name], value), name


def test_a_codebook_of_some_ranks_is_theirs_alone(three):
    outside, *members = three["subgroup"]
    assert outside == []
    assert_same_on_every_rank(members)
    found, clustered, *states = members[0]
    assert found["counts"].sum() == 400
    assert clustered["N"].sum() > CODES
    module = trained_codebook()
    for step in range(5):
        module(torch.cat(real_tokens(step, (1, 2))))
        assert_close(states[20 + step], module.state_dict())
    for step in range(2):
        module(torch.cat(real_tokens(step, (1, 2))))
        assert_close(states[25 + step], module.state_dict())


def test_compiled_models_count_the_tokens_of_all_ranks(two):
    (state,) = two["compiled_data_parallel"][0]
    n_tokens = 60
    assert torch.allclose(state["N"].sum(), torch.tensor(n_tokens - (n_tokens - CODES) * 0.99**4))


def test_state_that_only_rank_0_has_loaded_is_not_initialised_again(two):
    before, after = two["loaded_by_rank_0"][0]
    assert torch.equal(before["embeddings"], trained_codebook().embeddings)
    n_tokens = 60
    assert torch.allclose(after["N"].sum(), torch.tensor(0.99 * CODES + 0.01 * n_tokens))


def test_kmeans_sees_the_tokens_of_all_ranks(two):
    found, state = two["clustered"][0]
    assert found["counts"].sum() == 400
    assert found["counts"].min() > 0
    # The ranks' tokens lie 6 apart; codes of one rank's tokens alone would leave 36 per token of the other.
    assert found["inertia"] / 400 < 36
    assert state["N"].sum() > CODES


def test_kmeans_of_all_ranks_has_exact_means_far_from_zero(two):
    (found,) = two["clustered_with_weights"][0]
    *x, weights, labels = found["tokens"][found["tokens"][:, -1] >= 0].double().T
    x, labels = torch.stack(x, 1), labels.long()
    assert len(x) == 250
    assert torch.equal(found["counts"], torch.bincount(labels))
    for k in range(3):
        mine = labels == k
        mean = (weights[mine, None] * (x[mine] - 1e6)).sum(0) / weights[mine].sum() + 1e6
        assert ((found["codes"][k] - mean).abs() <= 0.5001 * 2**-4).all()  # half a unit of float32 at 1e6
    inertia = (weights * (x - found["codes"].double()[labels]).square().sum(1)).sum()
    assert found["inertia"] == pytest.approx(float(inertia), rel=1e-9)


def test_ranks_may_accumulate_different_numbers_of_batches(two):
    tokens = [
        torch.cat([*(real_tokens(step, [rank])[0] for step in range(1 + 2 * rank)), real_tokens(3, [rank])[0]])
        for rank in range(2)
    ]
    module = trained_codebook()
    module(torch.cat(tokens))
    assert_close(two["accumulated"][0][0], module.state_dict())


def test_means_of_all_ranks_are_rounded_once(two):
    columns = torch.cat([far_tokens(0), far_tokens(1)]).t().tolist()
    exact = torch.tensor([math.fsum(column) / len(column) for column in columns], dtype=torch.float64)
    codes = two["far_from_zero"][0][0]["embeddings"][0].double()
    assert ((codes - exact).abs() <= (2.0**-24 + 2.0**-40) * exact).all()


def test_without_sync_every_process_has_its_own(two):
    for rank, (state,) in enumerate(two["local"]):
        module = trained_codebook()
        for step in range(5):
            module(real_tokens(step, [rank])[0])
        assert_close(state, module.state_dict())


def test_a_killed_rank_ends_the_others_with_an_error(tmp_path):
    ranks = launch(["one_is_killed"], 2, tmp_path)
    try:
        _, errors = ranks[0].communicate(timeout=400)
        assert ranks[0].returncode not in (0, None)
        assert "RuntimeError" in errors or "DistBackendError" in errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
