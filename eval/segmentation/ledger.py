"""Pixel counts of each picture on disk: what an interrupted evaluation continues from.

One file a rank, `counts/rank-0000.jsonl`: first a line that says what is scored, then a line a
picture with the non-zero cells of its confusion counts. Not here: who scores what (`job`).
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from lazyclip.base.errors import UserError

from .confusion import Counts

FOLDER = "counts"
Cells = tuple[tuple[int, int], ...]  # (truth * C + prediction, pixels), pixels > 0


def to_cells(confusion: Counts) -> Cells:
    """List the cells of counts C x C that are not zero."""
    flat = confusion.ravel()
    return tuple((int(i), int(flat[i])) for i in np.flatnonzero(flat))


def to_counts(cells: Cells, classes: int) -> Counts:
    """Make counts C x C int64 from cells."""
    flat = np.zeros(classes * classes, dtype=np.int64)
    for index, pixels in cells:
        flat[index] += pixels
    return flat.reshape(classes, classes)


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON gives them back, so that they compare with those of a file."""
    loaded: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return loaded


def ledger_files(output: Path) -> list[Path]:
    """List the files of counts that an output folder holds."""
    return sorted((output / FOLDER).glob("rank-*.jsonl"))


def _differences(held: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    keys = sorted(key for key in {*held, *task} if held.get(key) != task.get(key))
    return ", ".join(f"{key} {held.get(key)!r} there, {task.get(key)!r} now" for key in keys)


def read_ledgers(output: Path, task: Mapping[str, Any]) -> dict[str, Cells]:
    """Read the pictures that are done, whatever number of ranks did them.

    A last line that was cut off is passed over: its picture is scored again.

    Args:
        output: folder of the results.
        task: what is scored now (data set, protocol hash, model, method, ...), plain values.

    Raises:
        UserError: counts of another task, with what differs.
    """
    done: dict[str, Cells] = {}
    for file in ledger_files(output):
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines[:-1]]  # whole lines end with a newline
            cells = {
                str(row["id"]): tuple((int(i), int(n)) for i, n in row["cells"]) for row in rows[1:]
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} cannot be read as counts ({error!r}); remove it, or start anew with "
                "--overwrite"
            ) from None
        if rows and rows[0] != task:
            raise UserError(
                f"{file} holds counts of another evaluation ({_differences(rows[0], task)}); give "
                "another --output, or --overwrite to start anew"
            )
        done.update(cells)
    return done


@dataclasses.dataclass
class Ledger:
    """The file of one rank, open for appending; a line is on disk when `add` returns."""

    file: Path
    stream: IO[str]

    @classmethod
    def open(cls, output: Path, rank: int, task: Mapping[str, Any]) -> "Ledger":
        """Open the file of a rank, and cut off a last line that is not whole."""
        file = output / FOLDER / f"rank-{rank:04d}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            raw = file.read_bytes()
            os.truncate(file, raw.rfind(b"\n") + 1)
        stream = file.open("a", encoding="utf-8")
        if stream.tell() == 0:
            stream.write(json.dumps(dict(task)) + "\n")
            stream.flush()
        return cls(file, stream)

    def add(self, name: str, cells: Cells) -> None:
        """Write the counts of one picture."""
        self.stream.write(json.dumps({"id": name, "cells": cells}) + "\n")
        self.stream.flush()

    def __enter__(self) -> "Ledger":
        """Return the ledger itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.stream.close()
