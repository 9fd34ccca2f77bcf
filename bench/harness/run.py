"""Measures group after group, stores each when it is done, and skips those that are stored."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.harness.store import Row, Store


class Group(NamedTuple):
    """Rows that are measured together: ``wanted`` identifies them, ``measure`` returns them with results."""

    label: str
    wanted: list[Row]
    measure: Callable[[], list[Row]]


def run(title: str, groups: Sequence[Group], store: Store, console: Console) -> None:
    """Measure what the store does not have."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=len(groups))
        for group in groups:
            progress.update(task, description=f"{title}: {group.label}")
            if not store.has(group.wanted):
                store.put(group.measure())
            progress.advance(task)
