"""Side by side: complete rows whatever the contenders do, and runs that go on where they were."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import __main__ as command
from bench.contenders import CONTENDERS, SPECIAL, base, offering
from bench.contenders.base import Contender, Prepared, searching
from bench.harness.child import in_child
from bench.harness.options import Options
from bench.harness.outcome import failure
from bench.harness.problems import MODELS, NAMED, Problem, for_cpu, make_inputs, parse_problems, plain
from bench.harness.store import Store
from bench.harness.timed import time_together, wanted
from bench.plans import accuracy, means, memory, roofline, scaling

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = Problem("small", 60, 40, 3)


def options(**changes):
    return replace(Options.checked("cpu", "", "", "", 1, quick=True), **changes)


def measured(names, problem=SMALL, operation="search"):
    rows = wanted(operation, problem, options(), names)
    return time_together(rows, operation, problem, options())


def raising(error):
    def search(problem, batches, codebook):
        raise error

    return Contender(lambda: "broken 1.0", search)


def missing():
    raise ModuleNotFoundError("No module named 'absent'")


@pytest.fixture
def strange(monkeypatch):
    """Contenders that are missing, fail, and take too much memory: when they are prepared, and only while timed."""
    late = iter([torch.zeros(60).long()])
    strangers = {
        "absent": Contender(missing, lambda *_: None),
        "broken": raising(RuntimeError("broken on purpose")),
        "greedy": raising(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")),
        "huge": raising(MemoryError()),
        "late": Contender(lambda: "late 1.0", lambda *_: Prepared(lambda i: next(late), "", lambda found: found)),
        "zeros": Contender(
            lambda: "zeros 1.0", lambda p, batches, e: searching(batches, lambda x: torch.zeros(len(x)).long())
        ),
    }
    for name, contender in strangers.items():
        monkeypatch.setitem(CONTENDERS, name, contender)
    return list(strangers)


def test_a_contender_that_does_not_run_is_a_row_that_says_so(strange):
    rows = {row["contender"]: row for row in measured(["fastvq", *strange, "moshi"])}
    assert {name: row["status"] for name, row in rows.items()} == {
        "fastvq": "ok",
        "absent": "not installed",
        "broken": "failed",
        "greedy": "out of memory",
        "huge": "out of memory",
        "late": "failed",
        "zeros": "ok",
        "moshi": "does not apply",
    }
    assert rows["absent"]["note"] == "No module named 'absent'"
    assert rows["broken"]["note"].startswith("RuntimeError: broken on purpose")
    assert all((row.get("seconds") is None) == (row["status"] != "ok") for row in rows.values())


def test_the_wrong_share_counts_indices_that_differ_from_the_oracle(strange):
    ours, zeros = measured(["fastvq", "zeros"])
    (x,), codebook = make_inputs(SMALL, CPU)
    assert ours["wrong_share"] == 0
    assert zeros["wrong_share"] == pytest.approx((torch.cdist(x, codebook).argmin(1) != 0).double().mean().item())


@pytest.mark.parametrize("name", [*offering("search"), "expanded in half", "half product", "product"])
def test_every_search_answers_or_says_why_not(name):
    problem = replace(SMALL, dtype=torch.bfloat16 if "half" in name else torch.float32, dim=8)
    (row,) = measured([name], problem)
    if row["status"] == "ok":
        assert row["version"]
        assert row["seconds"] > 0
        assert row.get("wrong_share", 0) == 0 or "half" in name
    else:
        assert (name in ("keops", "flash-kmeans"), row["status"]) == (True, "not installed")


@pytest.mark.parametrize("name", offering("train"))
def test_every_training_step_finds_the_nearest_codes_and_moves_them(name):
    (row,) = measured([name], operation="train")
    assert row["status"] == "ok"
    assert row["wrong_share"] == 0
    (x,), codebook = make_inputs(SMALL, CPU)
    prepared = CONTENDERS[name].train(SMALL, [x], codebook)
    assert torch.equal(prepared.call(0), torch.cdist(x, codebook).argmin(1))
    for _ in range(200):
        indices = prepared.call(0)
    assert not torch.equal(indices, torch.cdist(x, codebook).argmin(1))  # the codes have moved


def test_moving_averages_of_moshi_equal_those_of_the_expanded_formula():
    (x,), codebook = make_inputs(SMALL, CPU)
    steps = [CONTENDERS[name].train(SMALL, [x], codebook) for name in ("moshi", "expanded formula", "fastvq")]
    for _ in range(20):
        found = [step.call(0) for step in steps]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_a_matrix_that_does_not_fit_is_made_in_chunks_and_the_row_says_so(monkeypatch):
    monkeypatch.setattr(base, "available_memory", lambda: 7 * 40 * 4 * 4 * 2)
    (row,) = measured(["expanded formula"])
    assert row["note"] == "in chunks of 7 tokens"
    assert row["wrong_share"] == 0
    assert base.tokens_per_chunk(replace(SMALL, whole=True), CPU) == (60, "")


def test_shapes_parse_by_model_and_by_size():
    esm3, size = parse_problems("esm3, 4096×1000x8")
    assert esm3 == NAMED["esm3"]
    assert (size.tokens, size.codes, size.dim) == (4096, 1000, 8)
    assert len({problem.name for problem in MODELS}) == len(MODELS)


@pytest.mark.parametrize("text", ["esm4", "3x4", "0x4x4", "3x4x5x6", "axbxc"])
def test_an_unknown_shape_is_refused_with_the_names_that_exist(text):
    with pytest.raises(ValueError, match=r"tokens×codes×dim or one of llamagen, .*got '"):
        parse_problems(text)


def test_batches_of_models_are_cut_for_a_cpu_and_sizes_given_are_not():
    assert for_cpu(NAMED["simvq"]).tokens == 2048
    assert plain(NAMED["unitok"]) == replace(NAMED["unitok"], heads=1, metric="euclidean")
    given = options(shapes=tuple(parse_problems("9000x4x4,esm3")))
    assert [problem.tokens for problem in given.problems((), ())] == [9000, 2048]


def test_tokens_near_codes_have_those_codes_nearest():
    (x,), codebook = make_inputs(Problem("near", 50, 20, 64), CPU, kind="near")
    assert torch.cdist(x, codebook).amin(1).max() < 2


def test_half_precision_products_lose_the_index_where_fastvq_does_not():
    problem = Problem("esm3", 64, 4096, 128, dtype=torch.bfloat16)
    rows = wanted("accuracy", problem, options(), ["fastvq", "half product", "expanded in half"], offset=3.0)
    ours, half, expanded = accuracy.judge(rows, problem, 3.0, CPU)
    assert ours["wrong_share"] == 0
    assert half["wrong_share"] > 0.3
    assert expanded["wrong_share"] > 0.3
    float32 = replace(problem, dtype=torch.float32)
    (row,) = accuracy.judge(wanted("accuracy", float32, options(), ["half product"], offset=3.0), float32, 3.0, CPU)
    assert row["status"] == "does not apply"


def test_the_error_of_a_mean_is_told_in_units_in_the_last_place():
    rows = wanted("means", Problem("means", 20_000, 1, 2), options(), list(means.MEANS), offset=1e6)
    found = {row["contender"]: row for row in means.judge(rows, CPU)}
    assert all(found[name]["error_ulp"] <= 1 for name in found if name.startswith("fastvq"))
    assert found["float32 sums"]["error_ulp"] > 5
    assert {row["status"] for row in found.values()} == {"ok"}
    asked = [row for group in means.plan(options(quick=False)) for row in group.wanted]
    assert {row["offset"] for row in asked} == {0, 1e2, 1e4, 1e6}
    assert {row["tokens"] for row in asked} == {10**3, 10**4, 10**5, 10**6, 10**7}


def test_accuracy_is_asked_for_every_dtype_and_offset():
    rows = [row for group in accuracy.plan(options(quick=False)) for row in group.wanted]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert {row["offset"] for row in rows} == {0, 1, 3, 10, 30, 100}
    assert not any(row["contender"] in SPECIAL for row in rows if row["dtype"] == "float32")


def test_the_exponent_of_a_power_law_is_found():
    sizes = [10, 100, 1000]
    assert scaling.slope(sizes, [3e-6 * n**1.25 for n in sizes]) == pytest.approx(1.25)
    assert scaling.slope([10], [1]) != scaling.slope([10], [1])  # NaN


def test_the_growth_of_memory_is_told_from_what_stays():
    codes = [256, 4096, 65_536]
    found = memory.growth(codes, [1000 + 3 * 4 * 64 * k for k in codes], tokens=2048, dim=64)
    assert found["codebooks"] == pytest.approx(3)
    assert found["matrices"] == pytest.approx(3 * 64 / 2048)
    assert found["least"] == pytest.approx(1000, abs=1e-3)
    assert found["most"] == pytest.approx(1000, abs=1e-3)
    assert found["flat_from"] == math.inf
    assert memory.growth([1, 4, 16, 64], [100, 300, 310, 296], tokens=8, dim=8)["flat_from"] == 4


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a resident set is read from /proc")
def test_memory_is_measured_in_a_process_of_its_own():
    problem = Problem("memory", 4096, 8192, 16, whole=True)
    matrix = 4 * problem.tokens * problem.codes
    extra = {}
    for name in ("fastvq", "expanded formula"):
        (row,) = wanted("memory", problem, options(), [name], operation="train")
        extra[name] = in_child(memory.extra_resident, (row, problem, 1), preload=("bench.plans.memory",))["extra_bytes"]
    assert 0 < extra["fastvq"] < 0.25 * matrix
    assert 2.9 * matrix < extra["expanded formula"] < 3.6 * matrix


def test_a_process_that_raises_or_dies_is_a_row_that_says_so():
    assert in_child(failure, (ValueError("told"),))["note"] == "ValueError: told"
    assert in_child(len, (1,))["note"].startswith("TypeError")
    assert in_child(os._exit, (7,)) == {"status": "failed", "note": "its process ended with exit code 7"}
    assert in_child(signal.raise_signal, (signal.SIGKILL,))["status"] == "out of memory"


def test_shares_of_the_limit_follow_from_rates():
    row = {"tokens": 100, "codes": 1000, "dim": 64, "dtype": "float32", "seconds": 1.0}
    limits = {"product": 2 * 100 * 1000 * 64 * 4.0, "copy": 1e18}
    assert roofline.share_of_limit(row, limits) == pytest.approx(0.25)
    assert roofline.share_of_limit(row, {"product": 1e18, "copy": roofline.least_bytes(row)}) == pytest.approx(1)
    assert roofline.share_of_limit({**row, "seconds": None}, limits) is None


@pytest.fixture
def cli(monkeypatch):
    """The command in this process, which keeps its own memory limit; how often groups are measured is counted."""
    monkeypatch.setattr(command, "limit_memory", lambda: None)
    monkeypatch.setattr(roofline, "measure", lambda rows, device: [{**row, "rate": 1e9} for row in rows])

    def run(*arguments):
        return CliRunner().invoke(command.app, [*map(str, arguments)])

    return run


def test_a_second_run_measures_only_what_is_not_there(cli, tmp_path):
    arguments = ["--contenders", "fastvq,cdist", "--device", "cpu", "--repeats", 2, "--out", tmp_path]
    assert cli("search", "--shapes", "30x20x2", *arguments).exit_code == 0
    first = Store(tmp_path / "results.json").rows
    result = cli("search", "--shapes", "30x20x2,31x20x2", *arguments)
    assert result.exit_code == 0
    assert "30 × 20 × 2" in result.output
    second = Store(tmp_path / "results.json").rows
    assert second[: len(first)] == first  # the times, too
    searched = [row for row in second if row["benchmark"] == "search"]
    assert [(row["tokens"], row["contender"]) for row in searched] == [
        (30, "fastvq"),
        (30, "cdist"),
        (31, "fastvq"),
        (31, "cdist"),
    ]
    assert (tmp_path / "results.csv").read_text().startswith("benchmark,")


def test_another_machine_measures_again(tmp_path):
    store = Store(tmp_path / "results.json")
    row = {"benchmark": "search", "contender": "fastvq"}
    store.measured_on({"device": "one", "date": "2026-01-01"})
    store.put([{**row, "seconds": 1}])
    store.measured_on({"device": "one", "date": "2026-01-02"})
    assert store.has([row])
    store.measured_on({"device": "two", "date": "2026-01-02"})
    assert not store.has([row])
    store.put([{**row, "seconds": 2}])
    head, rows = Store(store.path).latest("search")
    assert head["device"] == "two"
    assert [row["seconds"] for row in rows] == [2]
    assert len(Store(store.path).rows) == 2


def test_of_two_sweeps_and_two_machines_nothing_is_mixed(tmp_path):
    store = Store(tmp_path / "results.json")
    store.measured_on({"device": "one"})
    store.put([{"benchmark": "limits", "name": "product", "rate": 1.0}])
    store.put([{"benchmark": "memory", "name": name, "contender": "fastvq"} for name in ("small", "large")])
    assert [row["name"] for row in store.latest("memory")[1]] == ["large"]
    store.measured_on({"device": "two"})
    store.put([{"benchmark": "search", "name": "esm3", "contender": "fastvq"}])
    assert roofline.limits_of(store, store.latest("memory")[1]) == {"product": 1.0}
    assert roofline.limits_of(store, store.latest("search")[1]) == {}


def test_an_interrupted_run_keeps_what_is_done_and_ends_with_130(tmp_path):
    arguments = ["search", "--contenders", "fastvq", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    shapes = ",".join(f"{n}x20x2" for n in range(20, 4000))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", *arguments, "--shapes", shapes],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = tmp_path / "results.json"
    end = time.monotonic() + 300
    while not (path.exists() and '"search"' in path.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 130, said
    assert "the same command goes on from there" in " ".join(said.split())
    rows = json.loads(path.read_text())["rows"]
    assert [row["tokens"] for row in rows if row["benchmark"] == "search"][:1] == [20]
    assert len(rows) < 3980


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["search", "--contenders", "annoy"], "annoy"),
        (["train", "--repeats", "0"], "--repeats"),
        (["memory", "--shapes", "huge"], "huge"),
        (["memory", "--shapes", "esm3,9x8x7"], "shapes must be one for memory, got 2"),
        (["accuracy", "--dtype", "int8"], "int8"),
        (["report", "absent.json"], "absent.json"),
    ],
)
def test_wrong_options_end_with_a_message(arguments, named, tmp_path, cli):
    result = cli(*arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert named in result.output
