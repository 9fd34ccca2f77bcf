"""Nearest code on the CPU, forward only, side by side: `python -m bench.search [--shapes esm3,4096x1000x8 ...]`.

All contenders run in turns in one process; the printed seconds are medians. Indices are compared with the float64
oracle, so that the share of wrong answers stands beside the speed. Distances are Euclidean at every shape.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.contenders import CONTENDERS, Contender, tokens_per_chunk
from bench.shapes import MODELS, QUICK, Shape, make_data, parse_shapes
from fastvq import reference
from fastvq.info import device_name, versions
from fastvq.measure import median_seconds

# The oracle is slow; this many tokens show an error share of a few in a thousand.
_CHECKED_TOKENS = 1024
_CHECKED_TOKENS_QUICK = 128
# Fewer tokens, but not below 64, where the oracle would need more float64 terms than this (about 6 seconds).
_CHECKED_TERMS = 4 * 10**9

Row = dict[str, Any]


def measure(
    shape: Shape,
    contenders: Mapping[str, Callable[[], Contender]],
    repeats: int,
    near: bool = False,
    checked_tokens: int = _CHECKED_TOKENS,
) -> list[Row]:
    """Time every contender at one shape and compare its indices with the oracle.

    Args:
        shape: sizes of the problem.
        contenders: a loader for each name; one that raises ImportError is missing.
        repeats: timed calls of each contender, after two untimed ones.
        near: tokens lie near codes, see :func:`bench.shapes.make_data`.
        checked_tokens: how many tokens are compared with the oracle.

    Returns:
        One row per contender, in the order given: its ``status`` is ``"ok"``, ``"missing"`` or ``"failed"``, and
        ``note`` says what happened. ``seconds`` is a median, null where there is none.
    """
    x, codebook = make_data(shape, near)
    affordable = max(64, _CHECKED_TERMS // codebook.numel())
    some = torch.linspace(0, len(x) - 1, min(checked_tokens, len(x), affordable)).long()
    expected = _oracle(x[some], codebook)
    rows: dict[str, Row] = {}
    searches: dict[str, Callable[[], Tensor]] = {}
    for name, load in contenders.items():
        rows[name] = {**shape._asdict(), "data": "near" if near else "gaussian", "contender": name}
        rows[name] |= {"status": "ok", "note": "", "version": None, "seconds": None, "all_seconds": []}
        rows[name] |= {"wrong_share": None, "checked_tokens": len(some)}
        try:
            contender = load()
            indices = contender.search(x, codebook)
            rows[name]["wrong_share"] = float((indices[some] != expected).double().mean())
        except ImportError as error:
            rows[name] |= {"status": "missing", "note": str(error)}
        except Exception as error:  # whatever another library raises belongs into the table
            rows[name] |= {"status": "failed", "note": f"{type(error).__name__}: {error}"}
        else:
            chunk = tokens_per_chunk(len(codebook))
            if contender.materialises and chunk < len(x):
                rows[name]["note"] = f"in chunks of {chunk} tokens, because [N, K] does not fit into memory"
            rows[name]["version"] = contender.version
            searches[name] = lambda search=contender.search: search(x, codebook)  # type: ignore[misc]
    for name, timing in median_seconds(searches, repeats, x.device).items():
        rows[name] |= {"seconds": timing.median, "all_seconds": timing.seconds}
    return list(rows.values())


def _oracle(x: Tensor, codebook: Tensor) -> Tensor:
    """On one thread: it consists of a great many small operations, for which threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return reference.nearest_code(x, codebook)
    finally:
        torch.set_num_threads(threads)


def run(
    shapes: Sequence[Shape], names: Sequence[str], repeats: int, near: bool, checked_tokens: int
) -> Iterator[list[Row]]:
    """Rows of one shape after the other, with a progress bar on standard error."""
    contenders = {name: CONTENDERS[name] for name in names}
    for shape in track(shapes, "searching", console=Console(stderr=True), transient=True):
        yield measure(shape, contenders, repeats, near, checked_tokens)


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows with what is needed to read them: machine, versions, date."""
    return {
        "benchmark": "search",
        "device": device_name(torch.device("cpu")),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": versions() | {row["contender"]: row["version"] for row in rows if row["version"]},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rows": list(rows),
    }


def results_table(rows: Sequence[Row]) -> Table:
    """Milliseconds of every contender at every shape, its ratio to fastvq where that ran, and its wrong share."""
    seconds = {(row["name"], row["tokens"], row["contender"]): row["seconds"] for row in rows}
    table = Table(title="Nearest code on the CPU, forward only: median of interleaved calls")
    for heading in ("shape", "N×K×D", "contender"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "× fastvq", "wrong"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    previous = None
    for row in rows:
        shape = Shape(*(row[field] for field in Shape._fields))
        if previous not in (None, shape):
            table.add_section()
        ours = seconds.get((shape.name, shape.tokens, "fastvq"))
        done = row["seconds"] is not None
        table.add_row(
            *(("", "") if shape == previous else (shape.name, shape.size)),
            row["contender"],
            f"{1e3 * row['seconds']:.2f}" if done else row["status"],
            f"{row['seconds'] / ours:.2f}" if done and ours else "",
            f"{100 * row['wrong_share']:.2g} %" if done else "",
            row["note"],
        )
        previous = shape
    return table


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help=f"tokens×codes×dim, or among {', '.join(MODELS)}; default all")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each contender; default 5")
    parser.add_argument("--near", action="store_true", help="tokens are codes plus small noise, as after training")
    parser.add_argument("--quick", action="store_true", help="few shapes, and fewer tokens given to the oracle")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    options = parser.parse_args(argv)
    try:
        chosen = ",".join(options.shapes or (QUICK if options.quick else MODELS))
        options.shapes = parse_shapes(chosen)
    except ValueError as error:
        parser.error(str(error))
    options.contenders = [name.strip() for name in options.contenders.split(",")]
    unknown = [name for name in options.contenders if name not in CONTENDERS]
    if unknown:
        parser.error(f"contenders must be among {', '.join(CONTENDERS)}, got {', '.join(unknown)}")
    if options.repeats < 1:
        parser.error(f"repeats must be at least 1, got {options.repeats}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the file."""
    options = _arguments(argv)
    checked = _CHECKED_TOKENS_QUICK if options.quick else _CHECKED_TOKENS
    rows: list[Row] = []
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    for some in run(options.shapes, options.contenders, options.repeats, options.near, checked):
        rows += some
        document = report(rows)
        if options.out:  # after every shape, so that an interrupted run keeps what is done
            options.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    console = Console()
    console.print(results_table(rows))
    console.print(f"{document['device']}, {document['date']}; tokens are cut where a model has more per step.")


if __name__ == "__main__":
    main()
