"""Exactness and speed on a GPU in one call: `python -m bench.gpu --out DIR`.

Needs an NVIDIA GPU, PyTorch, Triton and rich, no network and no installation beyond `PYTHONPATH=.:kernels`. Stages run
in the order of their importance, each in a process of its own, so that one that crashes or hangs takes nothing with it.
The first use of each kernel compiles it, on all cores.
Results are in DIR/gpu.json, which is replaced after every stage, and in DIR/summary.md, which is printed last.
Exit code 1: an index was wrong, a check failed, or a stage did not end; stages cut for time do not count.

Without a GPU, `--dry-run` takes the same paths at tiny sizes with interpreted kernels and a host clock. For
`compute-sanitizer python -m bench.gpu --sanitize` there are a few tiny searches without any timing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

# Read when kernels are decorated: before anything imports them.
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

from bench.gpu.exact import exactness, sanitize, smoke
from bench.gpu.flash import flash
from bench.gpu.rows import device_stage, models, timing
from bench.gpu.stage import Stage, run_stage
from bench.gpu.summary import failures, summary
from bench.gpu.sweep import sweep
from bench.gpu.training import training
from bench.harness.machine import facts
from bench.harness.store import write_json
from fastvq.testing.machine import pick_device

# Starting Python, PyTorch and a CUDA context.
_START_SECONDS = 8.0
# After its limit a stage finishes the row it is at.
_GRACE_SECONDS = 15.0


class Entry(NamedTuple):
    """A stage and the most seconds it may take."""

    function: Callable[[Stage], None]
    seconds: float


STAGES = {
    "smoke": Entry(smoke, 60),
    "device": Entry(device_stage, 30),
    "exactness": Entry(exactness, 110),
    "timing": Entry(timing, 110),
    "training": Entry(training, 45),
    "sweep": Entry(sweep, 130),
    "models": Entry(models, 80),
    "flash": Entry(flash, 90),
}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen stages, each in its process, until the budget is spent; the document, which is also on disk."""
    start = time.monotonic()
    path = options.out / "gpu.json"
    document: dict[str, Any] = {"benchmark": "gpu", "arguments": vars(options) | {"out": str(options.out)}, "head": {}}
    document["stages"] = {}
    for name in options.stages:
        left = options.budget_seconds - (time.monotonic() - start)
        limit = min(STAGES[name].seconds, left - _START_SECONDS)
        if limit <= 0:
            note = f"cut: the budget of {options.budget_seconds:g} s is spent"
            document["stages"][name] = {"status": "cut", "rows": [], "notes": [note]}
        else:
            print(f"[{name}] at most {limit:.0f} s of {left:.0f} s left", flush=True)
            _part(name, options).unlink(missing_ok=True)
            try:
                document["stages"][name] = (_run_here if options.in_process else _run_child)(name, limit, options)
            except BaseException:
                document["stages"][name] = _collect(name, options, "interrupted")
                _keep_head(document)
                write_json(path, document)
                raise
        _keep_head(document)
        found = document["stages"][name]
        print(f"[{name}] {found['status']}, {len(found['rows'])} rows, {found.get('seconds', 0):.0f} s", flush=True)
        write_json(path, document)
    document["seconds"] = time.monotonic() - start
    write_json(path, document)
    return document


def _run_child(name: str, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    """One stage in a process group of its own, which is killed when it takes much longer than its limit."""
    command = [sys.executable, "-m", "bench.gpu", "--child", name, "--seconds", f"{limit:.1f}"]
    command += ["--out", str(options.out), "--device", options.device, "--workers", str(options.workers)]
    command += [flag for flag, wanted in (("--dry-run", options.dry_run), ("--quick", options.quick)) if wanted]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit + _START_SECONDS + _GRACE_SECONDS)
        problem = f"its process ended with exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        problem = f"killed: it had not ended {_GRACE_SECONDS:g} s after its limit"
    finally:
        if process.returncode != 0:  # its workers, too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return _collect(name, options, problem)


def _run_here(name: str, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    """One stage in this process."""
    run_child(argparse.Namespace(**{**vars(options), "child": name, "seconds": limit}))
    return _collect(name, options, "")


def _part(name: str, options: argparse.Namespace) -> Path:
    return Path(options.out) / f"gpu-{name}.part.json"


def _collect(name: str, options: argparse.Namespace, problem: str) -> dict[str, Any]:
    """The rows that a stage has left, and what went wrong with its process."""
    part = _part(name, options)
    found: dict[str, Any] = {"status": "failed", "rows": [], "notes": []}
    if part.exists():
        found = json.loads(part.read_text())
        part.unlink()
    if problem or found["status"] == "running":
        found["status"] = "failed"
        found["notes"].append(problem or "ended without a result")
    return found


def _keep_head(document: dict[str, Any]) -> None:
    """Facts about the machine come with every stage; they stand once."""
    for stage in document["stages"].values():
        head = stage.pop("facts", {})
        document["head"] = document["head"] or head


def run_child(options: argparse.Namespace) -> None:
    """One stage in this process."""
    # Bounds of interpreted kernels overflow as they are meant to; and the profiler writes to the terminal.
    if options.dry_run:
        warnings.simplefilter("ignore", RuntimeWarning)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    device = pick_device(options.device)
    deadline = time.monotonic() + options.seconds
    path = _part(options.child, options)
    stage = Stage(options.child, device, deadline, path, options.dry_run, options.quick, options.workers)
    stage.document["facts"] = facts(device)
    run_stage(stage, STAGES[options.child].function)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), help="folder for the results; default %(default)s")
    parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    parser.add_argument("--budget-seconds", type=float, default=450, help="for everything; default %(default)s")
    parser.add_argument(
        "--workers", type=int, help="processes that compile side by side; default: cores less 2, at most 14"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, or cpu with --dry-run")
    parser.add_argument("--quick", action="store_true", help="few sizes and configurations")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, interpreted kernels, a host clock")
    parser.add_argument("--in-process", action="store_true", help="all stages in this process, for a debugger")
    parser.add_argument("--sanitize", action="store_true", help="a few tiny searches and no timing")
    parser.add_argument("--child", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.stages = [name.strip() for name in options.stages.split(",") if name.strip()]
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
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


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, print the summary, and return the exit code."""
    options = _arguments(argv)
    if options.sanitize:
        return 0 if sanitize(pick_device(options.device)) else 1
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        run_child(options)
        return 0
    signal.signal(signal.SIGTERM, _end)
    document = run(options)
    whole, short = summary(document)
    (options.out / "summary.md").write_text(whole)
    print(short, flush=True)
    return 1 if failures(document) else 0
