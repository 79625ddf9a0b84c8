"""How every entry here reads its command line, and guards what it writes.

A mistake is one line with an example to paste. Not here: the flags themselves (each entry's, and
`models` for those of the model).
"""

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lazyclip.base.errors import UserError

RESULTS = "results.json"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s of one line, with the entry's example."""

    def __init__(
        self, example: str, description: str, foreign: Mapping[str, str] | None = None
    ) -> None:
        """Make a parser.

        Args:
            example: a whole command that works.
            description: for `--help`.
            foreign: flag -> remedy, for flags that people know from elsewhere.
        """
        words = example.split()
        super().__init__(
            prog=" ".join(words[: words.index("-m") + 2]),
            description=description,
            epilog=f"example: {example}",
            allow_abbrev=False,
        )
        self.example, self.foreign = example, foreign or {}

    def error(self, message: str) -> NoReturn:
        """Raise the mistake as a `UserError`."""
        raise UserError(f"{message}; an example: {self.example}")

    def read(self, argv: Sequence[str] | None, *required: str) -> argparse.Namespace:
        """Parse, with unknown and missing flags named.

        Args:
            argv: None: the process's own.
            required: flags without which there is nothing to do, such as `--val-data`.

        Raises:
            UserError: a flag that is unknown (nearest first), malformed or missing.
        """
        args, rest = self.parse_known_args(argv)
        for word in rest:
            self._refuse(word)
        for flag in required:
            if getattr(args, flag.removeprefix("--").replace("-", "_")) is None:
                self.error(f"{flag} is missing")
        return args

    def _refuse(self, word: str) -> NoReturn:
        flag = word.split("=")[0]
        if flag in self.foreign:
            raise UserError(f"{flag}: {self.foreign[flag]}")
        if not flag.startswith("--"):
            self.error(f"'{word}' belongs to no flag; quote patterns and lists")
        known = [name for name in self._option_string_actions if name.startswith("--")]
        close = difflib.get_close_matches(flag, known, n=3, cutoff=0.5)
        near = f"nearest: {', '.join(close)}" if close else "see --help"
        self.error(f"unknown flag {flag}, {near}")


def add_output_flags(group: Any, default: str) -> None:
    """Add `--output` and `--overwrite`; `default` says where results go without the first."""
    group.add_argument("--output", type=Path, help=f"folder for {RESULTS} (default: {default})")
    group.add_argument("--overwrite", action="store_true", help="replace results that are there")


def check_output(path: Path | None, overwrite: bool, flag: str = "--output") -> None:
    """Check that a results folder, or a file, may be written.

    Args:
        path: a folder for results.json, or a file (`--save-maps`); None is passed over.
        overwrite: results that are there may be replaced.
        flag: that named it.

    Raises:
        UserError: results are there already, or the place cannot be written to.
    """
    if path is None:
        return
    is_folder = flag == "--output"
    if is_folder and path.exists() and not path.is_dir():
        raise UserError(f"{flag} {path} is a file; give a folder")
    taken = path / RESULTS if is_folder else path
    if taken.is_dir():
        raise UserError(f"{flag} {path}: {taken} is a folder; name another place")
    if taken.exists() and not overwrite:
        raise UserError(f"{taken} exists; give another place with {flag}, or --overwrite")
    place = path if is_folder else path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{flag} {path}: {place} is no folder that can be written to")
