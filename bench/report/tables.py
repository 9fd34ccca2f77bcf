"""Rows of results as tables, one function per benchmark; formats of numbers."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.harness.store import Row
from bench.plans.memory import growth
from bench.plans.roofline import share_of_limit
from bench.plans.scaling import slope
from bench.report.grid import Grid

_EXPANDED = "expanded formula"
_OURS = "fastvq"
_AXES = {"tokens": "N", "codes": "K", "dim": "D"}

Head = dict[str, Any]


def side_by_side(title: str, head: Head, rows: Sequence[Row]) -> Grid:
    """One line per shape: our milliseconds, and the times of the others divided by ours; wrong indices beside them."""
    ran = [name for name in _unique(rows, "contender") if any(_ran(row) for row in _of(rows, contender=name))]
    others = [name for name in ran if name != _OURS]
    lines = []
    for shape in _shapes(rows):
        found = {row["contender"]: row for row in shape}
        ours = found.get(_OURS, {})
        cells = [shape[0]["name"], _size(shape[0]), _with_wrong(ours, _ms(ours.get("seconds")))]
        for name in others:
            row = found.get(name, {})
            ratio = row["seconds"] / ours["seconds"] if _ran(row) and _ran(ours) else None
            cells.append(_with_wrong(row, _ratio(ratio)))
        lines.append(cells)
    remarks = [f"{_machine(head)}; {_versions(rows)}.", _named(_absent(rows)), _verdict(rows)]
    headings = ["shape", "N × K × D", f"{_OURS}, ms", *others]
    return Grid(title, [remark for remark in remarks if remark], headings, lines, left=2)


def timed(title: str, head: Head, rows: Sequence[Row], limits: dict[str, float]) -> Grid:
    """One line per shape and contender, with everything that was measured."""
    lines = []
    for shape in _shapes(rows):
        expanded = next((row["seconds"] for row in shape if row["contender"] == _EXPANDED and _ran(row)), None)
        for i, row in enumerate(shape):
            share = share_of_limit(row, limits)
            spread = f"{_ms(row['seconds_p20'])} to {_ms(row['seconds_p80'])}" if _ran(row) else ""
            lines.append([
                *((row["name"], _size(row)) if i == 0 else ("", "")),
                row["contender"],
                _ms(row["seconds"]) if _ran(row) else row["status"],
                spread,
                _ratio(expanded / row["seconds"]) if expanded and _ran(row) else "",
                _percent(share),
                _percent(row.get("wrong_share")),
                _short(row["note"]),
            ])  # fmt: skip
    remarks = [f"{_machine(head)}.", _limits(limits)]
    headings = ["shape", "N × K × D", "contender", "ms", "20 to 80 %", "× expanded", "of limit", "wrong", "note"]
    return Grid(title, [remark for remark in remarks if remark], headings, lines, left=3)


def memory(title: str, head: Head, rows: Sequence[Row]) -> Grid:
    """One line per operation and contender: MiB at every number of codes, and how they grow with it."""
    codes = sorted({row["codes"] for row in rows})
    lines, remarks = [], [f"{_machine(head)}."]
    absent = _absent(rows, "extra_bytes")
    for operation in _unique(rows, "operation"):
        there_are = [name for name in _unique(_of(rows, operation=operation), "contender") if name not in absent]
        for i, name in enumerate(there_are):
            found = {row["codes"]: row for row in _of(rows, operation=operation, contender=name)}
            cells = [_mib(found[k]) if k in found else "" for k in codes]
            there = [k for k in codes if found.get(k, {}).get("extra_bytes") is not None]
            per_code = ""
            if len(there) > 1:
                row = found[there[0]]
                grown = growth(there, [found[k]["extra_bytes"] for k in there], row["tokens"], row["dim"])
                per_code = f"{grown['codebooks']:.1f} codebooks, {grown['matrices']:.2f} matrices"
                if name == _OURS:
                    remarks.append(f"fastvq, {operation}: {_flatness(grown)}.")
            lines.append([operation if i == 0 else "", name, *cells, per_code])
    sizes = f"{rows[0]['tokens']:,} tokens, D = {rows[0]['dim']}"
    remarks.insert(1, f"{sizes}; MiB beyond tokens and codebook; a matrix is one of [tokens, codes] in float32.")
    remarks.append(_named(absent))
    headings = ["", "contender", *(f"K = {k:,}" for k in codes), "grows with K by"]
    return Grid(title, [remark for remark in remarks if remark], headings, lines, left=2)


def _flatness(grown: Mapping[str, float]) -> str:
    if math.isfinite(grown["flat_from"]):
        return f"the same within 5 % from K = {grown['flat_from']:,} on"
    least, most = grown["least"] / 2**20, grown["most"] / 2**20
    return f"{grown['codebooks']:.1f} times the codebook and between {least:.1f} and {most:.1f} MiB"


def accuracy(title: str, head: Head, rows: Sequence[Row]) -> Grid:
    """One line per dtype and contender: percent of wrong indices at every offset."""
    offsets = sorted({row["offset"] for row in rows})
    absent = _absent(rows, "wrong_share")
    lines = []
    for dtype in _unique(rows, "dtype"):
        there_are = [name for name in _unique(_of(rows, dtype=dtype), "contender") if name not in absent]
        for i, name in enumerate(there_are):
            found = {row["offset"]: row for row in _of(rows, dtype=dtype, contender=name)}
            cells = [_percent(found[k].get("wrong_share")) or found[k]["status"] if k in found else "" for k in offsets]
            lines.append([dtype if i == 0 else "", name, *cells])
    first = rows[0]
    remark = f"{first['checked_tokens']:,} tokens, " if first.get("checked_tokens") else ""
    remarks = [
        f"{_machine(head)}; {remark}K = {first['codes']:,}, D = {first['dim']}; offset in standard deviations.",
        "expanded in half: the formula in the precision given; half product: the product in it, norms in float32;",
        "the others get half precision as float32.",
        _named(absent),
    ]
    remarks = [remark for remark in remarks if remark]
    return Grid(title, remarks, ["dtype", "contender", *(f"offset {k:g}" for k in offsets)], lines, left=2)


def scaling(title: str, head: Head, rows: Sequence[Row]) -> Grid:
    """One line per axis and contender: milliseconds at every size, and the fitted exponent."""
    width = max(len(_unique(_of(rows, axis=axis), axis)) for axis in _unique(rows, "axis"))
    lines = []
    for axis in _unique(rows, "axis"):
        on_axis = _of(rows, axis=axis)
        sizes = sorted(_unique(on_axis, axis))
        others = ", ".join(f"{_AXES[other]} = {on_axis[0][other]:,}" for other in _AXES if other != axis)
        label = f"{_AXES[axis]} = {', '.join(f'{size:,}' for size in sizes)}; {others}"
        lines.append([label, "", *[""] * (width + 1)])
        for name in _unique(on_axis, "contender"):
            found = {row[axis]: row for row in _of(on_axis, contender=name)}
            cells = [_ms(found[k]["seconds"]) if _ran(found[k]) else found[k]["status"] for k in sizes if k in found]
            there = [k for k in sizes if k in found and _ran(found[k])]
            exponent = slope(there, [found[k]["seconds"] for k in there])
            power = "" if math.isnan(exponent) else f"{_AXES[axis]}^{exponent:.2f}"
            lines.append(["", name, *cells, *[""] * (width - len(cells)), power])
    headings = ["", "contender", "ms", *[""] * (width - 1), "time ∝"]
    return Grid(title, [f"{_machine(head)}."], headings, lines, left=2)


def _unique(rows: Sequence[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def _of(rows: Sequence[Row], **columns: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in columns.items())]


def _shapes(rows: Sequence[Row]) -> list[list[Row]]:
    shapes: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        shapes.setdefault((row["name"], row["tokens"], row["codes"], row["dim"], row["dtype"]), []).append(row)
    return list(shapes.values())


def _ran(row: Row) -> bool:
    return row.get("seconds") is not None


def _size(row: Row) -> str:
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return f"{row['tokens']:,} × {row['codes']:,} × {row['dim']:,}{dtype}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    percent = 100 * share
    return "0" if percent == 0 else f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.2g} %"


def _mib(row: Row) -> str:
    return f"{row['extra_bytes'] / 2**20:,.1f}" if row.get("extra_bytes") is not None else row["status"]


def _with_wrong(row: Row, text: str) -> str:
    if row and not _ran(row):
        return row["status"]
    return f"{text} ({_percent(row['wrong_share'])} wrong)" if row.get("wrong_share") else text


def _short(note: str) -> str:
    return note if len(note) <= 120 else f"{note[:117]}..."


def _absent(rows: Sequence[Row], value: str = "seconds") -> dict[str, str]:
    """Contenders without a single value, with what became of them."""
    return {
        name: _of(rows, contender=name)[0]["status"]
        for name in _unique(rows, "contender")
        if all(row.get(value) is None for row in _of(rows, contender=name))
    }


def _named(absent: dict[str, str]) -> str:
    return f"Not measured: {', '.join(f'{name} ({status})' for name, status in absent.items())}." if absent else ""


def _verdict(rows: Sequence[Row]) -> str:
    """What the oracle says of our indices; the others' are in the table."""
    shares = [row["wrong_share"] for row in _of(rows, contender=_OURS) if row.get("wrong_share") is not None]
    if not shares:
        return ""
    return "fastvq had no wrong index." if max(shares) == 0 else f"FASTVQ HAD WRONG INDICES: up to {max(shares):.2g}."


def _limits(limits: dict[str, float]) -> str:
    if not limits:
        return ""
    return f"Limits: product {limits['product'] / 1e9:,.0f} GFLOP/s, copy {limits['copy'] / 1e9:,.1f} GB/s."


def _machine(head: Head) -> str:
    day = datetime.datetime.fromisoformat(head["date"])
    memory = head.get("host_memory_bytes")
    size = f", {memory / 2**30:.0f} GiB" if memory else ""
    return f"{head['device']}{size}, PyTorch {head['versions']['torch']}, {day.day} {day:%B %Y}"


def _versions(rows: Sequence[Row]) -> str:
    found = dict.fromkeys(row["version"] for row in rows if row.get("version") and _ran(row))
    return ", ".join(version for version in found if not version.startswith("torch "))
