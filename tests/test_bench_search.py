"""The side-by-side search: complete rows whatever the contenders do."""

import json

import pytest
import torch

from bench import search
from bench.contenders import CONTENDERS, Contender, load_fastvq, load_seed_formula
from bench.shapes import MODELS, QUICK, make_data, parse_shapes

SHAPE = parse_shapes("60x40x3")[0]


def load_missing():
    raise ImportError("no module of that name")


def load_broken():
    def raise_error(x, codebook):
        raise RuntimeError("broken on purpose")

    return Contender("broken 1.0", raise_error)


def test_a_missing_and_a_failing_contender_are_rows_that_say_so():
    contenders = {"absent": load_missing, "fastvq": load_fastvq, "broken": load_broken, "formula": load_seed_formula}
    rows = search.measure(SHAPE, contenders, repeats=2)
    assert [(row["contender"], row["status"]) for row in rows] == [
        ("absent", "missing"),
        ("fastvq", "ok"),
        ("broken", "failed"),
        ("formula", "ok"),
    ]
    assert rows[0]["note"] == "no module of that name"
    assert rows[2]["note"] == "RuntimeError: broken on purpose"
    assert all((row["seconds"] is None) == (row["status"] != "ok") for row in rows)
    assert rows[1]["wrong_share"] == 0
    assert len(rows[1]["all_seconds"]) == 2
    assert search.results_table(rows).row_count == 4


def test_the_wrong_share_counts_indices_that_differ_from_the_oracle():
    rows = search.measure(SHAPE, {"zeros": lambda: Contender("1", lambda x, _: torch.zeros(len(x)).long())}, 1)
    x, codebook = make_data(SHAPE, near=False)
    assert rows[0]["wrong_share"] == pytest.approx((torch.cdist(x, codebook).argmin(1) != 0).double().mean().item())


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_answers_or_is_missing(name):
    (row,) = search.measure(SHAPE, {name: CONTENDERS[name]}, repeats=1)
    assert row["status"] == "missing" or (row["status"], row["wrong_share"]) == ("ok", 0)


def test_a_matrix_that_does_not_fit_is_made_in_chunks_and_the_row_says_so(monkeypatch):
    monkeypatch.setattr("bench.contenders.tokens_per_chunk", lambda n_codes: 7)
    monkeypatch.setattr(search, "tokens_per_chunk", lambda n_codes: 7)
    row = search.measure(SHAPE, {"seed formula": load_seed_formula}, repeats=1)[0]
    assert row["note"].startswith("in chunks of 7 tokens")
    assert row["wrong_share"] == 0


def test_shapes_parse_by_model_and_by_size():
    esm3, size = parse_shapes("esm3, 4096×1000x8")
    assert esm3 == MODELS["esm3"]
    assert (size.tokens, size.codes, size.dim) == (4096, 1000, 8)
    assert set(QUICK) <= set(MODELS)


@pytest.mark.parametrize("text", ["esm4", "3x4", "0x4x4", "3x4x5x6", "axbxc"])
def test_an_unknown_shape_is_refused_with_the_names_that_exist(text):
    with pytest.raises(ValueError, match=r"tokens×codes×dim or one of esm3, .*got '"):
        parse_shapes(text)


def test_tokens_near_codes_have_those_codes_nearest():
    shape = parse_shapes("50x20x64")[0]
    x, codebook = make_data(shape, near=True)
    assert torch.cdist(x, codebook).amin(1).max() < 2


def test_the_command_prints_a_table_and_writes_what_it_printed(tmp_path, capsys):
    path = tmp_path / "new" / "search.json"
    arguments = ["--shapes", "30x20x2", "--contenders", "fastvq,seed formula", "--repeats", "1", "--out", str(path)]
    search.main(arguments)
    assert "seed formula" in capsys.readouterr().out
    document = json.loads(path.read_text())
    assert [row["contender"] for row in document["rows"]] == ["fastvq", "seed formula"]
    assert {"device", "versions", "date", "threads"} <= set(document)


@pytest.mark.parametrize("arguments", [["--contenders", "annoy"], ["--repeats", "0"], ["--shapes", "huge"]])
def test_wrong_options_end_with_a_message(arguments, capsys):
    with pytest.raises(SystemExit):
        search.main(arguments)
    assert arguments[1] in capsys.readouterr().err
