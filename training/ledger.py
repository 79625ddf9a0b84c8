"""Files of a run that grow line by line: the ledger, and cutting any of them back to a step.

Not here: what is written into them.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
LEDGER = "ledger-rank*.jsonl"


class Ledger:
    """What went wrong with samples, one JSON object a line; the file is made by the first line."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Write to `ledger-rankN.jsonl` in the run's folder."""
        self.file = folder / LEDGER.replace("*", str(rank))

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append lines; they are on their way to the disk when the call returns."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if text:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(text)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a file; a last one that was cut short is left out."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def cut_back(file: Path, step: int) -> int:
    """Take lines of later steps out of a file, and what is no whole line; returns how many."""
    if not file.exists():
        return 0
    raw = file.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in read_lines(file) if line.get("step", 0) <= step]
    if len(kept) < len(raw):
        part = file.with_name(file.name + ".part")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    return len(raw) - len(kept)


def cut_back_all(folder: Path, step: int) -> None:
    """Cut metrics, audit and ledgers of a run back to a step."""
    for file in (folder / "metrics.jsonl", folder / "audit.jsonl", *sorted(folder.glob(LEDGER))):
        lines = cut_back(file, step)
        if lines:
            log.info("%s: %d lines after step %d taken back", file.name, lines, step)
