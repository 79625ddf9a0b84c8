"""Which samples a run trained on: the file it writes, and `training.audit RUN_A RUN_B`.

A line is one step: number of samples and the SHA-256 of the sorted `shard:ordinal` lines of its
global batch. Not here: the order of samples.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lazyclip.base.errors import UserError, cli

from .data.exact import digest
from .distributed import Place, gather_plain
from .feed import labels
from .ledger import read_lines

log = logging.getLogger(__name__)
FILE = "audit.jsonl"


class Audit:
    """Writes a line for each step; every rank calls, rank 0 writes."""

    def __init__(self, folder: Path, place: Place, names: Sequence[str], ids: bool) -> None:
        """Append to the run's audit.jsonl; `ids` writes the samples themselves too."""
        self._place, self._names, self._ids = place, names, ids
        self._stream = (folder / FILE).open("a", encoding="utf-8") if place.first else None

    def write(self, step: int, ids: Tensor) -> None:
        """Write the line of a step.

        Args:
            step: its number, from 1.
            ids: this rank's B x 2, shard's number and ordinal.
        """
        everybodys = gather_plain(ids.to(self._place.device)).cpu()
        if self._stream is None:
            return
        named = labels(everybodys, self._names)
        line: dict[str, Any] = {"step": step, "n": len(named), "digest": digest_of(named)}
        if self._ids:
            line["ids"] = sorted(named)
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()


def digest_of(named: Sequence[str]) -> str:
    """Return the digest of samples given as `shard:ordinal`."""
    pairs = (name.rsplit(":", 1) for name in named)
    return digest((shard, int(ordinal)) for shard, ordinal in pairs)


def read_audit(run: Path) -> dict[int, dict[str, Any]]:
    """Read a run's audit by step.

    Args:
        run: LOGS/NAME, or the file itself.

    Raises:
        UserError: no such run or file, a step that stands twice, or ids that do not fit their
            digest.
    """
    if not run.exists():
        raise UserError(f"there is no run {run}; give LOGS/NAME of a run trained with --audit")
    file = run if run.is_file() else run / FILE
    if not file.is_file():
        raise UserError(f"{file} does not exist; train with --audit")
    found: dict[int, dict[str, Any]] = {}
    for line in read_lines(file):
        step = int(line["step"])
        if step in found:
            raise UserError(f"{file}: step {step} stands twice; it was put together by hand")
        if "ids" in line and digest_of(line["ids"]) != line["digest"]:
            raise UserError(f"{file}: step {step}: its ids do not fit its digest")
        found[step] = line
    if not found:
        raise UserError(f"{file} holds no step")
    return found


def _span(steps: Sequence[int]) -> str:
    return f"{len(steps)} steps, {min(steps)} to {max(steps)}"


def compare(one: Path, two: Path) -> tuple[list[str], bool]:
    """Compare two runs step by step.

    Returns:
        Lines to print, and whether every step that both have is the same and there is one.
    """
    a, b = read_audit(one), read_audit(two)
    both = sorted(set(a) & set(b))
    lines = [f"A: {_span(list(a))} ({one})", f"B: {_span(list(b))} ({two})"]
    differ = [step for step in both if (a[step]["n"], a[step]["digest"]) !=
              (b[step]["n"], b[step]["digest"])]  # fmt: skip
    if not both:
        return [*lines, "no step in common"], False
    if not differ:
        total = sum(int(a[step]["n"]) for step in both)
        return [*lines, f"the same {total} samples in all {len(both)} steps in common"], True
    first = differ[0]
    lines.append(f"{len(differ)} of {len(both)} steps differ, first step {first}")
    if "ids" in a[first] and "ids" in b[first]:
        only = sorted(set(a[first]["ids"]) - set(b[first]["ids"]))
        other = sorted(set(b[first]["ids"]) - set(a[first]["ids"]))
        lines.append(f"step {first}: only in A {only[:5]}, only in B {other[:5]}")
    return lines, False


def run(argv: Sequence[str] | None = None) -> None:
    """Compare the samples of two runs."""
    parser = argparse.ArgumentParser(
        prog="training.audit",
        description="Compare the sample digests of two runs, step by step; 1 where they differ.",
    )
    parser.add_argument("run_a", type=Path, help="LOGS/NAME of a run trained with --audit")
    parser.add_argument("run_b", type=Path, help="the other one")
    args = parser.parse_args(argv)
    lines, same = compare(args.run_a, args.run_b)
    sys.stdout.write("\n".join(lines) + "\n")
    if not same:
        raise SystemExit(1)


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
