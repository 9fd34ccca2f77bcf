"""A table of texts that can be shown on a terminal and written as Markdown."""

from typing import Literal, NamedTuple

from rich.markup import escape
from rich.table import Table


class Grid(NamedTuple):
    """A title, remarks (may be empty), headings, and rows of cells; the first ``left`` columns hold words."""

    title: str
    remarks: list[str]
    headings: list[str]
    rows: list[list[str]]
    left: int = 1

    @property
    def remark(self) -> str:
        """The remarks as one text."""
        return " ".join(filter(None, self.remarks))

    def justify(self, i: int) -> Literal["left", "right"]:
        """Words stand to the left, numbers to the right."""
        return "left" if i < self.left or self.headings[i] == "note" else "right"


def without_empty_columns(grid: Grid) -> Grid:
    """The same without columns that have a heading and no cell."""
    kept = [i for i, heading in enumerate(grid.headings) if not heading or any(cells[i] for cells in grid.rows)]
    headings, *rows = ([cells[i] for i in kept] for cells in (grid.headings, *grid.rows))
    return grid._replace(headings=headings, rows=rows)


def as_markdown(grid: Grid) -> str:
    """Remarks and table, without the title."""
    rules = ["---" if grid.justify(i) == "left" else "---:" for i in range(len(grid.headings))]
    lines = [grid.remark, ""] if grid.remark else []
    for cells in (grid.headings, rules, *grid.rows):
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def as_table(grid: Grid) -> Table:
    """For a terminal; a blank first cell continues the row above."""
    table = Table(title=grid.title, caption=escape(grid.remark), title_justify="left", caption_justify="left")
    for i, heading in enumerate(grid.headings):
        table.add_column(heading, justify=grid.justify(i), no_wrap=heading != "note", overflow="fold")
    for i, cells in enumerate(grid.rows):
        last = i + 1 == len(grid.rows) or bool(grid.rows[i + 1][0])
        table.add_row(*map(escape, cells), end_section=last and grid.left == 3)
    return table
