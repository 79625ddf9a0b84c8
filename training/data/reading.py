"""The one place where training data come from: bytes of a shard, with patience.

Not here: what the bytes mean (`tar`), which of them are wanted (`order`, `exact`).
"""

import dataclasses
import functools
import logging
import os
import time
from pathlib import Path

from .tar import ReadRange

log = logging.getLogger(__name__)


class ReadFailed(RuntimeError):
    """A shard that cannot be read, or no longer holds what it did: the run cannot go on."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How often a failed read is tried again: seconds to wait before each further try."""

    waits: tuple[float, ...] = (0.1, 1.0, 4.0, 10.0)


def read_range(shard: Path, offset: int, length: int, into: bytearray | None = None) -> memoryview:
    """Read bytes of a shard; fewer only where it ends.

    Args:
        shard: a file.
        offset: where to begin.
        length: bytes to read.
        into: memory to use, `length` bytes at least, in place of new.

    Returns:
        The bytes; of `into` the part that was filled.

    Raises:
        OSError: it cannot be read.
    """
    handle = os.open(shard, os.O_RDONLY)
    try:
        if into is None:
            into = bytearray(length)
        view = memoryview(into)[:length]
        got = 0
        while got < length:  # the kernel gives at most 2 GiB at once
            more = os.preadv(handle, [view[got:]], offset + got)
            if not more:
                break
            got += more
        return view[:got]
    finally:
        os.close(handle)


def read_surely(
    shard: Path, offset: int, length: int, patience: Patience, into: bytearray | None = None
) -> memoryview:
    """Read exactly `length` bytes, trying again after errors and short reads.

    Raises:
        ReadFailed: the last try failed too; names the shard.
    """
    for wait in (*patience.waits, None):
        try:
            content = read_range(shard, offset, length, into)
            if len(content) == length:
                return content
            reason = f"it ends at byte {offset + len(content)}"
        except OSError as error:
            reason = str(error.strerror or error)
        if wait is not None:
            log.warning("shard %s: %s; reading again in %s s", shard, reason, wait)
            time.sleep(wait)
    tries = len(patience.waits) + 1
    raise ReadFailed(
        f"shard {shard}: {length} bytes from {offset} cannot be read ({reason}), {tries} tries; "
        "restore the file, then resume"
    )


def range_of(shard: Path) -> ReadRange:
    """Return a reader of one shard's ranges, without patience."""
    return functools.partial(read_range, shard)
