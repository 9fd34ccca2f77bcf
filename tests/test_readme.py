"""The README's Python examples run as printed, its numbers are the stored ones, and links between documents work."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))


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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document):
    path = ROOT / document
    for target, heading in re.findall(r"\]\(([^)#:]*)#?([^)]*)\)", path.read_text(encoding="utf-8")):
        linked = path.parent / target if target else path
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in headings]


def results_of(benchmark):
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    return cells(re.search(rf"<!-- bench:{benchmark} -->(.*)<!-- /bench:{benchmark} -->", text, re.DOTALL)[1])


def test_the_summary_of_speed_is_that_of_the_results():
    results = results_of("search")
    head, *rows = table("shape")
    assert head[3:] == ["expanded formula", "fastest other tool"]
    assert len(rows) == 10
    for row in rows:
        found = next(result for result in results if result[0] == row[0])  # of the first table
        others = dict(zip(results[0][3:], found[3:], strict=True))
        ran = [name for name, cell in others.items() if re.fullmatch(r"[\d.]+", cell)]
        fastest = min(ran, key=lambda name: float(others[name]))
        assert row == [*found[:3], others["expanded formula"], f"{others[fastest]} ({fastest})"]


def test_the_worst_cases_are_those_of_the_results():
    (_, *columns), *results = zip(*results_of("worst"), strict=True)
    head, *rows = zip(*table("codebook"), strict=True)
    assert len(rows) == 4
    for size, *ratios in rows:
        found = dict(zip(columns, next(cells for name, *cells in results if name == size), strict=True))
        assert ratios == [found[kind] for kind in head[1:]]


def table(first):
    """The table of the README whose first heading this is."""
    block = next(block for block in README.split("\n\n") if block.startswith(f"| {first} |"))
    return cells(block)


def cells(text):
    """The rows of the tables in ``text``, without the lines under the headings."""
    lines = (
        line
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith("|---") and not line.startswith("| ---")
    )
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
