"""The example as a user runs it: on one process, stopped and continued, and on two."""

import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer
from checkout import ROOT, environment

SCRIPT = str(ROOT / "examples" / "train_vqvae.py")
TINY = ("--codes", "24", "--dim", "6", "--batch", "4", "--crop", "16", "--device", "cpu")
STEPS = "60"


def start(*arguments, launcher=()):
    # One thread, as torchrun sets it: more would wait for those of other tests.
    env = environment(OMP_NUM_THREADS="1")
    command = [sys.executable, *launcher, SCRIPT, *TINY, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    return process.returncode, output


def run(*arguments, launcher=()):
    code, output = finish(start(*arguments, launcher=launcher))
    assert code == 0, output
    return output


def load(folder):
    return torch.load(folder / "state.pt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, run("--steps", STEPS, "--out", folder)


def test_pictures_and_state_are_written(finished):
    folder, output = finished
    assert sorted(path.name for path in folder.iterdir()) == ["pictures.png", "state.pt", "training.png"]
    for name in ("pictures.png", "training.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "PSNR of the held-out crops" in output


def test_loss_goes_down(finished):
    loss = torch.tensor(load(finished[0])["history"])[:, 0]
    assert len(loss) == int(STEPS)
    assert loss[-10:].mean() < loss[:10].mean() / 2


def test_interrupted_run_saves_and_continues_bit_for_bit(finished, tmp_path):
    arguments = ("--steps", STEPS, "--out", tmp_path)
    process = start(*arguments, "--save-every", 1)
    while not (tmp_path / "state.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "the same command continues" in output
    assert len(load(tmp_path)["history"]) < int(STEPS)
    run(*arguments)
    torch.testing.assert_close(load(tmp_path), load(finished[0]), rtol=0, atol=0)


def test_other_options_do_not_overwrite_a_run(finished):
    folder = finished[0]
    before = (folder / "state.pt").read_bytes()
    with pytest.raises(typer.BadParameter, match=r"holds a run with .*'seed': 0.* this one has .*'seed': 1"):
        runpy.run_path(SCRIPT)["main"](codes=24, dim=6, batch=4, crop=16, device="cpu", seed=1, out=folder)
    assert (folder / "state.pt").read_bytes() == before


def test_two_processes_train_one_codebook(tmp_path):
    """The script fails where the codes of its ranks differ in a bit."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output = run("--steps", 6, "--out", tmp_path, launcher=torchrun)
    assert output.count("PSNR of the held-out crops") == 1
    assert "Warning" not in output
    state = load(tmp_path)
    assert state["options"]["processes"] == 2
    assert len(state["history"]) == 6
