"""Flags of segmentation: how a score is made (protocol), by which method, in which batches.

Shared by the entries that segment. Not here: which pictures, and what is done with the masks.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from lazyclip.base.errors import UserError
from lazyclip.dense import METHODS

from .textcache import cache_folder


class Row(NamedTuple):
    """A value of the protocol that a flag overrides: field, how its text is read, help."""

    field: str
    read: Callable[[str], Any]
    help: str

    @property
    def flag(self) -> str:
        """The flag of the field."""
        return "--" + self.field.replace("_", "-")


PROTOCOL_ROWS = (
    Row("short", int, "short side in pixels"),
    Row("cap", int, "largest long side in pixels"),
    Row("window", int, "window side in pixels, 0 for the whole picture"),
    Row("stride", int, "window step in pixels"),
    Row("remainder", str, "window pixels beyond whole patches: drop, pad"),
    Row("positions", str, "position interpolation: offset, antialias"),
    Row("logit_scale", float, "factor on cosines before the softmax"),
    Row("threshold", float, "best probability below which a pixel is background"),
    Row("area", float, "share of the foreground up to which a class is removed"),
    Row("pamr", str, "refinement by the picture: off, naclip, original"),
    Row("templates", str, "prompts: openai, simple, plain, or a file with one {} a line"),
)


def add_protocol_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--protocol` and a flag for each value of it."""
    group = parser.add_argument_group("protocol (a value given here changes the hash)")
    group.add_argument("--protocol", help="sclip, naclip or clearclip (default: the first, sclip)")
    for row in PROTOCOL_ROWS:
        group.add_argument(row.flag, type=row.read, help=row.help)


def protocol_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Return the protocol values that flags give, by field."""
    given = {row.field: getattr(args, row.field) for row in PROTOCOL_ROWS}
    return {field: value for field, value in given.items() if value is not None}


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that do not change the task: method, batches, workers, text cache."""
    group = parser.add_argument_group("how it is run")
    group.add_argument(
        "--method", default="vanilla", help=f"dense features: {', '.join(METHODS)} (vanilla)"
    )
    group.add_argument("--batch-size", type=int, default=32, help="windows in one pass (32)")
    group.add_argument(
        "--workers", type=int, help="processes that read pictures (default: 0 on the CPU, up to 8)"
    )
    group.add_argument(
        "--no-text-cache",
        action="store_true",
        help=f"encode the prompts anew ({cache_folder()} holds them, $LAZYCLIP_CACHE moves it)",
    )


def check_numbers(args: argparse.Namespace, **lowest: int) -> None:
    """Check that numbers given by flags reach their lowest value.

    Raises:
        UserError: one that does not.
    """
    for name, low in {"batch_size": 1, "workers": 0, **lowest}.items():
        value = getattr(args, name)
        if value is not None and value < low:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} is too small; use {low} or more")


def resolve_workers(args: argparse.Namespace, world: int) -> int:
    """Return the number of reading processes of a rank.

    On a CPU the tower takes all cores, and reading is a small share: none.
    """
    if args.workers is not None:
        return int(args.workers)
    if not str(args.device).startswith("cuda"):
        return 0
    return max(1, min(8, (os.cpu_count() or 1) // max(world, 1)))
