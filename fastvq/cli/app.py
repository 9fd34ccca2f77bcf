"""The command line: ``fastvq demo``, ``fastvq verify`` and ``fastvq info``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# Modules that only the demo needs, and that an installation may lack.
_EXTRAS = ("sklearn", "PIL", "matplotlib")

app = typer.Typer(
    help="Exact and fast vector quantization.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Device = Annotated[str, typer.Option(help="auto, cpu or cuda. auto takes a GPU where there is one.")]


@app.command()
def demo(
    photo: Annotated[
        list[Path] | None, typer.Option(help="A photograph; may be repeated.", show_default="two bundled ones")
    ] = None,
    codes: Annotated[int, typer.Option(help="Size of the codebook.")] = 4096,
    patch: Annotated[int, typer.Option(help="Edge of a patch, in pixels. One patch is one token.")] = 4,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 80,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Of all random draws.")] = 0,
) -> None:
    """Learn a codebook on photographs, encode and decode them, and compare with the reference module.

    Writes reconstruction.png, training.png and result.json.
    """
    with _short_interrupt("interrupted, nothing written"):
        with _user_errors():
            from fastvq.cli.demo import run as work
            from fastvq.cli.demo.photos import load_photos
            from fastvq.testing.machine import pick_device

            target = pick_device(device)
            settings = work.Settings(codes=codes, patch=patch, steps=steps, seed=seed)
            _check_writable(out)
            photos = load_photos(photo or [])
            work.check(settings, photos)
        with _user_errors(OSError):  # a full disk
            work.run(settings, photos, target, out, Console())


@app.command()
def verify(
    device: Device = "auto",
    only: Annotated[str, typer.Option(help="Run only the cases whose name contains this text.")] = "",
) -> None:
    """Compare every backend with the float64 oracle over adversarial cases. Exit code 1 on any mismatch."""
    with _short_interrupt("interrupted"):
        with _user_errors():
            from fastvq.cli.verify import verify as run
            from fastvq.testing.cases import adversarial_cases
            from fastvq.testing.machine import pick_device

            target = pick_device(device)
            cases = [case for case in adversarial_cases() if only in case.name]
            if not cases:
                raise ValueError(f"only must be part of the name of a case, got {only!r}")
        # A log file has no width; without one Rich would fold the table to 80 columns.
        console = Console(width=None if sys.stdout.isatty() else 130)
        if not run(cases, target, console):
            raise typer.Exit(1)


@app.command()
def info(device: Device = "auto") -> None:
    """Show versions, the device, and the backend that would be used and why."""
    with _short_interrupt("interrupted"), _user_errors():
        from fastvq.cli.info import info_table
        from fastvq.testing.machine import pick_device

        Console().print(info_table(pick_device(device)))


def run() -> None:
    """Parse the arguments and run the command. Exit codes: 0 done, 1 mismatch found, 2 wrong use, 130 interrupted."""
    try:
        sys.exit(app(standalone_mode=False))
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Exception as error:
        # Errors of the option parser; it is not Typer's public API, and not the same package in every version.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        code, message = 2, describe()
    if message:
        typer.echo(f"fastvq: {message}", err=True)
    sys.exit(code)


@contextmanager
def _user_errors(kind: type[Exception] = ValueError) -> Iterator[None]:
    """Turn what the user can put right into one line and exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRAS:
            raise
        _fail(f'the demo needs {error.name}: pip install "fastvq-triton[demo]"', 2)
    except kind as error:
        _fail(str(error), 2)


@contextmanager
def _short_interrupt(message: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _fail(message, 130)


def _fail(message: str, code: int) -> None:
    typer.echo(f"fastvq: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from None


def _check_writable(out: Path) -> None:
    """Before the work, not after it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a directory, got the file {out}")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"out must be a directory that can be written to, got {out}")
