"""The command line; typer and rich come with the extra ``cli``."""

from __future__ import annotations

import sys


def main() -> None:
    """Console entry point; says in one line what to install where typer or rich is missing."""
    try:
        from fastvq.cli.app import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f'fastvq: the command line needs {missing}: pip install "fastvq-triton[cli]"', file=sys.stderr)
        sys.exit(2)
    run()
