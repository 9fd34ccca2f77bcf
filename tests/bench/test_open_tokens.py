"""Counting which step proves a token: the counts are those of the search itself, and every kind occurs."""

import json
from dataclasses import replace

import pytest
import torch

from bench.gpu.problems import MODELS, PUBLISHED, Problem
from bench.static import open_tokens
from bench.static.open_tokens import count
from bench.static.refine_model import COUNTS, ranges_on_gpu, same_counts, sm_90_config
from fastvq.backends.triton import interpreting
from fastvq_kernels.search.pack_codes import pack_codebook
from fastvq_kernels.search.pipeline import certified_search

interpreted = pytest.mark.skipif(not interpreting(), reason="counts tensors of the CPU, in the interpreter")


@interpreted
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_counts_are_those_of_the_search(metric):
    x, codebook = torch.randn(100, 16), torch.randn(300, 16)
    codebook[200:204] = codebook[:4] + 1e-5 * torch.randn(4, 16)
    x[:4] = codebook[:4]
    row = count(x, codebook, metric, ranges=2)
    _, n_open = certified_search(x[None], pack_codebook(codebook, metric, sm_90_config(16)))
    assert row["by_scan"] + row["by_two"] + row["open"] == row["tokens"] == 100
    assert row["open"] == int(n_open) > 0
    assert row["open"] <= row["candidates"] <= 5 * row["open"]
    assert row["crowded"] == row["exhaustive"] == 0


@interpreted
def test_tokens_near_codes_that_lie_apart_are_proved_by_the_scan():
    codebook = torch.randn(256, 32)
    row = count(codebook[:50] + 0.01 * torch.randn(50, 32), codebook, "euclidean", ranges=1)
    assert (row["by_scan"], row["by_two"], row["open"], row["bins"]) == (50, 0, 0, 4)


@interpreted
def test_two_close_codes_in_different_bins_are_told_apart_in_float32():
    codebook = torch.randn(256, 32)
    codebook[2] = codebook[0] + 2e-2 * torch.randn(32)
    row = count(codebook[:1].repeat(50, 1), codebook, "euclidean", ranges=1)
    assert (row["by_scan"], row["by_two"], row["open"]) == (0, 50, 0)


@interpreted
def test_with_nearly_equal_codes_every_token_is_crowded_and_proved_by_the_third_scan():
    codebook = torch.randn(512, 16)
    codebook[::2] = codebook[:1] + 1e-7 * torch.randn(256, 16)
    row = count(codebook[:1] + 0.1 * torch.randn(20, 16), codebook, "euclidean", ranges=2)
    assert (row["open"], row["crowded"], row["exhaustive"], row["candidates"], row["bins"]) == (20, 20, 0, 0, 8)


@interpreted
def test_tokens_with_many_true_ties_are_exhaustive():
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6)
    row = count(torch.zeros(20, 6), signs, "euclidean", ranges=1)
    assert (row["crowded"], row["exhaustive"]) == (20, 20)


def test_the_ranges_are_those_of_a_gpu_with_132_multiprocessors():
    config = sm_90_config(64)
    problem = Problem("any", 65_536, 16_384, 64)
    assert ranges_on_gpu(problem, config) == 4  # 16 bins, although the device is full
    assert ranges_on_gpu(replace(problem, tokens=1000), config) == 32  # filled twice, with 4 steps each
    assert ranges_on_gpu(replace(problem, tokens=1), config) == 128  # filled, with one
    assert ranges_on_gpu(replace(problem, codes=100), config) == 1


@interpreted
def test_photographs_give_tokens_and_codes_of_the_patch(monkeypatch):
    monkeypatch.setattr(open_tokens, "_TRAINING_STEPS", 1)
    x, codebook = open_tokens.photo_data(Problem("photos", 1000, 64, 12), tokens=30)
    assert (x.shape, codebook.shape) == ((30, 12), (64, 12))
    assert x.abs().max() <= 1


@interpreted
def test_the_command_prints_a_table_and_writes_what_it_printed(tmp_path, capsys):
    path = tmp_path / "new" / "open.json"
    open_tokens.main(["--shapes", "recommender", "--tokens", "20", "--out", str(path)])
    assert "recommender" in capsys.readouterr().out
    document = json.loads(path.read_text())
    assert [(row["data"], row["tokens"], row["codes"]) for row in document["rows"]] == [
        ("gaussian", 20, 256),
        ("near", 20, 256),
    ]
    assert {"versions", "date"} <= set(document)


def test_the_stored_counts_hold_every_shape_and_become_markdown(capsys):
    rows = json.loads(COUNTS.read_text())["rows"]
    stored = {(row["codes"], row["dim"], row["metric"], row["ranges"], row["data"]) for row in rows}
    for problem in (*PUBLISHED, *MODELS):
        for data in ("gaussian", "near"):
            assert (*same_counts(problem), data) in stored
    assert all(row["by_scan"] + row["by_two"] + row["open"] == row["tokens"] for row in rows)
    open_tokens.main(["--markdown"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + sum(row["data"] != "near" for row in rows)


@pytest.mark.parametrize("arguments", [["--shapes", "esm4"], ["--tokens", "0"]])
def test_wrong_options_end_with_a_message(arguments, capsys):
    with pytest.raises(SystemExit):
        open_tokens.main(arguments)
    assert arguments[1] in capsys.readouterr().err
