"""A table of texts that can be shown on a terminal and written as Markdown."""

from __future__ import annotations

from typing import NamedTuple

from rich.markup import escape
from rich.table import Table


class Grid(NamedTuple):
    """A title, remarks that stand below it, headings, and rows of cells; the first ``left`` columns hold words."""

    title: str
    remarks: list[str]
    headings: list[str]
    rows: list[list[str]]
    left: int = 1


def without_empty_columns(grid: Grid) -> Grid:
    """The same without columns that have a heading and no cell."""
    kept = [i for i, heading in enumerate(grid.headings) if not heading or any(cells[i] for cells in grid.rows)]
    return grid._replace(
        headings=[grid.headings[i] for i in kept], rows=[[cells[i] for i in kept] for cells in grid.rows]
    )


def as_markdown(grid: Grid) -> str:
    """Remarks and table, without the title."""
    rules = ["---" if i < grid.left or heading == "note" else "---:" for i, heading in enumerate(grid.headings)]
    lines = [" ".join(grid.remarks), ""] if grid.remarks else []
    return "\n".join([*lines, *(_line(cells) for cells in (grid.headings, rules, *grid.rows))])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def as_table(grid: Grid) -> Table:
    """For a terminal; a blank first cell continues the row above."""
    table = Table(
        title=grid.title, caption=escape(" ".join(grid.remarks)), title_justify="left", caption_justify="left"
    )
    for i, heading in enumerate(grid.headings):
        words = i < grid.left or heading == "note"
        table.add_column(heading, justify="left" if words else "right", no_wrap=heading != "note", overflow="fold")
    for i, cells in enumerate(grid.rows):
        last = i + 1 == len(grid.rows) or bool(grid.rows[i + 1][0])
        table.add_row(*map(escape, cells), end_section=last and grid.left == 3)
    return table
