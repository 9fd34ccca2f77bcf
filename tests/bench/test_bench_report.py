"""Tables, pictures and the README's numbers come from stored results."""

import csv
import re
from pathlib import Path

import matplotlib
import pytest
from rich.console import Console

from bench.harness.store import Store
from bench.report import files as report
from bench.report import plots
from bench.report.grid import Grid, as_markdown, as_table

ROOT = Path(__file__).parents[2]
HEAD = {
    "device": "a machine, 2 threads",
    "threads": 2,
    "versions": {"torch": "2.0"},
    "date": "2026-01-02T03:04:05+00:00",
}
NAMES = ("fastvq", "expanded formula", "a rival with a long name", "broken")


def row(benchmark, contender, **more):
    sizes = {"name": "a shape", "tokens": 1000, "codes": 500, "dim": 64, "dtype": "float32", "device": "cpu"}
    found = {"benchmark": benchmark, **sizes, "contender": contender, "status": "ok", "note": "", "version": "tool 1.0"}
    if contender == "broken":
        return found | more | {"status": "failed", "note": "ValueError: a | b", "version": None}
    return found | more


def timed(contender, seconds):
    return {} if contender == "broken" else {"seconds": seconds, "seconds_p20": seconds, "seconds_p80": 2 * seconds}


@pytest.fixture
def store(tmp_path):
    """Rows of every benchmark, a contender that fails among them."""
    rows = [
        {"benchmark": "limits", "name": "product", "rate": 1e11},
        {"benchmark": "limits", "name": "copy", "rate": 1e10},
    ]
    for i, name in enumerate(NAMES):
        wrong = {} if name == "broken" else {"wrong_share": 0.0 if i < 2 else 0.25, "checked_tokens": 100}
        rows += [row(benchmark, name, **timed(name, 1e-3 * (i + 1)), **wrong) for benchmark in ("search", "train")]
        rows.append(row("worst", name, **timed(name, 1e-3 * (i + 1)), **wrong))
        for offset in (0.0, 3.0):
            rows.append(row("accuracy", name, offset=offset, **wrong))
            error = {} if name == "broken" else {"error_ulp": 0.5 + 1000 * i}
            rows.append(row("means", name, offset=offset, **error))
        for codes in (256, 1024):
            for operation in ("search", "train"):
                extra = {} if name == "broken" else {"extra_bytes": 2**20 * (i + codes / 256)}
                rows.append(row("memory", name, codes=codes, operation=operation, **extra) | {"codes": codes})
            rows.append(row("scaling", name, axis="codes", **timed(name, 1e-5 * codes)) | {"codes": codes})
    found = Store(tmp_path / "results.json")
    found.measured_on(HEAD)
    found.put(rows)
    return found


def test_the_page_of_results_is_what_the_stored_results_say():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert report.filled(text, [Store(path) for path in report.kept()]) == text
    search = re.search(r"<!-- bench:search -->(.*)<!-- /bench:search -->", text, re.DOTALL)[1]
    assert "| esm3 | 8,192 × 4,096 × 128 |" in search


def test_a_marked_section_is_replaced_and_filled_once(store):
    text = "before\n<!-- bench:search -->\nold\n<!-- /bench:search -->\nafter\n"
    once = report.filled(text, [store])
    assert once.startswith("before\n<!-- bench:search -->\n\nNearest code")
    assert once.endswith("\n\n<!-- /bench:search -->\nafter\n")
    assert "old" not in once
    assert report.filled(once, [store]) == once
    with pytest.raises(ValueError, match=r"must be one of search, .*got walk"):
        report.filled("<!-- bench:walk -->\n<!-- /bench:walk -->", [store])


def test_a_readme_gets_its_sections_and_the_pictures_it_shows(store, tmp_path):
    readme = tmp_path / "README.md"
    (tmp_path / "docs").mkdir()
    readme.write_text("<!-- bench:memory -->\n<!-- /bench:memory -->\n![memory](docs/memory.png)\n")
    report.fill(readme, [store])
    assert "Peak extra memory" in readme.read_text()
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["memory.png"]
    assert (tmp_path / "docs" / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_tables_pictures_and_csv_are_written_for_every_benchmark(store, tmp_path):
    out = tmp_path / "new"
    console = Console(record=True, width=160)
    report.write(store, out, console)
    said = console.export_text()
    for name in ("throughput", "roofline", "memory", "accuracy"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    tables = (out / "tables.md").read_text()
    for heading in (
        "Nearest code",
        "Training step",
        "Peak extra memory",
        "differ from float64",
        "Error of the mean",
        "Time of a search",
    ):
        assert heading in tables
        assert heading in said
    assert "2.00 (25 % wrong)" not in tables  # the second is right, the third is three times slower
    assert "3.00 (25 % wrong)" in tables
    assert "Not measured: broken (failed)." in tables
    assert "K^1.00" in tables
    assert "fastvq, search: 16.0 times the codebook and between 0.0 and 0.0 MiB." in tables
    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(store.rows)
    assert {line["head_device"] for line in lines} == {"a machine, 2 threads"}


def test_limits_are_compared_with_the_rate_of_every_row(store):
    tables = [grid for grid in report._grids(store, "search") if "of limit" in grid.headings]
    cells = dict(zip(tables[0].headings, tables[0].rows[0], strict=True))
    assert cells["contender"] == "fastvq"
    assert cells["of limit"] == "64 %"  # 2 · 1000 · 500 · 64 in a millisecond, of 100 GFLOP/s
    assert cells["× expanded"] == "2.00"


def test_a_cell_cannot_break_a_table():
    grid = Grid("title", ["[N, K]"], ["", "a"], [["x", "[bold]|"]])
    assert as_markdown(grid).splitlines()[-1] == "| x | [bold]/ |"
    console = Console(record=True, width=80)
    console.print(as_table(grid))
    assert "[bold]|" in (text := console.export_text())
    assert "[N, K]" in text


def test_pictures_leave_the_style_of_other_pictures_alone(store):
    assert plots.pictures(store)
    assert not matplotlib.rcParams["figure.constrained_layout.use"]


def test_a_legend_lists_the_curves_in_the_order_of_their_ends(store):
    memory, accuracy = plots.memory(*store.latest("memory")), plots.accuracy(*store.latest("accuracy"))
    legends = [panel.get_legend() for figure in (memory, accuracy) for panel in figure.axes]
    assert [[text.get_text() for text in legend.get_texts()] for legend in legends] == [
        ["a rival with a long name", "expanded formula", "fastvq"],
        ["a rival with a long name", "expanded formula", "fastvq"],
        ["a rival with a long name", "fastvq, expanded formula"],
    ]


def test_worst_cases_are_ratios_to_the_expanded_formula(store):
    (grid,) = report._grids(store, "worst")
    (line,) = grid.rows
    assert line[1] == "0.50"
