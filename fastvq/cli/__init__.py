"""The command line. It needs typer and rich, which the extra ``cli`` installs."""

import sys


def main() -> None:
    """Run the command line; exit with code 2 and one line if typer or rich is missing."""
    try:
        from fastvq.cli.app import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f'fastvq: the command line needs {missing}: pip install "fastvq-triton[cli]"', file=sys.stderr)
        sys.exit(2)
    run()
