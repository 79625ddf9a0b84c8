"""Locks of runs that are not there, and disks without links. Not here: the cases."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from training.owner import Owner
from training.runlock import FILE


def put(folder: Path, silent: float = 0.0, **changes: object) -> Path:
    """Write the lock of a run on another machine that was silent for so many seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"host": "node7", "pid": 1, "started": "1", "machine": "another", "job": "",
             "since": "2026-01-01T00:00:00Z"}  # fmt: skip
    owner = dataclasses.replace(Owner.here(), **{**plain, **changes})
    file = folder / FILE
    file.write_text(json.dumps(dataclasses.asdict(owner)))
    then = time.time() - silent
    os.utime(file, (then, then))
    return file


def owner(folder: Path) -> dict:
    return json.loads((folder / FILE).read_text())


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", none)
