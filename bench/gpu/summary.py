"""The results of `python -m bench.gpu` as Markdown: whole for a file, and short enough for the end of a log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bench.report.grid import Grid, as_markdown

_MOST_CHARACTERS = 11_000
_MOST_FAILURES = 12

Document = dict[str, Any]


def failures(document: Document) -> list[str]:
    """Wrong indices, failed checks, and stages that did not end; stages cut for time are no failures."""
    found = []
    for name, stage in document["stages"].items():
        wrong = [row for row in stage["rows"] if row.get("passed") is False]
        found += [f"{name}: {_label(row)}: {row.get('result') or row.get('status') or 'wrong'}" for row in wrong]
        if stage["status"] == "failed":
            reason = stage.get("traceback", "").strip().splitlines()[-1:] or stage["notes"][-1:]
            found.append(f"{name}: the stage failed: {' '.join(reason)}")
        ours = [row for row in stage["rows"] if "fastvq" in row.get("contender", "")]
        broken = [row for row in ours if row.get("status", "ok") != "ok"]
        found += [f"{name}: {_label(row)}, {row['contender']}: {row['note']}" for row in broken]
    return found


def _label(row: Document) -> str:
    return " ".join(str(row[key]) for key in ("name", "paste", "dtype") if row.get(key))


def summary(document: Document) -> tuple[str, str]:
    """All sections, and the sections that fit the end of a log; both end with the verdict."""
    wrong = failures(document)
    sections = [_head(document), _failed(wrong), _checks(document)]
    titles = {
        "timing": "## Medians in ms; rates, ratios and open tokens of the search with packed codes",
        "models": "## Sizes of models",
    }
    sections += [_section(title, _TIMES, _by_problem(_rows(document, name))) for name, title in titles.items()]
    sections += [_sweep(document), _section("## flash-kmeans at its best configuration, ms", _FLASH, _flash(document))]
    sections = [section for section in (*sections, _stage_times(document)) if section]
    verdict = f"RESULT: {f'{len(wrong)} FAILURES, see above' if wrong else 'no failure'}\n"
    kept, room = [], _MOST_CHARACTERS - len(verdict)
    for section in sections:
        fits = len(section) < room
        kept.append(section if fits else f"{section.splitlines()[0]}: does not fit here, see summary.md")
        room -= len(kept[-1]) + 1
    return "\n".join([*sections, verdict]), "\n".join([*kept, verdict])


def _head(document: Document) -> str:
    head = document["head"]
    versions = ", ".join(f"{name} {version}" for name, version in head.get("versions", {}).items())
    driver = ", ".join(f"{name} {value}" for name, value in head.get("driver", {}).items())
    lines = [f"# {head.get('device', 'unknown device')}, {head.get('date', '')}", f"{versions}; {driver}".rstrip("; ")]
    lines.append(f"commit {head.get('commit', 'unknown')}, sources {head.get('sources', 'unknown')}")
    for row in _rows(document, "device"):
        rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['tbps']:.2f} TB/s"
        clocks = row.get("clocks") or {}
        clock = f"SM {clocks['clocks.sm']}, {clocks.get('power.draw', '')}" if "clocks.sm" in clocks else ""
        lines.append(f"{row['name']}: {rate}, {clock}".rstrip(", "))
    for name, stage in document["stages"].items():
        notes = f"; {'; '.join(stage['notes'])[:300]}" if stage["notes"] else ""
        lines.append(f"- {name}: {stage['status']}, {stage.get('seconds', 0):.0f} s, {len(stage['rows'])} rows{notes}")
    return "\n".join(lines) + "\n"


def _failed(found: list[str]) -> str:
    if not found:
        return ""
    more = [f"- ... and {len(found) - _MOST_FAILURES} more"] if len(found) > _MOST_FAILURES else []
    return "\n".join(["## WRONG OR FAILED", *(f"- {line[:300]}" for line in found[:_MOST_FAILURES]), *more]) + "\n"


def _checks(document: Document) -> str:
    lines = [f"- {row['name']}: {row['seconds']:.2f} s, {row['wrong']} wrong" for row in _rows(document, "smoke")]
    judged = [row for row in _rows(document, "exactness") if row.get("passed") is not None]
    triton = [row for row in judged if row.get("backend", "triton").startswith("triton")]
    for name, rows in (("kernels", triton), ("other backends", [row for row in judged if row not in triton])):
        if rows:
            right = sum(row["passed"] for row in rows)
            lines.append(f"- exactness, {name}: {right} of {len(rows)} equal to the oracle")
    for row in _rows(document, "training"):
        if "fastvq" in row:
            ours, theirs = row["fastvq"], row["reference"]
            sides = f"{_ms(ours['seconds'])} against {_ms(theirs['seconds'])} ms"
            memory = f"{_mb(ours['peak_extra_bytes'])} against {_mb(theirs['peak_extra_bytes'])} MB"
            lines.append(f"- {row['name']}: {sides} of the reference, {memory} extra")
        else:
            first = f", first search {row['first_search_seconds']:.1f} s" if "first_search_seconds" in row else ""
            lines.append(f"- {row['name']}: {row['result'][:200]}{first}")
    return "\n".join(["## Checks", *lines]) + "\n" if lines else ""


def _sweep(document: Document) -> str:
    """The fastest configurations of every width, in the form of the table of configurations."""
    lines = []
    every = [row for row in _rows(document, "sweep") if "width" in row]
    for width in dict.fromkeys(row["width"] for row in every):
        rows = [row for row in every if row["width"] == width]
        ran = [row for row in rows if row.get("relative") and row["status"] == "ok"]
        default = next((row for row in ran if not row["change"]), {})
        times = f"{_ms(default.get('seconds'))} ms, scan {_ms(default.get('scan_seconds'))}"
        lines.append(f"- width {width}: default {times}; {len(ran)} of {len(rows)} ran")
        best = sorted(ran, key=lambda row: row["relative"])[:2]
        best += sorted(ran, key=lambda row: row["scan_relative"] or 9)[:1]
        for row in {row["paste"]: row for row in best}.values():
            scan = f", scan {row['scan_relative']:.3f}" if row["scan_relative"] else ""
            spills = f", spills {row['n_spills']}" if row.get("n_spills") else ""
            lines.append(f"    {row['paste']},  # {row['relative']:.3f} of the default{scan}{spills}")
    return "\n".join(["## Configurations of the scan", *lines]) + "\n" if lines else ""


def _flash(document: Document) -> list[Document]:
    return _by_problem(_rows(document, "flash"))


def _stage_times(document: Document) -> str:
    """Microseconds on the device of each kernel of a whole search."""
    rows = [row for name in ("timing", "models") for row in _rows(document, name) if row.get("stages")]
    names = dict.fromkeys(name for row in rows for name in row["stages"]["seconds"])
    columns: dict[str, Callable[[Any], str]] = {"": lambda row: row["name"], "dtype": _short}
    columns |= {name: lambda row, name=name: _number(_us(row["stages"]["seconds"].get(name)), 0) for name in names}
    columns["launches"] = lambda row: f"{row['stages']['launches']:.0f}"
    return _section("## Kernels of a whole search, µs", columns, rows)


def _rows(document: Document, stage: str) -> list[Document]:
    rows: list[Document] = document["stages"].get(stage, {}).get("rows", [])
    return rows


def _by_problem(rows: Iterable[Document]) -> list[dict[str, Document]]:
    """The rows of each problem by contender, the first also under ""; without problems that failed as a whole."""
    problems: dict[tuple[str, str, str], dict[str, Document]] = {}
    for row in rows:
        if "contender" in row:
            problems.setdefault((row["name"], row["size"], row["dtype"]), {"": row})[row["contender"]] = row
    return list(problems.values())


def _section(title: str, columns: dict[str, Callable[[Any], str]], rows: Iterable[Any]) -> str:
    lines = [[show(row) for show in columns.values()] for row in rows]
    return f"{title}\n{as_markdown(Grid('', [], list(columns), lines))}\n" if lines else ""


def _short(row: Document) -> str:
    names = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    return names.get(row["dtype"], "other") + ("" if row["metric"] == "euclidean" else f" {row['metric'][:3]}")


def _us(seconds: float | None) -> float | None:
    return None if seconds is None else 1e6 * seconds


def _ms(seconds: float | None) -> str:
    return _number(None if seconds is None else 1e3 * seconds, 3)


def _mb(count: float | None) -> str:
    return _number(None if count is None else count / 1e6, 1)


def _number(value: float | None, digits: int) -> str:
    """Fixed digits, fewer for large values; a dash for nothing."""
    return "-" if value is None else f"{value:.{max(0, digits - (len(str(int(abs(value)))) - 1))}f}"


def _of(name: str, column: str, show: Callable[[Any], str] = _ms) -> Callable[[dict[str, Document]], str]:
    """A column of the contender ``name``, of the search with packed codes where that ran for "best"."""

    def cell(rows: dict[str, Document]) -> str:
        best = "fastvq packed" if rows.get("fastvq packed", {}).get("seconds") else "fastvq"
        return show(rows.get(best if name == "best" else name, {}).get(column))

    return cell


def _packed_over_best(rows: dict[str, Document]) -> str:
    ours, theirs = (rows.get(name, {}).get("seconds") for name in ("fastvq packed", "flash-kmeans best"))
    return _number(ours / theirs if ours and theirs else None, 2)


# Ratios are fastvq's time over the other's.
_TIMES: dict[str, Callable[[Any], str]] = {
    "": _of("", "name", str),
    "N×K×D": _of("", "size", str),
    "dtype": lambda rows: _short(rows[""]),
    "ms": _of("fastvq", "seconds"),
    "packed": _of("fastvq packed", "seconds"),
    "TF/s": _of("best", "tflops", lambda value: _number(value, 0)),
    "Tp/s": _of("best", "tera_pairs", lambda value: _number(value, 2)),
    "÷product": _of("best", "times_product", lambda value: _number(value, 2)),
    "÷flash": _of("best", "times_flash-kmeans", lambda value: _number(value, 2)),
    "flash": _of("flash-kmeans", "seconds"),
    "cdist": _of("cdist", "seconds"),
    "formula": _of("expanded formula", "seconds"),
    "open %": _of("fastvq packed", "open_share", lambda share: _number(None if share is None else 100 * share, 3)),
    "MB": _of("fastvq", "peak_extra_bytes", _mb),
    "host ms": _of("fastvq", "host_seconds"),
}
_FLASH: dict[str, Callable[[Any], str]] = {
    "": _of("", "name", str),
    "N×K×D": _of("", "size", str),
    "fastvq": _of("fastvq", "seconds"),
    "packed": _of("fastvq packed", "seconds"),
    "flash": _of("flash-kmeans", "seconds"),
    "flash best": _of("flash-kmeans best", "seconds"),
    "packed ÷ best": _packed_over_best,
    "configuration": _of("flash-kmeans best", "note", lambda note: (note or "")[:110]),
}
