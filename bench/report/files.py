"""Tables and pictures of stored results: on the terminal, as Markdown, as PNG files, and in the README."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from bench.harness.store import Store
from bench.plans.roofline import limits_of
from bench.report import tables
from bench.report.grid import Grid, as_markdown, as_table, without_empty_columns

# What the README shows of each benchmark, and the words above it.
_TITLES = {
    "search": "Nearest code, forward only: medians of warm calls in turns; the others' times divided by fastvq's",
    "train": "Training step: medians of warm calls in turns; the others' times divided by fastvq's",
    "memory": "Peak extra memory of one call",
    "accuracy": "Indices that differ from float64",
    "scaling": "Time of a search over tokens, codes and dimensions",
}
_MARK = re.compile(r"(<!-- bench:(\w+) -->\n)(.*?)(<!-- /bench:\2 -->)", re.DOTALL)


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
        pictures = plots.pictures(store)
        for file, content in pictures.items():
            (out / file).write_bytes(content)
    console.print(f"{', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))} in {out}")


def fill(readme: Path, stores: Sequence[Store]) -> None:
    """Make the marked sections of a file anew, and those pictures of the benchmarks that it shows."""
    from bench.report import plots

    text = filled(readme.read_text(encoding="utf-8"), stores)
    readme.write_text(text, encoding="utf-8")
    for store in stores:
        for file, content in plots.pictures(store).items():
            if f"(docs/{file})" in text:
                (readme.parent / "docs" / file).write_bytes(content)


def filled(text: str, stores: Sequence[Store]) -> str:
    """``text`` with what stands between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->`` made anew.

    A section stays empty where no store has rows of it.

    Raises:
        ValueError: there is no benchmark of that name.
    """

    def section(found: re.Match[str]) -> str:
        name = found[2]
        if name not in _TITLES:
            raise ValueError(f"bench:NAME must be one of {', '.join(_TITLES)}, got {name}")
        grids = [_grids(store, name)[0] for store in stores if store.latest(name)[1]]
        content = "\n\n".join(f"{grid.title}. {as_markdown(grid)}" for grid in grids)
        return f"{found[1]}\n{content}\n\n{found[4]}" if content else f"{found[1]}{found[4]}"

    return _MARK.sub(section, text)


def kept() -> list[Path]:
    """The files of results that the README shows."""
    return sorted((Path(__file__).parents[1] / "results").glob("bench_*.json"))


def _grids(store: Store, name: str) -> list[Grid]:
    """The tables of a benchmark, the short one first; none without rows."""
    head, rows = store.latest(name)
    if not rows:
        return []
    title = _TITLES[name]
    if name in ("search", "train"):
        whole = tables.timed(title.split(":")[0], head, rows, limits_of(store, rows))
        return [tables.side_by_side(title, head, rows), without_empty_columns(whole)]
    make: Callable[..., Grid] = getattr(tables, name)
    return [make(title, head, rows)]
