"""Rows of results as tables, one function per benchmark; formats of numbers."""

import datetime
import math
from collections.abc import Iterator, Sequence
from typing import Any

from bench.harness.store import Row
from bench.plans.memory import growth
from bench.plans.roofline import share_of_limit
from bench.plans.scaling import slope
from bench.report.grid import Grid

EXPANDED = "expanded formula"
OURS = "fastvq"
GREEDY = "scikit-learn"
_AXES = {"tokens": "N", "codes": "K", "dim": "D"}

Head = dict[str, Any]


def side_by_side(title: str, head: Head, rows: Sequence[Row]) -> Grid:
    """One line per shape: our milliseconds, and the times of the others divided by ours; wrong indices beside them."""
    measured, absent = _measured(rows, "seconds")
    others = [name for name in unique(measured, "contender") if name != OURS]
    lines = []
    for shape in shapes_of(rows):
        found = {row["contender"]: row for row in shape}
        ours = found.get(OURS, {})
        cells = [shape[0]["name"], size(shape[0]), _with_wrong(ours, _ms(ours["seconds"]) if ran(ours) else "-")]
        for row in (found.get(name, {}) for name in others):
            ratio = _places(row["seconds"] / ours["seconds"]) if ran(row) and ran(ours) else "-"
            cells.append(_with_wrong(row, ratio))
        lines.append(cells)
    versions = dict.fromkeys(row["version"] for row in measured if row.get("version") and ran(row))
    named = ", ".join(version for version in versions if not version.startswith("torch "))
    headings = ["shape", "N × K × D", f"{OURS}, ms", *others]
    return Grid(title, [f"{_machine(head)}; {named}.", absent, _verdict(rows)], headings, lines, left=2)


def timed(title: str, head: Head, rows: Sequence[Row], limits: dict[str, float]) -> Grid:
    """One line per shape and contender, with everything that was measured."""
    lines = []
    for shape in shapes_of(rows):
        expanded = next((row["seconds"] for row in shape if row["contender"] == EXPANDED and ran(row)), None)
        for i, row in enumerate(shape):
            lines.append([
                *((row["name"], size(row)) if i == 0 else ("", "")),
                row["contender"],
                _time(row),
                f"{_ms(row['seconds_p20'])} to {_ms(row['seconds_p80'])}" if ran(row) else "",
                _places(expanded / row["seconds"]) if expanded and ran(row) else "",
                _percent(share_of_limit(row, limits)),
                _percent(row.get("wrong_share")),
                row["note"] if len(row["note"]) <= 120 else f"{row['note'][:117]}...",
            ])  # fmt: skip
    rates = ""
    if limits:
        rates = f"Limits: product {limits['product'] / 1e9:,.0f} GFLOP/s, copy {limits['copy'] / 1e9:,.1f} GB/s."
    headings = ["shape", "N × K × D", "contender", "ms", "20 to 80 %", "× expanded", "of limit", "wrong", "note"]
    return Grid(title, [f"{_machine(head)}.", rates], headings, lines, left=3)


def worst(title: str, head: Head, rows: Sequence[Row]) -> Grid:
    """One line per kind of codebook: our time over that of the expanded formula at every size."""
    sizes = unique([{"size": size(row)} for row in rows], "size")
    ratios: dict[tuple[str, str], str] = {}
    for shape in shapes_of(rows):
        found = {row["contender"]: row for row in shape}
        ours, formula = found.get(OURS, {}), found.get(EXPANDED, {})
        ratio = _places(ours["seconds"] / formula["seconds"]) if ran(ours) and ran(formula) else "-"
        ratios[shape[0]["name"], size(shape[0])] = _with_wrong(ours, ratio)
    lines = [[name, *(ratios.get((name, here), "") for here in sizes)] for name in unique(rows, "name")]
    return Grid(title, [f"{_machine(head)}.", _verdict(rows)], ["codebook", *sizes], lines, left=1)


def memory(title: str, head: Head, rows: Sequence[Row]) -> Grid:
    """One line per operation and contender: MiB at every number of codes, and how they grow with it."""
    tokens, dim, codes = rows[0]["tokens"], rows[0]["dim"], sorted(unique(rows, "codes"))
    measured, absent = _measured(rows, "extra_bytes")
    lines, remarks = [], []
    for operation, label, name, here in _sections(measured, "operation"):
        found = {row["codes"]: row for row in here}
        extra = {k: found[k]["extra_bytes"] for k in codes if found.get(k, {}).get("extra_bytes") is not None}
        cells = [_mib(extra[k]) if k in extra else found[k]["status"] if k in found else "" for k in codes]
        per_code = ""
        if len(extra) > 1:
            grown = growth(list(extra), list(extra.values()), tokens, dim)
            per_code = f"{grown['codebooks']:.1f} codebooks, {grown['matrices']:.2f} matrices"
            if name == OURS:
                remarks.append(f"{OURS}, {operation}: {_flatness(grown)}.")
        lines.append([label, name, *cells, per_code])
    unit = "MiB beyond tokens and codebook; a matrix is one of [tokens, codes] in float32."
    remarks = [f"{_machine(head)}.", f"{tokens:,} tokens, D = {dim}; {unit}", *remarks, absent]
    headings = ["", "contender", *(f"K = {k:,}" for k in codes), "grows with K by"]
    return Grid(title, remarks, headings, lines, left=2)


def _flatness(grown: dict[str, float]) -> str:
    if math.isfinite(grown["flat_from"]):
        return f"the same within 5 % from K = {grown['flat_from']:,} on"
    least, most = _mib(grown["least"]), _mib(grown["most"])
    return f"{grown['codebooks']:.1f} times the codebook and between {least} and {most} MiB"


def accuracy(title: str, head: Head, rows: Sequence[Row]) -> Grid:
    """One line per dtype and contender: percent of wrong indices at every offset."""
    offsets = sorted(unique(rows, "offset"))
    measured, absent = _measured(rows, "wrong_share")
    lines = []
    for _, label, name, here in _sections(measured, "dtype"):
        found = {row["offset"]: _percent(row.get("wrong_share")) or row["status"] for row in here}
        lines.append([label, name, *(found.get(offset, "") for offset in offsets)])
    first = rows[0]
    checked = f"{first['checked_tokens']:,} tokens, " if first.get("checked_tokens") else ""
    remarks = [
        f"{_machine(head)}; {checked}K = {first['codes']:,}, D = {first['dim']}; offset in standard deviations.",
        "expanded in half: the formula in the precision given; half product: the product in it, norms in float32;",
        "the others get half precision as float32.",
        absent,
    ]
    headings = ["dtype", "contender", *(f"offset {offset:g}" for offset in offsets)]
    return Grid(title, remarks, headings, lines, left=2)


def means(title: str, head: Head, rows: Sequence[Row]) -> Grid:
    """One line per offset and contender: the error at every number of tokens."""
    sizes = sorted(unique(rows, "tokens"))
    measured, absent = _measured(rows, "error_ulp")
    lines = []
    for offset, label, name, here in _sections(measured, "offset"):
        found = {row["tokens"]: _ulp(row["error_ulp"]) if "error_ulp" in row else row["status"] for row in here}
        lines.append([f"{offset:g}" if label != "" else "", name, *(found.get(size, "") for size in sizes)])
    remarks = [f"{_machine(head)}; tokens between offset and offset + 1; 0.5 is a true mean rounded once.", absent]
    headings = ["offset", "contender", *(f"{size:,} tokens" for size in sizes)]
    return Grid(title, remarks, headings, lines, left=2)


def scaling(title: str, head: Head, rows: Sequence[Row]) -> Grid:
    """One line per axis and contender: milliseconds at every size, and the fitted exponent."""
    width = max(len(unique(rows_where(rows, axis=axis), axis)) for axis in unique(rows, "axis"))
    lines = []
    for axis, first, name, here in _sections(rows, "axis"):
        if first:
            sizes = sorted(unique(rows_where(rows, axis=axis), axis))
            others = ", ".join(f"{_AXES[other]} = {here[0][other]:,}" for other in _AXES if other != axis)
            lines.append([f"{_AXES[axis]} = {', '.join(f'{size:,}' for size in sizes)}; {others}", *[""] * (width + 2)])
        here = sorted(here, key=lambda row: row[axis])
        cells = [_time(row) for row in here]
        there = [row for row in here if ran(row)]
        exponent = slope([row[axis] for row in there], [row["seconds"] for row in there])
        power = "" if math.isnan(exponent) else f"{_AXES[axis]}^{exponent:.2f}"
        lines.append(["", name, *cells, *[""] * (width - len(cells)), power])
    headings = ["", "contender", "ms", *[""] * (width - 1), "time ∝"]
    return Grid(title, [f"{_machine(head)}."], headings, lines, left=2)


def kmeans(title: str, head: Head, rows: Sequence[Row]) -> Grid:
    """One line per set of tokens: inertias divided by that of greedy k-means++, our seconds, and others' over ours."""
    measured, absent = _measured(rows, "seconds")
    others = [name for name in unique(measured, "contender") if name != OURS]
    rated = [name for name in (OURS, *others) if name != GREEDY]
    lines = []
    for _, label, _, here in _sections(measured, "name"):
        if not label:
            continue
        found = {row["contender"]: row for row in rows_where(measured, name=label)}
        best, ours = found.get(GREEDY, {}), found.get(OURS, {})

        def over(column: str, name: str, base: Row, found: dict[str, Row] = found) -> float | None:
            return found[name][column] / base[column] if ran(base) and ran(found.get(name, {})) else None

        ratios = [over("inertia", name, best) for name in rated]
        times = [over("seconds", name, ours) for name in others]
        lines.append([
            label,
            f"{here[0]['n_tokens']:,} × {here[0]['codes']:,} × {here[0]['dim']:,}",
            here[0]["operation"].split()[0],
            *(f"{ratio:.3f}" if ratio else "-" for ratio in ratios),
            f"{ours['seconds']:.2f}" if ours else "-",
            *(_places(ratio) if ratio else "-" for ratio in times),
        ])  # fmt: skip
    versions = dict.fromkeys(row["version"] for row in measured if row.get("version"))
    headings = ["tokens", "N × K × D", "steps", *(f"{name}, inertia" for name in rated), f"{OURS}, s"]
    remarks = [
        f"{_machine(head)}; {', '.join(versions)}.",
        f"Inertias divided by {GREEDY}'s, times by {OURS}'s.",
        absent,
    ]
    return Grid(title, remarks, [*headings, *others], lines, left=2)


def unique(rows: Sequence[Row], column: str) -> list[Any]:
    """The values of a column, each once, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


def rows_where(rows: Sequence[Row], **columns: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in columns.items())]


def ran(row: Row) -> bool:
    """Whether a row has a time."""
    return row.get("seconds") is not None


def shapes_of(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each shape."""
    shapes: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        shapes.setdefault((row["name"], row["tokens"], row["codes"], row["dim"], row["dtype"]), []).append(row)
    return list(shapes.values())


def size(row: Row) -> str:
    """N × K × D of a row, and its dtype if that is not float32."""
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return f"{row['tokens']:,} × {row['codes']:,} × {row['dim']:,}{dtype}"


def _sections(rows: Sequence[Row], column: str) -> Iterator[tuple[str, str, str, list[Row]]]:
    """Each value of a column, the same as a label of its first line, and the name and the rows of each contender."""
    for value in unique(rows, column):
        section = rows_where(rows, **{column: value})
        for i, name in enumerate(unique(section, "contender")):
            yield value, "" if i else value, name, rows_where(section, contender=name)


def _measured(rows: Sequence[Row], value: str) -> tuple[list[Row], str]:
    """Rows of the contenders with at least one value, and a remark that names the other contenders."""
    names = {row["contender"] for row in rows if row.get(value) is not None}
    absent: dict[str, str] = {}
    for row in rows:
        if row["contender"] not in names:
            absent.setdefault(row["contender"], row["status"])
    told = ", ".join(f"{name} ({status})" for name, status in absent.items())
    return [row for row in rows if row["contender"] in names], f"Not measured: {told}." if told else ""


def _time(row: Row) -> str:
    return _ms(row["seconds"]) if ran(row) else row["status"]


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _places(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    percent = 100 * share
    return "0" if percent == 0 else f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.2g} %"


def _ulp(error: float) -> str:
    return f"{error:,.0f}" if error >= 10 else f"{error:.2g}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def _with_wrong(row: Row, text: str) -> str:
    if row and not ran(row):
        return row["status"]
    return f"{text} ({_percent(row['wrong_share'])} wrong)" if row.get("wrong_share") else text


def _verdict(rows: Sequence[Row]) -> str:
    """What the oracle says of our indices; the others' are in the table."""
    shares = [row["wrong_share"] for row in rows_where(rows, contender=OURS) if row.get("wrong_share") is not None]
    if not shares:
        return ""
    return "fastvq had no wrong index." if max(shares) == 0 else f"FASTVQ HAD WRONG INDICES: up to {max(shares):.2g}."


def _machine(head: Head) -> str:
    day = datetime.datetime.fromisoformat(head["date"])
    memory = head.get("host_memory_bytes")
    gib = f", {memory / 2**30:.0f} GiB" if memory else ""
    return f"{head['device']}{gib}, PyTorch {head['versions']['torch']}, {day.day} {day:%B %Y}"
