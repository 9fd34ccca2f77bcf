"""The results of `python -m bench.gpu` as Markdown: whole for a file, and short enough for the end of a log."""

from collections.abc import Callable, Iterable
from typing import Any

from bench.report.grid import Grid, as_markdown

_MOST_CHARACTERS = 11_000
_MOST_FAILURES = 12

Document = dict[str, Any]
Columns = dict[str, Callable[[Any], str]]


def failures(document: Document) -> list[str]:
    """Wrong indices, failed checks, and stages that did not end; stages cut for time are no failures."""
    found = []
    for name, stage in document["stages"].items():
        for row in stage["rows"]:
            label = " ".join([f"{name}:", *(str(row[key]) for key in ("name", "paste", "dtype") if row.get(key))])
            if row.get("passed") is False:
                found.append(f"{label}: {row.get('result') or row.get('status') or 'wrong'}")
            if "fastvq" in row.get("contender", "") and row.get("status", "ok") != "ok":
                found.append(f"{label}, {row['contender']}: {row['note']}")
        if stage["status"] == "failed":
            reason = stage.get("traceback", "").strip().splitlines()[-1:] or stage["notes"][-1:]
            found.append(f"{name}: the stage failed: {' '.join(reason)}")
    return found


def summary(document: Document) -> tuple[str, str]:
    """All sections, and the sections that fit the end of a log; both end with the verdict."""
    wrong = failures(document)
    medians = "Medians in ms; rates, ratios and open tokens of the search with packed codes"
    sections = [
        _head(document),
        _section(f"WRONG OR FAILED: {len(wrong)}", [f"- {line[:300]}" for line in wrong[:_MOST_FAILURES]]),
        _section("Checks", _checks(document)),
        _section(medians, _table(_TIMES, _by_problem(document, "timing"))),
        _section("Sizes of models", _table(_TIMES, _by_problem(document, "models"))),
        _section("Configurations of the scan", _sweep(_rows(document, "sweep"))),
        _section("flash-kmeans at its best configuration, ms", _table(_FLASH, _by_problem(document, "flash"))),
        _section("Kernels of a whole search, µs", _stage_times(document)),
    ]
    verdict = f"RESULT: {f'{len(wrong)} FAILURES, see above' if wrong else 'no failure'}\n"
    kept, room = [], _MOST_CHARACTERS - len(verdict)
    for section in filter(None, sections):
        fits = len(section) < room
        kept.append(section if fits else f"{section.splitlines()[0]}: does not fit here, see summary.md")
        room -= len(kept[-1]) + 1
    return "\n".join([*filter(None, sections), verdict]), "\n".join([*kept, verdict])


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([f"## {title}", *lines]) + "\n" if lines else ""


def _table(columns: Columns, rows: Iterable[Any]) -> list[str]:
    cells = [[show(row) for show in columns.values()] for row in rows]
    return [as_markdown(Grid("", [], list(columns), cells))] if cells else []


def _head(document: Document) -> str:
    head = document["head"]
    versions, driver = (", ".join(map(" ".join, head.get(key, {}).items())) for key in ("versions", "driver"))
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


def _checks(document: Document) -> list[str]:
    judged = [row for row in _rows(document, "exactness") if row.get("passed") is not None]
    lines = _results(document, "smoke")
    for name, kernels in (("kernels", True), ("other backends", False)):
        passed = [row["passed"] for row in judged if row.get("backend", "triton").startswith("triton") is kernels]
        lines += [f"- exactness, {name}: {sum(passed)} of {len(passed)} equal to the oracle"] if passed else []
    return lines + _results(document, "training")


def _results(document: Document, stage: str) -> list[str]:
    return [f"- {row['name']}: {row['result'][:200]}" for row in _rows(document, stage)]


def _sweep(every: list[Document]) -> list[str]:
    """The fastest configurations of every width, in the form of the table of configurations."""
    lines = []
    for width in dict.fromkeys(row["width"] for row in every if "width" in row):
        rows = [row for row in every if row.get("width") == width]
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
    return lines


def _stage_times(document: Document) -> list[str]:
    """Microseconds on the device of each kernel of a whole search."""
    rows = [row for name in ("timing", "models") for row in _rows(document, name) if row.get("stages")]
    columns: Columns = {"": lambda row: row["name"], "dtype": _short}
    for name in dict.fromkeys(name for row in rows for name in row["stages"]["seconds"]):
        columns[name] = lambda row, name=name: _number(row["stages"]["seconds"].get(name), 0, 1e6)  # type: ignore[misc]
    columns["launches"] = lambda row: f"{row['stages']['launches']:.0f}"
    return _table(columns, rows)


def _rows(document: Document, stage: str) -> list[Document]:
    return list(document["stages"].get(stage, {}).get("rows", []))


def _by_problem(document: Document, stage: str) -> list[dict[str, Document]]:
    """The rows of each problem by contender, the first also under "", fastvq's fastest form also under "best"."""
    problems: dict[tuple[str, str, str], dict[str, Document]] = {}
    for row in _rows(document, stage):
        if "contender" in row:  # else the problem failed as a whole
            rows = problems.setdefault((row["name"], row["size"], row["dtype"]), {"": row})
            rows[row["contender"]] = row
            if row["contender"] == "fastvq" or (row["contender"] == "fastvq packed" and row.get("seconds")):
                rows["best"] = row
    return list(problems.values())


def _short(row: Document) -> str:
    names = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    return names.get(row["dtype"], "other") + ("" if row["metric"] == "euclidean" else f" {row['metric'][:3]}")


def _number(value: float | None, digits: int, scale: float = 1) -> str:
    """``value * scale`` with fixed digits, fewer for large numbers; a dash for None."""
    if value is None:
        return "-"
    value *= scale
    return f"{value:.{max(0, digits - (len(str(int(abs(value)))) - 1))}f}"


def _ms(seconds: float | None) -> str:
    return _number(seconds, 3, 1e3)


def _of(contender: str, column: str, digits: int = 3, scale: float = 1e3) -> Callable[[dict[str, Document]], str]:
    """A column of one contender, scaled."""
    return lambda rows: _number(rows.get(contender, {}).get(column), digits, scale)


_SIZES: Columns = {"": lambda rows: rows[""]["name"], "N×K×D": lambda rows: rows[""]["size"]}
# Ratios are fastvq's time over the other's.
_TIMES: Columns = {
    **_SIZES,
    "dtype": lambda rows: _short(rows[""]),
    "ms": _of("fastvq", "seconds"),
    "packed": _of("fastvq packed", "seconds"),
    "TF/s": _of("best", "tflops", 0, 1),
    "Tp/s": _of("best", "tera_pairs", 2, 1),
    "÷product": _of("best", "times_product", 2, 1),
    "÷flash": _of("best", "times_flash-kmeans", 2, 1),
    "flash": _of("flash-kmeans", "seconds"),
    "cdist": _of("cdist", "seconds"),
    "formula": _of("expanded formula", "seconds"),
    "open %": _of("fastvq packed", "open_share", 3, 100),
    "MB": _of("fastvq", "peak_extra_bytes", 1, 1e-6),
    "host ms": _of("fastvq", "host_seconds"),
}
_FLASH: Columns = {
    **_SIZES,
    "fastvq": _of("fastvq", "seconds"),
    "packed": _of("fastvq packed", "seconds"),
    "flash": _of("flash-kmeans", "seconds"),
    "flash best": _of("flash-kmeans best", "seconds"),
    "packed ÷ best": _of("fastvq packed", "times_flash-kmeans best", 2, 1),
    "configuration": lambda rows: rows.get("flash-kmeans best", {}).get("note", "-")[:110],
}
