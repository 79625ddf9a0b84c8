"""What a benchmark found, with what it was found by: command, versions, settings, load.

Not here: measuring.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from timing import machine

from lazyclip.base.config import write_json
from lazyclip.base.record import make_record, shorten


class Ratio(NamedTuple):
    """A ratio of two that alternated: median, least and most over the rounds."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        """Show it as `3.62 x (3.30-3.81)`."""
        return f"{self.median:.2f} x ({self.least:.2f}-{self.most:.2f})"


def ratio_of(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Divide two rows of figures round by round."""
    rounds = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(statistics.median(rounds), min(rounds), max(rounds))


def output_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that `keep` reads."""
    parser.add_argument("--output", type=Path, help="file for the figures, json")


def keep(args: argparse.Namespace, began: float, found: dict[str, Any]) -> None:
    """Write what was found and how, where `--output` names a file.

    Args:
        args: the flags.
        began: load average when the script began.
        found: figures.
    """
    if args.output is None:
        return
    name = Path(sys.argv[0]).name
    words = [str(shorten(word)) for word in sys.argv[1:]]
    record = make_record(name, None, {k: v for k, v in vars(args).items() if k != "output"})
    # Not `python -m`: these are scripts.
    record["command"] = " ".join(["python", f"benchmarks/{name}", *words])
    load = {"start": round(began, 2), "end": round(os.getloadavg()[0], 2)}
    write_json(args.output, {"record": record, "machine": machine(), "load": load, **found})
