"""Rows of results in one JSON file, replaced as a whole, so that an interrupted run leaves it valid."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.machine import identity

Row = dict[str, Any]

# These columns identify a measurement; the others are its results.
IDENTITY = (
    "benchmark", "name", "operation", "tokens", "codes", "dim", "dtype", "device", "offset", "axis", "contender",
)  # fmt: skip
# Each of these is one sweep; a file may have several under different names.
_SWEEPS = ("memory", "accuracy", "means", "scaling")
_HEAD_COLUMNS = ("device", "threads", "commit", "date")


class Store:
    """The rows of one file in the order of their measurement.

    ``heads[row["head"]]`` are the :func:`bench.harness.machine.facts` of a row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        document = json.loads(path.read_text()) if path.exists() else {"heads": {}, "rows": []}
        self.heads: dict[str, dict[str, Any]] = document["heads"]
        self.rows: list[Row] = document["rows"]
        self._head: tuple[str, dict[str, Any]] = ("", {})

    def measured_on(self, head: dict[str, Any]) -> None:
        """New rows belong to ``head``; a head that differs by its date alone is the same."""
        self._head = identity(head), head

    def has(self, wanted: Sequence[Row]) -> bool:
        """Whether all these rows have been measured on this machine with these versions and sources."""
        there = {_key(row) for row in self.rows if row["head"] == self._head[0]}
        return all(_key(row) in there for row in wanted)

    def put(self, rows: Sequence[Row]) -> None:
        """Write rows to the file, in place of older ones of the same measurement."""
        name, head = self._head
        new = {_key(row) for row in rows}
        self.heads.setdefault(name, head)
        self.rows = [row for row in self.rows if row["head"] != name or _key(row) not in new]
        self.rows += [{**row, "head": name} for row in rows]
        write_json(self.path, {"heads": self.heads, "rows": self.rows})

    def latest(self, benchmark: str) -> tuple[dict[str, Any], list[Row]]:
        """Head and rows of the machine and versions that measured this benchmark last; of sweeps, the last one."""
        rows = [row for row in self.rows if row["benchmark"] == benchmark]
        if not rows:
            return {}, []
        last = rows[-1]
        same = ("head", "name") if benchmark in _SWEEPS else ("head",)
        return self.heads[last["head"]], [row for row in rows if all(row[name] == last[name] for name in same)]

    def write_csv(self, path: Path) -> None:
        """All rows with the main facts of their machine, one line each."""
        columns = dict.fromkeys(name for row in self.rows for name in row if name != "head")
        heads = {f"head_{name}": name for name in _HEAD_COLUMNS}
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*columns, *heads], extrasaction="ignore")
            writer.writeheader()
            for row in self.rows:
                head = self.heads[row["head"]]
                writer.writerow({**row, **{column: head.get(name) for column, name in heads.items()}})


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in IDENTITY)


def write_json(path: Path, document: Any) -> None:
    """Replace ``path`` in one step, so that a reader never sees half of it."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=True) + "\n")
    os.replace(unfinished, path)
