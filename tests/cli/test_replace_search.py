"""Encodec's residual quantizer trains the same with its search replaced."""

import pytest
import torch
from typer.testing import CliRunner

import fastvq
from examples import replace_search

SIZES = {"dim": 16, "codes": 64, "levels": 4, "batch": 2, "frames": 40, "steps": 20}


@pytest.fixture(scope="module")
def histories():
    return replace_search.train_side_by_side(**SIZES)


def test_codes_and_losses_of_every_step_are_the_same(histories):
    theirs, ours = histories
    assert len(theirs) == len(ours) == SIZES["steps"]
    for before, after in zip(theirs, ours, strict=True):
        assert torch.equal(before.indices, after.indices)
        assert before.loss == after.loss


def test_training_leaves_the_long_codes_that_the_search_has_to_bear():
    trainer = replace_search.Trainer(16, 64, 2, seed=0)
    replace_search.replace_search(trainer.quantizer)
    for step in range(20):
        trainer.step(torch.randn(2, replace_search.CHANNELS, 40), step)
    lengths = [layer._codebook.embed.norm(dim=1) for layer in trainer.quantizer.layers]
    assert max(float(length.max() / length.min()) for length in lengths) > 1e3
    x = torch.randn(500, 16)
    for layer in trainer.quantizer.layers:
        embed = layer._codebook.embed.double()
        expected = (x.double().pow(2).sum(1, keepdim=True) - 2 * x.double() @ embed.t() + embed.pow(2).sum(1)).argmin(1)
        assert torch.equal(fastvq.nearest_code(x, layer._codebook.embed), expected)


def test_the_command_prints_times_and_codes():
    app = replace_search.typer.Typer()
    app.command()(replace_search.main)
    options = ["--codes", "16", "--dim", "4", "--levels", "2", "--batch", "1", "--frames", "20", "--steps", "2"]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert "80 of 80 codes are the same" in done.output
    assert "of the time" in done.output
