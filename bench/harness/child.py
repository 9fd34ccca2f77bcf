"""Child processes: an error, a crash or a hang in one of them ends nothing else."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any

from bench.harness.outcome import failure
from bench.harness.store import Row

_SECONDS = 600.0
_SPAWN = multiprocessing.get_context("spawn")


class Child:
    """A process that runs ``function(connection, *arguments)``, and this side of the connection.

    Args:
        function: importable from a module, as are the types of its arguments.
        arguments: of the function, after the connection.
        context: how the process starts.
        daemon: False for a child that starts children.
    """

    def __init__(
        self,
        function: Callable[..., None],
        *arguments: Any,
        context: SpawnContext | ForkServerContext = _SPAWN,
        daemon: bool = True,
    ) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=function, args=(theirs, *arguments), daemon=daemon)
        self.process.start()
        theirs.close()

    def receive(self, seconds: float) -> Any:
        """The next message.

        Raises:
            TimeoutError: none came in time.
            ChildProcessError: the process has ended.
        """
        if not self.connection.poll(max(0.0, seconds)):
            raise TimeoutError(f"not done in {seconds:g} s")
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            raise ChildProcessError(f"its process ended with exit code {self.process.exitcode}") from None

    def end(self) -> None:
        """Kill the process, if it still runs."""
        self.process.kill()
        self.process.join(5)
        self.connection.close()


def in_child(function: Callable[..., Row], arguments: Sequence[Any], preload: Sequence[str] = ()) -> Row:
    """Columns that ``function(*arguments)`` returns in a fresh process, or the columns of its failure or death.

    Args:
        function: importable from a module, as are the types of its arguments.
        arguments: of the function.
        preload: modules that the process from which all children are forked imports once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    child = Child(_serve, function, arguments, context=context)
    try:
        return child.receive(_SECONDS)
    except ChildProcessError as death:
        if child.process.exitcode == -signal.SIGKILL:
            return {"status": "out of memory", "note": "its process was killed, as the system does without memory"}
        return {"status": "failed", "note": str(death)}
    except TimeoutError as error:
        return {"status": "failed", "note": str(error)}
    finally:
        child.end()


def _serve(connection: Connection, function: Callable[..., Row], arguments: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    try:
        result = function(*arguments)
    except Exception as error:  # other libraries raise anything, and it belongs in the table
        result = failure(error)
    connection.send(result)
