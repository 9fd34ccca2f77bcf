"""How many tokens each step of the certified search proves: `python -m bench.static.open_tokens [--shapes esm3 ...]`.

The kernels themselves decide, in Triton's interpreter, with the configuration of sm_90 and the number of ranges that a
GPU takes for the batch of the model. The counts do not depend on the machine. Three kinds of tokens and codes:

    gaussian  standard normal, independent of each other
    near      Gaussian codes, tokens are codes plus noise of a tenth of their spread, as after training
    photos    patches of the demo's photographs and a codebook trained on such patches: in flat regions codes lie far
              closer together than the rounding of their norms, the hardest case by far
"""

import argparse
import datetime
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from bench.gpu.problems import MODELS, PUBLISHED
from bench.harness.problems import Problem, make_inputs
from bench.harness.store import Row, write_json
from bench.report.grid import Grid, as_markdown, as_table
from bench.static.issue_model import H100
from bench.static.refine_model import COUNTS, ranges_on_gpu, same_counts, sm_90_config
from fastvq import EMACodebook
from fastvq.backends.triton import interpreting
from fastvq.cli.demo.photos import PatchSampler, load_photos, to_tokens
from fastvq.testing.machine import versions
from fastvq_kernels.search import scan as scan_module
from fastvq_kernels.search.decide import Crowded, decide
from fastvq_kernels.search.open_tokens import CANDIDATES
from fastvq_kernels.search.pack_codes import pack_codebook
from fastvq_kernels.search.pack_tokens import pack_tokens
from fastvq_kernels.search.refine import refine
from fastvq_kernels.search.rescan import rescan
from fastvq_kernels.search.scan_float64 import SHARES, Float64Bounds, scan_float64

# Pairs of token and code per count: about 20 s in the interpreter.
_PAIRS = 1 << 24
# Patch side in pixels: codes. All tokens of both photographs are one batch.
_PATCHES = {1: 8192, 2: 4096, 4: 4096, 8: 4096}
_PHOTOS = {
    f"photos-{side}": Problem(f"photos-{side}", 2 * 427 * 640 // side**2, codes, 3 * side**2)
    for side, codes in _PATCHES.items()
}
# With the demo's decay of 0.8 the first batch has a weight of 0.1 % at the end. Under a minute for 192 columns.
_TRAINING_STEPS = 30


def count(x: Tensor, codebook: Tensor, metric: str, ranges: int) -> Row:
    """Search for ``x [N, D]`` in ``codebook [K, D]``, and count which step proves what.

    Returns:
        ``by_scan`` tokens proved by the bounds of the scan alone, ``by_two`` by the fp32 values of their two best
        codes, ``open`` for the second scan, which has ``again`` ranges to scan for them, counted for each token. Of
        these, ``crowded`` have more ``candidates`` than there is room for, and are scanned a third time; the others
        have that many together. The third scan leaves ``exhaustive`` tokens for the walk. A token has ``bins`` in all,
        in ``ranges``.
    """
    packed = pack_codebook(codebook, metric, sm_90_config(x.shape[1]))
    tokens = pack_tokens(x[None], packed)
    with patch.object(scan_module, "splits", lambda *_: ranges):
        bins = scan_module.scan(tokens, len(x), packed)
    indices, open_list = refine(x[None], packed, tokens, bins)
    # Codes of infinite length have no fp32 bounds, so only the bounds of the scan, which do not use the length, prove.
    blind, _ = refine(x[None], replace(packed, length=torch.full_like(packed.length, torch.inf)), tokens, bins)
    by_scan, proved = int((blind >= 0).sum()), int((indices >= 0).sum())
    crowded = decide(x[None], packed, open_list, rescan(packed, tokens, bins, open_list), indices)
    at, threshold = open_list.tokens[0, : int(open_list.count)], open_list.factors[0, : int(open_list.count), 2]
    again = _reaching(bins.rest, at, threshold).any(2) & (threshold < torch.inf)[:, None]
    found = open_list.found[0, : int(open_list.count)]
    return {
        "tokens": len(x),
        "by_scan": by_scan,
        "by_two": proved - by_scan,
        "open": int(open_list.count),
        "again": int(again.sum()),
        "candidates": int(found[found <= CANDIDATES].sum()),
        "crowded": int(crowded.count),
        "exhaustive": ties(crowded, scan_float64(x[None], packed, crowded)),
        "ranges": bins.ranges,
        "bins": bins.per_token,
    }


def third_bounds(crowded: Crowded, found: Float64Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """Upper bounds of the best and of all other codes, and the largest lower bound, of each crowded token of a head."""
    n, block = int(crowded.count), found.config.block_m
    tiles = -(-n // block)
    shares = min(max(found.programs // max(tiles, 1), 1), SHARES)
    shares = -(-found.steps // -(-found.steps // shares))

    def of_token(values: Tensor) -> Tensor:
        return values[0, : tiles * shares * block].view(tiles, shares, block).transpose(1, 2).reshape(-1, shares)[:n]

    upper, second, lower = map(of_token, (found.upper, found.second, found.lower))
    others = upper.scatter(1, upper.argmax(1, keepdim=True), -torch.inf).amax(1)
    return upper.amax(1), torch.maximum(others, second.amax(1)), lower.amax(1)


def ties(crowded: Crowded, found: Float64Bounds) -> int:
    """Crowded tokens of one head that the third scan does not prove, as `exhaustive_kernel` finds them."""
    _, others, lower = third_bounds(crowded, found)
    return int((~(others < lower)).sum())


def _reaching(values: Tensor, at: Tensor, threshold: Tensor) -> Tensor:
    """Bins [n, S, LANES] of tokens ``at [n]`` whose value reaches ``threshold [n]``: all if that is not above zero."""
    return ~(values[0, at] < torch.where(threshold > 0.0, threshold, -torch.inf)[:, None, None])


def photo_data(problem: Problem, tokens: int) -> tuple[Tensor, Tensor]:
    """``tokens`` random patches of the photographs' grids and a codebook trained on patches."""
    side = round((problem.dim / 3) ** 0.5)
    photos = load_photos([])
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    sampler = PatchSampler(photos, side, torch.device("cpu"))
    codebook = EMACodebook(
        problem.codes, problem.dim, no_random_restart=False, restart_thres=0.2, ema_decay=0.8, backend="torch"
    )
    with torch.no_grad():
        for _ in range(_TRAINING_STEPS):
            codebook(sampler.draw(max(16384, 2 * problem.codes), generator))
    grid = torch.cat([to_tokens(photo.pixels, side) for photo in photos])
    return grid[torch.randperm(len(grid), generator=generator)[:tokens]], codebook.embeddings


def problems() -> list[Problem]:
    """One problem per codebook size, metric and number of ranges, with the names of all that share them."""
    groups: dict[tuple[int, int, str, int], list[Problem]] = {}
    for problem in (*PUBLISHED, *MODELS):
        groups.setdefault(same_counts(problem), []).append(problem)
    return [replace(group[0], name=", ".join(each.name for each in group)) for group in groups.values()]


def rows_of(problem: Problem, tokens: int | None) -> list[Row]:
    """A row per kind of data, of at most ``tokens`` tokens, and as many as the interpreter counts in about a minute."""
    tokens = min(tokens or 2048, max(128, _PAIRS // problem.codes))
    ranges = ranges_on_gpu(problem, sm_90_config(problem.dim))
    if problem.name in _PHOTOS:
        data = {"photos": photo_data(problem, tokens)}
    else:
        one_head = replace(problem, tokens=tokens, heads=1)
        data = {kind: _drawn(one_head, kind) for kind in ("gaussian", "near")}
    about = {"name": problem.name, "codes": problem.codes, "dim": problem.dim, "metric": problem.metric}
    about["batch"] = problem.heads * problem.tokens
    return [about | {"data": kind} | count(*pair, problem.metric, ranges) for kind, pair in data.items()]


def _drawn(problem: Problem, kind: str) -> tuple[Tensor, Tensor]:
    (x,), codebook = make_inputs(problem, torch.device("cpu"), kind=kind)
    return x, codebook


def table_cells(row: Row) -> list[str]:
    """Name, K×D, data, tokens, the shares in percent, and candidates per open token that is not crowded."""
    steps = ("by_scan", "by_two", "open", "crowded", "exhaustive")
    shares = [f"{100 * row[kind] / row['tokens']:.2f}" for kind in steps]
    few = row["open"] - row["crowded"]
    candidates = f"{row['candidates'] / few:.1f}" if few else "-"
    metric = " cosine" if row["metric"] == "cosine" else ""
    return [row["name"], f"{row['codes']}×{row['dim']}{metric}", row["data"], str(row["tokens"]), *shares, candidates]


_HEADINGS = (
    "shape", "K×D", "data", "tokens", "% scan", "% two codes", "% open", "% crowded", "% exhaustive", "candidates",
)  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The stored counts as Markdown: Gaussian data and photographs."""
    return as_markdown(Grid("", [], [*_HEADINGS], [table_cells(row) for row in rows if row["data"] != "near"]))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    known = {each: problem for problem in problems() for each in problem.name.split(", ")} | _PHOTOS
    parser = argparse.ArgumentParser(
        prog="python -m bench.static.open_tokens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", default=list(known), help=f"among {', '.join(known)}; default all")
    parser.add_argument("--tokens", type=int, help="counted per shape at most; default 2048, and fewer for many codes")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    parser.add_argument("--markdown", action="store_true", help=f"print {COUNTS.name} as Markdown and count nothing")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.shapes if name not in known]:
        parser.error(f"shapes must be among {', '.join(known)}, got {', '.join(unknown)}")
    if options.tokens is not None and options.tokens < 1:
        parser.error(f"tokens must be at least 1, got {options.tokens}")
    options.problems = list(dict.fromkeys(known[name] for name in options.shapes))
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print the table, write the file."""
    options = _arguments(argv)
    if options.markdown:
        print(markdown(json.loads(COUNTS.read_text())["rows"]))
        return
    if not interpreting():  # Triton has decided when the kernels were decorated: start again
        command = [sys.executable, "-m", "bench.static.open_tokens", *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
    rows: list[Row] = []
    for problem in track(options.problems, "counting", console=Console(stderr=True), transient=True):
        rows += rows_of(problem, options.tokens)
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        if options.out:  # after every shape, so that an interrupted run keeps its rows
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.out, {"benchmark": "open tokens", "versions": versions(), "date": date, "rows": rows})
    title = f"Tokens proved by each step, configuration of sm_90, {H100.sms} SMs"
    Console(width=120).print(as_table(Grid(title, [], [*_HEADINGS], [table_cells(row) for row in rows])))


if __name__ == "__main__":
    main()
