"""The results of `python -m bench.gpu` as Markdown: whole for a file, and short enough for the end of a log."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_MOST_CHARACTERS = 11_000
_MOST_FAILURES = 12

Document = dict[str, Any]


def failures(document: Document) -> list[str]:
    """What was wrong: indices, checks, and stages that did not end; nothing that was merely cut."""
    found = []
    for name, stage in document["stages"].items():
        rows = [row for row in stage["rows"] if row.get("passed") is False]
        found += [f"{name}: {_label(row)}: {row.get('result') or row.get('status') or 'wrong'}" for row in rows]
        if stage["status"] == "failed":
            reason = stage.get("traceback", "").strip().splitlines()[-1:] or stage["notes"][-1:]
            found.append(f"{name}: the stage failed: {' '.join(reason)}")
        broken = [
            row for row in stage["rows"] if row.get("status", "ok") != "ok" and "fastvq" in row.get("contender", "")
        ]
        found += [f"{name}: {_label(row)}, {row['contender']}: {row['note']}" for row in broken]
    return found


def _label(row: Document) -> str:
    return " ".join(str(row[key]) for key in ("name", "paste", "dtype") if row.get(key))


def summary(document: Document) -> tuple[str, str]:
    """All sections, and those that fit the end of a log; both end with the verdict."""
    sections = [_head(document), _failed(document), _checks(document)]
    sections += [_times(document, name) for name in ("timing", "models")]
    sections += [_sweep(document), _flash(document), _stage_times(document)]
    wrong = len(failures(document))
    verdict = f"RESULT: {f'{wrong} FAILURES, see above' if wrong else 'no failure'}\n"
    kept, room = [], _MOST_CHARACTERS - len(verdict)
    for section in filter(None, sections):
        if len(section) < room:
            kept.append(section)
            room -= len(section) + 1
        else:
            line = f"{section.splitlines()[0]}: does not fit here, see summary.md"
            kept.append(line)
            room -= len(line) + 1
    return "\n".join([*filter(None, sections), verdict]), "\n".join([*kept, verdict])


def _head(document: Document) -> str:
    head = document["head"]
    versions = ", ".join(f"{name} {version}" for name, version in head.get("versions", {}).items())
    driver = ", ".join(f"{name} {value}" for name, value in head.get("driver", {}).items())
    lines = [f"# {head.get('device', 'unknown device')}, {head.get('date', '')}", f"{versions}; {driver}".rstrip("; ")]
    lines.append(f"commit {head.get('commit', 'unknown')}, sources {head.get('sources', 'unknown')}")
    for row in _rows(document, "device"):
        rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['tbps']:.2f} TB/s"
        lines.append(f"{row['name']}: {rate}, {_clock(row)}".rstrip(", "))
    for name, stage in document["stages"].items():
        notes = f"; {'; '.join(stage['notes'])[:300]}" if stage["notes"] else ""
        lines.append(f"- {name}: {stage['status']}, {stage.get('seconds', 0):.0f} s, {len(stage['rows'])} rows{notes}")
    return "\n".join(lines) + "\n"


def _clock(row: Document) -> str:
    clocks = row.get("clocks") or {}
    return f"SM {clocks['clocks.sm']}, {clocks.get('power.draw', '')}" if "clocks.sm" in clocks else ""


def _failed(document: Document) -> str:
    found = failures(document)
    if not found:
        return ""
    more = [f"- ... and {len(found) - _MOST_FAILURES} more"] if len(found) > _MOST_FAILURES else []
    return "\n".join(["## WRONG OR FAILED", *(f"- {line[:300]}" for line in found[:_MOST_FAILURES]), *more]) + "\n"


def _checks(document: Document) -> str:
    lines = ["## Checks"]
    for row in _rows(document, "smoke"):
        lines.append(f"- {row['name']}: {row['seconds']:.2f} s, {row['wrong']} wrong")
    judged = [row for row in _rows(document, "exactness") if row.get("passed") is not None]
    triton = [row for row in judged if row.get("backend", "triton").startswith("triton")]
    for name, rows in (("kernels", triton), ("other backends", [row for row in judged if row not in triton])):
        if rows:
            lines.append(
                f"- exactness, {name}: {sum(row['passed'] for row in rows)} of {len(rows)} equal to the oracle"
            )
    for row in _rows(document, "training"):
        if "fastvq" in row:
            ours, theirs = row["fastvq"], row["reference"]
            sides = f"{_ms(ours['seconds'])} against {_ms(theirs['seconds'])} ms"
            memory = f"{_mb(ours['peak_extra_bytes'])} against {_mb(theirs['peak_extra_bytes'])} MB"
            lines.append(f"- {row['name']}: {sides} of the reference, {memory} extra")
        else:
            first = f", first search {row['first_search_seconds']:.1f} s" if "first_search_seconds" in row else ""
            lines.append(f"- {row['name']}: {row['result'][:200]}{first}")
    return "\n".join(lines) + "\n" if len(lines) > 1 else ""


def _times(document: Document, stage: str) -> str:
    """One line per problem; ratios are fastvq's time over the other's."""
    columns = ("", "N×K×D", "dtype", "ms", "packed", "TF/s", "Tp/s", "÷product", "÷flash", "flash", "cdist", "formula")
    table = _table(*columns, "open %", "MB", "host ms")
    for rows in _by_problem(_rows(document, stage)):
        full, packed = rows.get("fastvq", {}), rows.get("fastvq packed", {})
        best = packed if packed.get("seconds") else full
        others = [_ms(rows.get(name, {}).get("seconds")) for name in ("flash-kmeans", "cdist", "seed formula")]
        problem = next(iter(rows.values()))
        table.add_row(
            problem["name"], problem["size"], _short(problem), _ms(full.get("seconds")), _ms(packed.get("seconds")),
            _number(best.get("tflops"), 0), _number(best.get("tera_pairs"), 2), _number(best.get("times_product"), 2),
            _number(best.get("times_flash-kmeans"), 2), *others,
            _number(None if packed.get("open_share") is None else 100 * packed["open_share"], 3),
            _mb(full.get("peak_extra_bytes")), _ms(full.get("host_seconds")),
        )  # fmt: skip
    title = (
        "## Medians in ms; rates, ratios and open tokens of the search with packed codes"
        if stage == "timing"
        else ("## Sizes of models")
    )
    return _section(title, table)


def _stage_times(document: Document) -> str:
    """Microseconds on the device of each kernel of a whole search."""
    rows = [row for name in ("timing", "models") for row in _rows(document, name) if row.get("stages")]
    names = list(dict.fromkeys(name for row in rows for name in row["stages"]["seconds"]))
    table = _table("", "dtype", *names, "launches")
    for row in rows:
        seconds = row["stages"]["seconds"]
        table.add_row(
            row["name"], _short(row), *(_number(1e6 * seconds[name] if name in seconds else None, 0) for name in names),
            f"{row['stages']['launches']:.0f}",
        )  # fmt: skip
    return _section("## Kernels of a whole search, µs", table)


def _sweep(document: Document) -> str:
    """The fastest configurations of every width, in the form of the table of configurations."""
    lines = []
    every = [row for row in _rows(document, "sweep") if "width" in row]
    for width in dict.fromkeys(row["width"] for row in every):
        rows = [row for row in every if row["width"] == width]
        ran = [row for row in rows if row.get("relative") and row["status"] == "ok"]
        default = next((row for row in ran if not row["change"]), {})
        count = f"{len(ran)} of {len(rows)} ran"
        times = f"{_ms(default.get('seconds'))} ms, scan {_ms(default.get('scan_seconds'))}"
        lines.append(f"- width {width}: default {times}; {count}")
        best = (
            sorted(ran, key=lambda row: row["relative"])[:2]
            + sorted(ran, key=lambda row: row["scan_relative"] or 9)[:1]
        )
        for row in {row["paste"]: row for row in best}.values():
            scan = f", scan {row['scan_relative']:.3f}" if row["scan_relative"] else ""
            spills = f", spills {row['n_spills']}" if row.get("n_spills") else ""
            lines.append(f"    {row['paste']},  # {row['relative']:.3f} of the default{scan}{spills}")
    return "\n".join(["## Configurations of the scan", *lines]) + "\n" if lines else ""


def _flash(document: Document) -> str:
    table = _table("", "N×K×D", "fastvq", "packed", "flash", "flash best", "packed ÷ best", "configuration")
    for rows in _by_problem(_rows(document, "flash")):
        times = [
            rows.get(name, {}).get("seconds")
            for name in ("fastvq", "fastvq packed", "flash-kmeans", "flash-kmeans best")
        ]
        ratio = times[1] / times[3] if times[1] and times[3] else None
        last = list(rows.values())[-1]
        table.add_row(last["name"], last["size"], *map(_ms, times), _number(ratio, 2), last.get("note", "")[:110])
    return _section("## flash-kmeans at its best configuration, ms", table)


def _rows(document: Document, stage: str) -> list[Document]:
    rows: list[Document] = document["stages"].get(stage, {}).get("rows", [])
    return rows


def _by_problem(rows: Iterable[Document]) -> list[dict[str, Document]]:
    problems: dict[tuple[str, str, str], dict[str, Document]] = {}
    for row in rows:
        if "contender" not in row:  # a problem that failed as a whole
            continue
        problems.setdefault((row["name"], row["size"], row["dtype"]), {})[row["contender"]] = row
    return list(problems.values())


def _short(row: Document) -> str:
    names = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    return names.get(row["dtype"], "other") + ("" if row["metric"] == "euclidean" else f" {row['metric'][:3]}")


def _ms(seconds: float | None) -> str:
    return _number(None if seconds is None else 1e3 * seconds, 3)


def _mb(count: float | None) -> str:
    return _number(None if count is None else count / 1e6, 1)


def _number(value: float | None, digits: int) -> str:
    """Fixed digits, fewer for large values; a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.{max(0, digits - (len(str(int(abs(value)))) - 1))}f}"


def _table(*columns: str) -> Table:
    table = Table(box=box.MARKDOWN, pad_edge=False, padding=0)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _section(title: str, table: Table) -> str:
    if not table.row_count:
        return ""
    console = Console(file=io.StringIO(), width=400)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return f"{title}\n" + "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n"
