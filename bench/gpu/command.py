"""Exactness and speed on a GPU in one call: `python -m bench.gpu --out DIR`.

Needs an NVIDIA GPU, PyTorch, Triton, rich and `PYTHONPATH=.:kernels`; no network, no installation.
Stages run in order of importance, each in its own process: a stage that crashes or hangs takes nothing with it.
DIR/gpu.json is replaced after every row; DIR/summary.md is written at the end and printed last.
Exit code 1: an index was wrong, a check failed, or a stage did not end. Stages cut for time do not count.

Without a GPU, `--dry-run` takes the same paths at tiny sizes, with interpreted kernels and a host clock.
`compute-sanitizer python -m bench.gpu --sanitize` runs a few tiny searches and times nothing.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

# Read when kernels are decorated: before anything imports them.
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

from bench.gpu.device import ceilings
from bench.gpu.exact import exactness, sanitize, smoke
from bench.gpu.flash import flash
from bench.gpu.problems import MODELS, published
from bench.gpu.rows import time_searches
from bench.gpu.stage import Stage
from bench.gpu.summary import failures, summary
from bench.gpu.sweep import sweep
from bench.gpu.training import training
from bench.gpu.workers import Workers
from bench.harness.child import Child
from bench.harness.machine import facts
from bench.harness.store import Row, write_json
from fastvq.testing.machine import pick_device

# Starting Python, PyTorch and a CUDA context.
_START_SECONDS = 8.0
# After its limit a stage finishes the current row.
_GRACE_SECONDS = 15.0
# Each stage with its limit in seconds.
STAGES: dict[str, tuple[Callable[[Stage], None], float]] = {
    "smoke": (smoke, 60),
    "device": (lambda stage: stage.add(*ceilings(stage.device, stage.dry)), 30),
    "exactness": (exactness, 110),
    "timing": (lambda stage: time_searches(stage, published(stage.quick)), 110),
    "training": (training, 45),
    "sweep": (sweep, 130),
    "models": (lambda stage: time_searches(stage, MODELS[: 4 if stage.quick else None]), 80),
    "flash": (flash, 90),
}
Publish = Callable[[Row], object]


def run(options: argparse.Namespace) -> Row:
    """Run the chosen stages until the budget is spent; returns the document, which is also on disk."""
    start = time.monotonic()
    document: Row = {"benchmark": "gpu", "arguments": vars(options) | {"out": str(options.out)}, "head": {}}
    document["stages"] = {}

    def keep(name: str, found: Row) -> None:
        head = found.pop("facts", {})  # every stage tells them; the document has them once
        document["head"] = document["head"] or head
        document["stages"][name] = found
        write_json(options.out / "gpu.json", document)

    for name in options.stages:
        left = options.budget_seconds - (time.monotonic() - start)
        limit = min(STAGES[name][1], left - _START_SECONDS)
        if limit > 0:
            print(f"[{name}] at most {limit:.0f} s of {left:.0f} s left", flush=True)
            _run_stage(name, limit, options, document["stages"], partial(keep, name))
        else:
            note = f"cut: the budget of {options.budget_seconds:g} s is spent"
            keep(name, {"status": "cut", "rows": [], "notes": [note]})
        found = document["stages"][name]
        print(f"[{name}] {found['status']}, {len(found['rows'])} rows, {found.get('seconds', 0):.0f} s", flush=True)
    document["seconds"] = time.monotonic() - start
    write_json(options.out / "gpu.json", document)
    return document


def _run_stage(name: str, limit: float, options: argparse.Namespace, stages: Row, publish: Publish) -> None:
    """Run one stage, which publishes its rows as they come; a stage without a good end has failed and says why."""
    publish({"status": "running", "rows": [], "notes": []})
    problem = "interrupted"
    try:
        problem = (_stage if options.in_process else _stage_in_child)(publish, name, limit, options)
    finally:
        found = stages[name]
        if problem or found["status"] == "running":
            found["status"] = "failed"
            found["notes"].append(problem or "ended without a result")
            publish(found)


def _stage_in_child(publish: Publish, name: str, limit: float, options: argparse.Namespace) -> str:
    """Run a stage in a process group of its own, killed when it takes much longer than its limit; says what failed."""
    child = Child(_serve, name, limit, options, daemon=False)
    end = time.monotonic() + _START_SECONDS + limit + _GRACE_SECONDS
    try:
        while True:
            publish(child.receive(end - time.monotonic()))
    except TimeoutError:
        return f"killed: it had not ended {_GRACE_SECONDS:g} s after its limit"
    except ChildProcessError as death:
        return str(death) if child.process.exitcode else ""
    finally:
        if child.process.pid and child.process.exitcode != 0:  # its workers, too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
        child.end()


def _serve(connection: Connection, name: str, limit: float, options: argparse.Namespace) -> None:
    os.setsid()
    _stage(connection.send, name, limit, options)


def _stage(publish: Publish, name: str, limit: float, options: argparse.Namespace) -> str:
    """Run a stage in this process."""
    if options.dry_run:  # bounds of interpreted kernels overflow as they are meant to
        warnings.simplefilter("ignore", RuntimeWarning)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to the terminal
    device, workers = pick_device(options.device), Workers(options.workers)
    stage = Stage(name, device, time.monotonic() + limit, publish, options.dry_run, options.quick, workers)
    stage.document["facts"] = facts(device)
    stage.run(STAGES[name][0])
    return ""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), help="folder for the results; default %(default)s")
    parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    parser.add_argument("--budget-seconds", type=float, default=450, help="for everything; default %(default)s")
    parser.add_argument("--workers", type=int, help="compiling processes; default: cores less 2, at most 14")
    parser.add_argument("--device", default="auto", help="auto, cuda, or cpu with --dry-run")
    parser.add_argument("--quick", action="store_true", help="few sizes and configurations")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, interpreted kernels, a host clock")
    parser.add_argument("--in-process", action="store_true", help="all stages in this process, for a debugger")
    parser.add_argument("--sanitize", action="store_true", help="a few tiny searches and no timing")
    options = parser.parse_args(argv)
    options.stages = [name.strip() for name in options.stages.split(",") if name.strip()]
    if unknown := [name for name in options.stages if name not in STAGES]:
        parser.error(f"stages must be among {', '.join(STAGES)}, got {', '.join(unknown)}")
    if options.dry_run and options.device == "auto":
        options.device = "cpu"
    if options.workers is None:
        options.workers = 0 if options.dry_run else max(2, min(14, (os.cpu_count() or 4) - 2))
    try:
        device = pick_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    if device.type == "cpu" and not (options.dry_run or options.sanitize):
        parser.error("there is no GPU: --dry-run takes the same paths on the CPU")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, print the summary, and return the exit code."""
    options = _arguments(argv)
    if options.sanitize:
        return 0 if sanitize(pick_device(options.device)) else 1
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    document = run(options)
    whole, short = summary(document)
    (options.out / "summary.md").write_text(whole)
    print(short, flush=True)
    return 1 if failures(document) else 0
