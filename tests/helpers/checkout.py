"""Fresh processes that see the bare checkout."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**more):
    """The environment with the checkout on Python's path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), **more}


def run(*arguments, **options):
    """Run Python with these arguments and give what it printed and its exit code."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **{"env": environment(), **options})
