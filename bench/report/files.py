"""Tables and pictures of stored results: on the terminal, as Markdown, as PNG files, and in the documentation."""

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.harness.store import Store
from bench.plans.roofline import limits_of
from bench.report import tables
from bench.report.grid import Grid, as_markdown, as_table, without_empty_columns

_TITLES = {
    "search": "Nearest code, forward only: medians of warm calls in turns; the others' times divided by fastvq's",
    "train": "Training step: medians of warm calls in turns; the others' times divided by fastvq's",
    "worst": "Worst cases: time of a search over that of the expanded formula, medians of calls in turns",
    "memory": "Peak extra memory of one call",
    "accuracy": "Indices that differ from float64",
    "means": "Error of the mean of a code's tokens, in units in the last place of float32",
    "scaling": "Time of a search over tokens, codes and dimensions",
    "kmeans": "k-means: medians of three seeds, each with the same tokens and at most as many iterations",
}
_SWEEPS = {
    "worst": tables.worst,
    "memory": tables.memory,
    "accuracy": tables.accuracy,
    "means": tables.means,
    "scaling": tables.scaling,
    "kmeans": tables.kmeans,
}
_MARK = re.compile(r"(<!-- bench:(\w+) -->\n)(.*?)(<!-- /bench:\2 -->)", re.DOTALL)
_PICTURE = re.compile(r"\]\(([^):]+\.png)\)")


def write(store: Store, out: Path, console: Console, names: Sequence[str] = tuple(_TITLES)) -> None:
    """Write results.csv, tables.md and the pictures to ``out``; print the tables of the benchmarks in ``names``."""
    out.mkdir(parents=True, exist_ok=True)
    store.write_csv(out / "results.csv")
    sections = {name: _grids(store, name) for name in _TITLES}
    parts = [f"## {grid.title}\n\n{as_markdown(grid)}\n" for grids in sections.values() for grid in grids]
    (out / "tables.md").write_text("\n".join(parts), encoding="utf-8")
    for name in names:
        for grid in sections[name][-1:]:
            console.print(as_table(grid))
    try:
        from bench.report import plots
    except ModuleNotFoundError as error:
        console.print(f'no pictures: {error.name} is missing (pip install "fastvq-triton[bench]")')
    else:
        for file, png in plots.pictures(store).items():
            (out / file).write_bytes(png)
    console.print(f"{', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))} in {out}")


def fill(readme: Path, stores: Sequence[Store]) -> None:
    """Replace the marked sections of a file and the pictures of benchmarks that it links to."""
    from bench.report import plots

    text = filled(readme.read_text(encoding="utf-8"), stores)
    readme.write_text(text, encoding="utf-8")
    pictures = {name: png for store in stores for name, png in plots.pictures(store).items()}
    for path in (readme.parent / link for link in _PICTURE.findall(text)):
        if path.name in pictures:
            path.write_bytes(pictures[path.name])


def filled(text: str, stores: Sequence[Store]) -> str:
    """``text`` with new tables, if a store has rows, between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``.

    An unknown name raises ValueError.
    """

    def section(found: re.Match[str]) -> str:
        name = found[2]
        if name not in _TITLES:
            raise ValueError(f"bench:NAME must be one of {', '.join(_TITLES)}, got {name}")
        grids = [grids[0] for store in stores if (grids := _grids(store, name))]
        content = "\n\n".join(f"{grid.title}. {as_markdown(grid)}" for grid in grids)
        return f"{found[1]}\n{content}\n\n{found[4]}" if content else f"{found[1]}{found[4]}"

    return _MARK.sub(section, text)


def kept() -> list[Path]:
    """The files of results that the documentation shows."""
    return sorted((Path(__file__).parents[1] / "results").glob("bench_*.json"))


def _grids(store: Store, name: str) -> list[Grid]:
    """The tables of a benchmark, the short one first; none without rows."""
    head, rows = store.latest(name)
    if not rows:
        return []
    title = _TITLES[name]
    if name in _SWEEPS:
        return [_SWEEPS[name](title, head, rows)]
    whole = tables.timed(title.split(":")[0], head, rows, limits_of(store, rows))
    return [tables.side_by_side(title, head, rows), without_empty_columns(whole)]
