"""The GPU benchmark's code paths, at tiny sizes on the CPU with interpreted kernels."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.contenders.base import Prepared
from bench.gpu import command as gpu
from bench.gpu import sweep
from bench.gpu.kernels import stage_name
from bench.gpu.problems import MODELS, PUBLISHED, published, tiny
from bench.gpu.rows import RIVALS, measure
from bench.gpu.stage import Stage
from bench.gpu.summary import failures, summary
from bench.gpu.workers import Workers
from fastvq_kernels.configs import TOKEN_TILE, packed_width

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def command(out, *arguments):
    return [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(out), *arguments]


def environment():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        command(out, "--in-process"), env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture
def document(dry_run):
    return json.loads((dry_run[0] / "gpu.json").read_text())


@pytest.fixture
def stage():
    return Stage("test", CPU, time.monotonic() + 60, lambda document: None, dry=True)


def test_every_stage_ends_with_rows(document):
    assert list(document["stages"]) == list(gpu.STAGES)
    assert {name: stage["status"] for name, stage in document["stages"].items()} == dict.fromkeys(gpu.STAGES, "ok")
    assert all(stage["rows"] for stage in document["stages"].values())
    assert {"device", "versions", "date", "commit", "sources"} <= set(document["head"])


def test_indices_are_right_in_every_stage(document):
    rows = [row for stage in document["stages"].values() for row in stage["rows"]]
    judged = [row["passed"] for row in rows if row.get("passed") is not None]
    assert len(judged) > 10
    assert all(judged)
    sampled = next(row for row in document["stages"]["exactness"]["rows"] if "checks" in row)
    assert {"oracle", "batch splits"} < set(sampled["checks"])
    assert all(row["differ"] == 0 for row in document["stages"]["sweep"]["rows"])


def test_contenders_stand_beside_each_other(document):
    rows = {row["contender"]: row for row in document["stages"]["timing"]["rows"]}
    assert list(rows) == list(RIVALS)
    for name in ("fastvq", "fastvq packed", "product", "cdist", "expanded formula"):
        assert rows[name]["status"] == "ok"
        assert rows[name]["seconds"] > 0
    assert rows["fastvq"]["times_product"] == pytest.approx(rows["fastvq"]["seconds"] / rows["product"]["seconds"])
    assert rows["fastvq packed"]["open_share"] >= 0
    assert rows["fastvq"]["stages"]["seconds"]["torch"] > 0


def test_the_summary_comes_last_and_fits_the_end_of_a_log(dry_run, document):
    out, printed = dry_run
    assert printed.rstrip().splitlines()[-1] == "RESULT: no failure"
    assert (out / "summary.md").read_text().rstrip().endswith("RESULT: no failure")
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "summary.md"]
    document["stages"]["timing"]["rows"] = [
        row | {"name": f"size {i}"} for i in range(200) for row in document["stages"]["timing"]["rows"]
    ]
    whole, short = summary(document)
    assert len(short) < 12_000 < len(whole)
    assert "does not fit here, see summary.md" in short


def test_a_wrong_index_is_reported_loudly(document):
    assert failures(document) == []
    document["stages"]["exactness"]["rows"][0] |= {"passed": False, "result": "3 wrong"}
    document["stages"]["flash"]["status"] = "cut"
    assert len(failures(document)) == 1
    short = summary(document)[1]
    assert "WRONG OR FAILED" in short
    assert "3 wrong" in short
    assert short.rstrip().endswith("RESULT: 1 FAILURES, see above")


def test_an_interrupted_run_keeps_the_stages_that_ended(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--stages", "device,exactness"), env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    path = tmp_path / "gpu.json"
    end = time.monotonic() + 300
    while not (path.exists() and '"exactness": {' in path.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(200) == 128 + signal.SIGTERM
    stages = json.loads(path.read_text())["stages"]
    assert stages["device"]["status"] == "ok"
    assert len(stages["device"]["rows"]) == 3
    assert stages["exactness"]["status"] == "failed"
    assert stages["exactness"]["notes"] == ["interrupted"]


def test_stages_beyond_the_budget_are_cut_and_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    code = gpu.main(["--dry-run", "--out", str(tmp_path), "--budget-seconds", "3", "--stages", "smoke,sweep"])
    assert code == 0
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {"smoke": "cut", "sweep": "cut"}
    assert "cut: the budget of 3 s is spent" in capsys.readouterr().out


def test_a_stage_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu, "_START_SECONDS", 0)
    monkeypatch.setattr(gpu, "_GRACE_SECONDS", 0.1)
    code = gpu.main(["--dry-run", "--out", str(tmp_path), "--budget-seconds", "0.1", "--stages", "smoke"])
    assert code == 1
    stage = json.loads((tmp_path / "gpu.json").read_text())["stages"]["smoke"]
    assert (stage["status"], stage["rows"]) == ("failed", [])
    assert stage["notes"] == ["killed: it had not ended 0.1 s after its limit"]


def test_a_stage_out_of_time_names_what_it_leaves_out(stage):
    stage.deadline = time.monotonic() - 1
    stage.run(lambda stage: [stage.add({"item": item}) for item in stage.while_time(["a", "b"])])
    assert (stage.document["status"], stage.document["rows"]) == ("cut", [])
    assert stage.document["notes"] == ["cut: no time for a, b"]


def test_a_stage_that_raises_keeps_its_rows_and_its_traceback(stage, capsys):
    def broken(stage):
        with stage.guarded("first"):
            raise ValueError("only this row")
        raise RuntimeError("broken on purpose")

    published = []
    stage.publish = lambda document: published.append(json.loads(json.dumps(document)))
    stage.run(broken)
    assert [len(document["rows"]) for document in published] == [0, 1, 1]
    assert published[-1]["status"] == "failed"
    assert "broken on purpose" in published[-1]["traceback"]
    assert published[-1]["rows"][0]["result"].startswith("ValueError: only this row")
    assert "broken on purpose" in capsys.readouterr().out


def test_a_contender_that_raises_is_a_row_that_says_so(stage):
    def broken(problem, batches, codebook):
        raise RuntimeError("broken on purpose")

    def late(problem, batches, codebook):
        calls = iter([0, 0])  # one to see the result, one for the memory
        return Prepared(lambda i: next(calls))

    contenders = {"broken": broken, "late": late, "product": RIVALS["product"]}
    rows = measure(stage, tiny(PUBLISHED[0]), contenders)
    assert [(row["contender"], row["status"]) for row in rows] == [
        ("broken", "failed"),
        ("late", "failed"),
        ("product", "ok"),
    ]
    assert rows[0]["note"].startswith("RuntimeError: broken on purpose")
    assert rows[1]["note"].startswith("StopIteration")
    assert rows[2]["seconds"] > 0


def tasks(function, *arguments):
    return {argument: partial(function, argument) for argument in arguments}


def test_tasks_of_other_processes_may_raise_die_or_hang():
    end = time.monotonic() + 300
    workers = Workers(2)
    roots = {number: (result, error) for number, result, error in workers.run(tasks(math.sqrt, 4.0, -1.0), end)}
    assert roots[4.0] == (2.0, "")
    assert roots[-1.0][1].startswith("ValueError")
    (died,) = workers.run(tasks(os._exit, 7), end)
    assert died.error == "its process ended with exit code 7"
    (hung,) = workers.run(tasks(time.sleep, 60), time.monotonic() + 0.5)
    assert hung.error == "cut: no time left"
    workers.end()


def test_variations_are_valid_and_begin_with_the_default():
    for width in sweep.WIDTHS:
        configs = sweep.variations(width)
        assert configs[0] == sweep.scan_config(width)
        assert len(set(configs)) == len(configs) > 10
        assert all(TOKEN_TILE % config.block_m == 0 for config in configs)
        assert packed_width(sweep.WIDTHS[width]) == width


def test_a_winner_is_printed_in_the_form_of_the_configuration_table():
    config = dataclasses.replace(sweep.scan_config(64, "sm_90"), block_m=64)
    assert eval(sweep.paste(config), {"ScanConfig": sweep.ScanConfig}) == config


def test_kernels_are_told_from_those_of_pytorch():
    assert stage_name("scan_kernel") == "scan"
    assert stage_name("pack_tokens_kernel") == "pack_tokens"
    assert stage_name("void at::native::vectorized_elementwise_kernel<4>(int)") == "torch"
    assert stage_name("Memset (Device)") == "torch"


def test_problems_have_one_name_each():
    assert len({problem.name for problem in MODELS}) == len(MODELS)
    assert len(set(published(quick=False))) == 16
    assert PUBLISHED[0].flop == 2 * 65_536 * 16_384 * 64


@pytest.mark.parametrize("arguments", [["--stages", "walk"], []])
def test_wrong_options_end_with_a_message(arguments, capsys):
    with pytest.raises(SystemExit):
        gpu.main([*arguments, "--device", "cpu"])
    assert ("walk" if arguments else "--dry-run") in capsys.readouterr().err
