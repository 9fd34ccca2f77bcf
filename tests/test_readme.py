"""Every Python example of the README runs as printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example):
    names = {}
    exec(example, names)
    if "reconstructed" in names:
        assert names["reconstructed"].shape == names["encoder_output"].shape
        assert names["encoder_output"].grad.isfinite().all()
    elif "latents" in names:
        assert names["quantized"].shape == names["latents"].shape
        assert names["counts"].sum() == 5000
    else:
        assert names["same"].shape == names["x"].shape
        assert names["counts"].sum() == (names["indices"] >= 0).sum()


def test_there_are_examples():
    assert len(EXAMPLES) == 3


def test_files_the_readme_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).is_file(), target
