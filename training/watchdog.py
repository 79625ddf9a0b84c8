"""A thread that ends a rank which makes no progress, after telling where it stands.

Not here: what counts as progress (the loop calls `tick`).
"""

import contextlib
import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from .runlock import Hold
from .state import write_status

log = logging.getLogger(__name__)
USUAL_STEPS = 10
# A save may take so long, or so many times the usual.
SAVE_MINUTES, USUAL_SAVES = 60.0, 10
# What is to be said at the end is written to a disk that may be what hangs.
LAST_WORDS_SECONDS = 60.0
_REMEMBERED = 101


class Watchdog:
    """Ends the process when no tick came for too long.

    Saving takes as long as the disk takes and is not hurried by this: meanwhile it has the patience
    of an hour.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        minutes: float,
        check_seconds: float = 1.0,
        hold: Hold | None = None,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            folder: of the run, which takes the stacks and the status.
            rank: of this process.
            minutes: least patience; 0 never ends anything.
            check_seconds: between looks.
            hold: of the run's folder; where another start has it nothing is written.
        """
        self._hold = hold
        self._folder, self._rank = folder, rank
        self._least, self._check = 60 * minutes, check_seconds
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._saves: deque[float] = deque(maxlen=_REMEMBERED)
        self._last, self._step = time.monotonic(), 0
        self._over = threading.Event()
        self._paused = False
        self._leaving: int | None = None
        self._thread: threading.Thread | None = None

    def limit(self) -> float:
        """Return the seconds that may pass without a tick."""
        if self._paused:
            usual = statistics.median(self._saves) if self._saves else 0.0
            return max(USUAL_SAVES * usual, 60 * SAVE_MINUTES, self._least)
        usual = statistics.median(self._durations) if self._durations else 0.0
        return max(USUAL_STEPS * usual, self._least)

    def start(self) -> None:
        """Begin to watch, from now on."""
        self._last = time.monotonic()
        if self._least and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def tick(self, step: int | None = None) -> None:
        """Note progress; with a step's number, that this step is done."""
        now = time.monotonic()
        if step is not None:
            self._durations.append(now - self._last)
            self._step = step
        self._last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Be patient meanwhile: what is done takes as long as the disk takes, within an hour."""
        self._last = began = time.monotonic()
        self._paused = True
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._saves.append(self._last - began)
            self._paused = False

    def leave(self, code: int) -> None:
        """Watch the way out too: a process group, or what it waits for, may not let go.

        How the run ended is written already and stays; a hang now ends with the exit code `code`.
        """
        self._leaving = code
        self.tick()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._check):
            waited = time.monotonic() - self._last
            if waited > self.limit():
                self._end(waited)

    def _end(self, waited: float) -> None:
        last = threading.Thread(target=self._tell, args=(waited,), daemon=True)
        last.start()
        last.join(LAST_WORDS_SECONDS)
        # Nothing else would end a process that hangs inside a collective.
        os._exit(1 if self._leaving is None else self._leaving)

    def _tell(self, waited: float) -> None:
        stacks = self._folder / f"stacks-rank{self._rank}.txt"
        with contextlib.suppress(OSError):
            log.error(
                "rank %d: no progress for %.0f s after step %d; stacks are in %s",
                self._rank, waited, self._step, stacks.name,
            )  # fmt: skip
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            if self._hold is not None and not self._hold.stands():
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            with stacks.open("w", encoding="utf-8") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
            if self._leaving is None:
                write_status(self._folder, "failed", self._step, "hang", True, self._hold)
