"""One call in a fresh process, forked from one that has imported PyTorch and done nothing else."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from bench.harness.outcome import failure
from bench.harness.store import Row

_SECONDS = 600.0


def in_child(function: Callable[..., Row], arguments: Sequence[Any], preload: Sequence[str] = ()) -> Row:
    """Columns that ``function(*arguments)`` returns, or those of its failure; that the process died is one.

    Args:
        function: importable from a module, as are the types of its arguments.
        arguments: of the function.
        preload: modules that the parent of all children imports once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(_SECONDS):
            return {"status": "failed", "note": f"not done in {_SECONDS:g} s"}
        return ours.recv()
    except EOFError:
        process.join()
        return _death(process.exitcode)
    finally:
        process.kill()
        process.join()
        ours.close()


def _death(code: int | None) -> Row:
    if code == -signal.SIGKILL:
        return {"status": "out of memory", "note": "its process was killed, as the system does when memory is short"}
    return {"status": "failed", "note": f"its process ended with exit code {code}"}


def _serve(connection: Connection, function: Callable[..., Row], arguments: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    try:
        result = function(*arguments)
    except Exception as error:  # whatever another library raises belongs into the table
        result = failure(error)
    connection.send(result)
