"""Shards that a shell command writes: `pipe:COMMAND`, run only where a flag asks for it.

Not here: which patterns may name one (`sources`), how a tar is read (`lazyclip.shards`).
"""

import contextlib
import io
import subprocess
from collections.abc import Iterator
from typing import cast

from lazyclip.shards import ShardError

PREFIX = "pipe:"


@contextlib.contextmanager
def output(command: str) -> Iterator[io.BufferedReader]:
    """Run a command in a shell and yield what it writes; it ends with the context.

    Raises:
        ShardError: it ended with an error, or what it wrote is no whole tar.
    """
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        stream = cast(io.BufferedReader, process.stdout)
        try:
            yield stream
        except ShardError as error:
            code = _code(process)
            ended = f"; its command ended with code {code}" if code else ""
            raise ShardError(f"{error}{ended}") from None
        finally:
            stream.close()
            if _code(process) is None:
                process.terminate()  # nobody wants the rest
    if process.returncode > 0:
        raise ShardError(f"{PREFIX}{command} ended with code {process.returncode}; mend it")


def _code(process: subprocess.Popen[bytes]) -> int | None:
    """Return how a command ended that has nothing more to say; None where it goes on."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(0.2)
    return None
