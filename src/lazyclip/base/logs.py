"""Loggers for entry points, the metrics file, and the progress line.

Not here: what is measured. Only entry points call `setup`; modules do
`log = logging.getLogger(__name__)`.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

FORMAT = "%(asctime)s | %(levelname)s | %(message)s"


def _no_chatter(record: logging.LogRecord) -> bool:
    # open_clip tells each step of building a model on the root logger.
    return record.name != "root" or record.levelno >= logging.WARNING


def setup(rank: int = 0, file: Path | None = None) -> None:
    """Send log lines to stderr (rank 0: INFO, others: WARNING) and, if given, to a file."""
    root = logging.getLogger()
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    prefix = "" if rank == 0 else f"[rank {rank}] "
    for handler in handlers:
        handler.addFilter(_no_chatter)
        handler.setFormatter(logging.Formatter(prefix + FORMAT, "%Y-%m-%d,%H:%M:%S"))
        root.addHandler(handler)
    for noisy in ("httpx", "urllib3", "PIL", "matplotlib", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)


def finite(value: object) -> object:
    """Return the value for JSON: a float that is not finite becomes None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsWriter:
    """Append one JSON object a line; a line is on disk when the call returns."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending."""
        self._stream = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, object]) -> None:
        """Write one line; floats that are not finite become null."""
        clean = {key: finite(value) for key, value in values.items()}
        self._stream.write(json.dumps(clean, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class Progress:
    """A bar on a terminal, else one log line at most every `every` seconds."""

    def __init__(self, total: int, what: str, every: float = 30.0) -> None:
        """Start; `what` is the plural of the things counted, such as `images`."""
        self.total, self.what, self.every = total, what, every
        self.done = 0
        self.start = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def update(self, count: int = 1, note: str = "") -> None:
        """Count `count` more and show the state when it is time."""
        self.done += count
        now = time.monotonic()
        if now - self._last < (0.1 if self._terminal else self.every) and self.done < self.total:
            return
        self._last = now
        rate = self.done / max(now - self.start, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"
        text = f"{self.done}/{self.total} {self.what}, {speed}, {left:.0f} s left {note}".rstrip()
        if self._terminal:
            width = 24
            full = width * self.done // max(self.total, 1)
            end = "\n" if self.done >= self.total else ""
            sys.stderr.write(f"\r[{'#' * full}{'.' * (width - full)}] {text}\x1b[K{end}")
            sys.stderr.flush()
        else:
            logging.getLogger(__name__).info("%s", text)
