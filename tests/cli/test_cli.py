import json
import re
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from checkout import run
from PIL import Image
from typer.testing import CliRunner

import fastvq
from fastvq import reference
from fastvq.cli import app as cli
from fastvq.cli import info, main
from fastvq.cli.demo import photos
from fastvq.cli.demo import run as demo
from fastvq.cpu import search as cpu_search


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(demo, "_TOKENS_PER_STEP", 1024)


@pytest.fixture
def picture(tmp_path):
    """A small photograph whose sides are no multiples of a patch."""
    rows, columns = np.mgrid[0:45, 0:62]
    pixels = np.stack([rows * 4, columns * 4, (rows * columns) % 256], 2).astype(np.uint8)
    path = tmp_path / "small.png"
    Image.fromarray(pixels).save(path)
    return path


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def assert_one_line_error(result, *parts: str, code: int = 2):
    assert result.exit_code == code, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for part in ("fastvq: ", *parts):
        assert part in result.stderr


def test_demo_writes_pictures_and_numbers(picture, tmp_path):
    out = tmp_path / "results" / "demo"
    result = invoke("demo", "--photo", picture, "--codes", 64, "--steps", 5, "--device", "cpu", "--out", out)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["reconstruction.png", "result.json", "training.png"]
    for name in ("reconstruction.png", "training.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 300
    numbers = json.loads((out / "result.json").read_text())
    assert numbers["photos"][0]["name"] == "small.png"
    assert numbers["photos"][0]["size"] == [62, 45]
    assert 10 < numbers["psnr_db"] < 60
    assert numbers["bits_per_pixel"]["fixed"] == 6 / 16
    assert 0 < numbers["bits_per_pixel"]["entropy_coded"] <= 6 / 16
    assert 0 < numbers["usage"]["photos"] <= 1
    assert 1 <= numbers["perplexity"]["training"] <= 64
    assert numbers["seconds"]["per_training_step"] > 0
    assert numbers["settings"]["codes"] == 64
    assert numbers["versions"]["torch"] == torch.__version__
    compared = numbers["comparison"]
    assert compared["fastvq"]["indices_equal_to_oracle"] == 1
    assert compared["speed_up"] == compared["reference"]["seconds"] / compared["fastvq"]["seconds"]
    assert min(compared[name]["peak_extra_bytes"] for name in ("fastvq", "reference")) > 0
    for text in ("dB", "bits per pixel", "perplexity", "as fast", str(out.name)):
        assert text in result.output


def test_demo_is_repeatable(picture, tmp_path):
    numbers = []
    for name in ("first", "second"):
        out = tmp_path / name
        assert invoke("demo", "--photo", picture, "--codes", 32, "--steps", 2, "--out", out).exit_code == 0
        numbers.append(json.loads((out / "result.json").read_text()))
    for key in ("photos", "psnr_db", "bits_per_pixel", "usage", "perplexity"):
        assert numbers[0][key] == numbers[1][key]


def test_demo_of_a_picture_of_one_colour(tmp_path):
    path, out = tmp_path / "plain.png", tmp_path / "out"
    Image.new("L", (20, 20), 51).save(path)
    result = invoke("demo", "--photo", path, "--codes", 1, "--steps", 1, "--out", out)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "result.json").read_text())["psnr_db"] is None
    assert "lossless" in result.output


@pytest.mark.parametrize("content", [b"no picture", b"", b"\x89PNG\r\n\x1a\n", None])
def test_unreadable_photo_is_one_line_and_nothing_written(tmp_path, content):
    path, out = tmp_path / "broken.png", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    result = invoke("demo", "--photo", path, "--out", out)
    assert_one_line_error(result, "cannot read photograph", "broken.png")
    assert not out.exists()


def test_truncated_photo_is_one_line(picture, tmp_path):
    picture.write_bytes(picture.read_bytes()[:300])
    assert_one_line_error(invoke("demo", "--photo", picture, "--out", tmp_path / "out"), "cannot read photograph")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", -1), "steps must be at least 1, got -1"),
        (("--codes", 0), "codes must be at least 1, got 0"),
        # 48 x 64 pixels after padding
        (("--codes", 100_000), "codes must be at most 2745, the number of patches in the photographs, got 100000"),
        (("--patch", 0), "patch must be at least 1, got 0"),
        (("--patch", 46), "patch must fit into small.png (62 x 45 pixels), got 46"),
        (("--seed", -5), "seed must be at least 0, got -5"),
        (("--device", "tpu"), "device must be one of auto, cpu, cuda, got 'tpu'"),
        (("--device", "cuda"), "PyTorch finds no GPU"),
    ],
)
def test_wrong_options_are_one_line_and_nothing_written(picture, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    result = invoke("demo", "--photo", picture, "--out", out, *options)
    assert_one_line_error(result, message)
    assert not out.exists()


def test_out_that_is_a_file_is_one_line(picture):
    result = invoke("demo", "--photo", picture, "--out", picture)
    assert_one_line_error(result, "out must be a directory, got the file")


@pytest.mark.parametrize("module", ["sklearn", "PIL", "matplotlib"])
def test_missing_extra_names_the_command_that_installs_it(tmp_path, monkeypatch, module):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("run", "photos", "pictures"):
        monkeypatch.delitem(sys.modules, f"fastvq.cli.demo.{name}", raising=False)
        monkeypatch.delattr(fastvq.cli.demo, name, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    result = invoke("demo", "--out", tmp_path / "out")
    assert_one_line_error(result, module, 'pip install "fastvq-triton[demo]"')
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_command_line_without_its_extra_is_one_line(module):
    done = run("-c", f"import sys; sys.modules[{module!r}] = None; from fastvq.cli import main; main()")
    assert done.returncode == 2
    assert done.stderr == f'fastvq: the command line needs {module}: pip install "fastvq-triton[cli]"\n'


def test_interrupt_exits_130_and_writes_nothing(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "learn", Mock(side_effect=KeyboardInterrupt))
    result = invoke("demo", "--photo", picture, "--codes", 8, "--out", tmp_path / "out")
    assert_one_line_error(result, "interrupted, nothing written", code=130)
    assert not (tmp_path / "out").exists()


def test_failed_write_leaves_old_results_and_no_scraps(tmp_path):
    out = tmp_path / "out"
    demo.write({"a": b"old"}, out)
    with pytest.raises(TypeError):
        demo.write({"a": b"new", "b": "not bytes"}, out)
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [("a", b"old")]
    with pytest.raises(TypeError):
        demo.write({"b": "not bytes"}, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_verify_exits_0_on_a_subset():
    result = invoke("verify", "--device", "cpu", "--only", "ties")
    assert result.exit_code == 0, result.output
    assert "rows passed" in result.output


def test_verify_exits_1_when_a_backend_is_wrong(monkeypatch):
    monkeypatch.setattr(cpu_search, "nearest_code", lambda *problem: reference.nearest_code(*problem[:3]) * 0)
    result = invoke("verify", "--device", "cpu", "--only", "lattice")
    assert result.exit_code == 1
    assert "1 failed" in result.output


def test_verify_without_a_matching_case_is_one_line():
    assert_one_line_error(invoke("verify", "--only", "no such case"), "only must be part of the name of a case")


@pytest.mark.parametrize(("units", "products"), [("AMX", "bfloat16 first (AMX)"), (None, "searches float32")])
def test_info_shows_versions_device_and_backend(monkeypatch, units, products):
    monkeypatch.setattr(info, "bfloat16_units", lambda: units)
    result = invoke("info", "--device", "cpu")
    assert result.exit_code == 0
    for text in (fastvq.__version__, torch.__version__, "thread", "torch (the blocked PyTorch path", products):
        assert text in " ".join(result.output.replace("│", "").split())


@pytest.mark.parametrize("arguments", ["demo --codes many", "demo --colour", "paint", "info --device tpu"])
def test_main_reports_wrong_usage_in_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastvq", *arguments.split()])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert re.fullmatch("fastvq: .+\n", capsys.readouterr().err)


def test_import_of_the_library_needs_none_of_the_command_lines_packages():
    packages = {"typer", "rich", "matplotlib", "sklearn", "PIL"}
    done = run("-c", f"import sys, fastvq; print({packages} & sys.modules.keys())")
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("patch", [1, 3, 4, 7])
def test_tokens_return_to_the_same_pixels(patch):
    pixels = torch.randint(0, 256, (23, 30, 3), dtype=torch.uint8)
    tokens = photos.to_tokens(pixels, patch)
    assert tokens.shape == (-(-23 // patch) * -(-30 // patch), 3 * patch**2)
    assert tokens.abs().max() <= 1
    assert torch.equal(photos.from_tokens(tokens, 23, 30, patch), pixels)


def test_sampled_patches_occur_in_the_photographs():
    pixels = torch.randint(0, 256, (9, 11, 3), dtype=torch.uint8)
    sampler = photos.PatchSampler([photos.Photo("a", pixels)], 3, torch.device("cpu"))
    windows = pixels.unfold(0, 3, 1).unfold(1, 3, 1).permute(0, 1, 3, 4, 2)
    # 9 x 12 after padding: the last window of each row holds the repeated column.
    every = {photos.to_unit(window).reshape(-1).numpy().tobytes() for row in windows for window in row}
    drawn = sampler.draw(200, torch.Generator().manual_seed(0))
    inside = [token.numpy().tobytes() in every for token in drawn]
    assert sampler.n_positions == 7 * 10
    assert sum(inside) > 150


def test_psnr_of_a_known_error():
    black = torch.zeros(4, 4, 3, dtype=torch.uint8)
    assert photos.psnr(black, black + 255) == pytest.approx(0)
    assert photos.psnr(black, black + 51) == pytest.approx(20 * np.log10(5))
