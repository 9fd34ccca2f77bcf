"""The commands ``fastvq demo``, ``fastvq verify`` and ``fastvq info``: options, errors and exit codes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastvq.cli.info import info_table
from fastvq.cli.verify import print_verdicts
from fastvq.testing.cases import adversarial_cases
from fastvq.testing.machine import pick_device

# Only the demo imports these, and the extra ``demo`` installs them.
_DEMO_MODULES = ("sklearn", "PIL", "matplotlib")

app = typer.Typer(
    help="Exact and fast vector quantization.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]


@app.command()
def demo(
    photo: Annotated[
        list[Path] | None, typer.Option(help="Photograph to use; may be repeated.", show_default="two bundled ones")
    ] = None,
    codes: Annotated[int, typer.Option(help="Number of codes.")] = 4096,
    patch: Annotated[int, typer.Option(help="Edge of a patch in pixels; one patch is one token.")] = 4,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 80,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = 0,
) -> None:
    """Learn a codebook on photographs, encode and decode them, and compare with the reference module.

    Writes reconstruction.png, training.png and result.json.
    """
    interrupted = "interrupted, nothing written"
    with _one_line_errors(ValueError, interrupted=interrupted):
        from fastvq.cli.demo import run as work
        from fastvq.cli.demo.photos import load_photos

        target = pick_device(device)
        settings = work.Settings(codes=codes, patch=patch, steps=steps, seed=seed)
        _check_writable(out)
        photos = load_photos(photo or [])
        work.check(settings, photos)
    with _one_line_errors(OSError, interrupted=interrupted):  # a full disk
        work.run(settings, photos, target, out, Console())


@app.command()
def verify(
    device: Device = "auto",
    only: Annotated[str, typer.Option(help="Run only the cases whose name contains this text.")] = "",
) -> None:
    """Compare every backend with the float64 oracle over adversarial cases; exit with code 1 on any mismatch."""
    with _one_line_errors(ValueError):
        target = pick_device(device)
        cases = [case for case in adversarial_cases() if only in case.name]
        if not cases:
            raise ValueError(f"only must be part of the name of a case, got {only!r}")
    # Rich folds tables to 80 columns when the output is not a terminal.
    console = Console(width=None if sys.stdout.isatty() else 130)
    with _one_line_errors():
        if not print_verdicts(cases, target, console):
            raise typer.Exit(1)


@app.command()
def info(device: Device = "auto") -> None:
    """Show versions, the device, and which backend runs and why."""
    with _one_line_errors(ValueError):
        Console().print(info_table(pick_device(device)))


def run() -> None:
    """Parse the arguments and run the command.

    Exit codes: 0 success, 1 mismatch, 2 wrong usage, 130 interrupted.
    """
    try:
        sys.exit(app(standalone_mode=False))
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Exception as error:
        # The option parser's errors have this method. Their class is private and moves between versions of Typer.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        code, message = 2, describe()
    if message:
        typer.echo(f"fastvq: {message}", err=True)
    sys.exit(code)


@contextmanager
def _one_line_errors(*kinds: type[Exception], interrupted: str = "interrupted") -> Iterator[None]:
    """Exit with one line: code 2 for ``kinds`` and for a missing module of the demo, code 130 for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        _fail(interrupted, 130)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _DEMO_MODULES:
            raise
        _fail(f'the demo needs {error.name}: pip install "fastvq-triton[demo]"', 2)
    except kinds as error:
        _fail(str(error), 2)


def _fail(message: str, code: int) -> None:
    typer.echo(f"fastvq: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from None


def _check_writable(out: Path) -> None:
    """Raise ValueError before the work starts rather than after it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a directory, got the file {out}")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"out must be a directory that can be written to, got {out}")
