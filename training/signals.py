"""Signals that ask a run to save and end, and the end of ranks whose launcher is gone.

A handler sets a flag and nothing else; the loop looks at it between steps. The second signal ends
the process at once. Not here: what the ranks make of it (`loop`).
"""

import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher and a cluster may both pass on the same request: what comes so soon is an echo.
ECHO_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


class Preempted(Exception):
    """The run was asked to end and has saved, or told why it could not."""


class Asked:
    """Whether somebody asked the run to end."""

    def __init__(self) -> None:
        """Start with nobody."""
        self.by: str | None = None
        self._since = 0.0

    def __bool__(self) -> bool:
        """Tell whether somebody asked."""
        return self.by is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take a signal."""
        del frame
        now = time.monotonic()
        if self.by is None:
            self.by, self._since = signal.Signals(number).name, now
        elif now - self._since > ECHO_SECONDS:
            os._exit(1)


@contextlib.contextmanager
def listening() -> Iterator[Asked]:
    """Listen for signals while the context is open; the handlers before are put back."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: dict[signal.Signals, Any] = {}
    try:
        for number in ASKING:
            before[number] = signal.signal(number, asked.handle)
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_parent(number: signal.Signals) -> None:
    """Let this process get a signal when its parent ends (Linux; elsewhere nothing happens)."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    except (OSError, AttributeError, TypeError):
        log.warning("this system cannot tie a process to its parent; look for orphans by hand")


def end_with_launcher() -> None:
    """Under torchrun, ask this rank to save and end when torchrun itself is gone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(signal.SIGTERM)
