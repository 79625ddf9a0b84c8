"""Build and check the index of shards that training reads by: `python -m training.index SHARDS`.

Prints what the shards hold and what is odd about them, each with its remedy. Not here: how shards
are walked (`data.survey`), what the index is (`data.manifest`).
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lazyclip.base.errors import UserError, cli
from lazyclip.base.logs import setup

from .data.manifest import report
from .data.prepare import Prepared, Wanted, prepare
from .data.survey import How

EXAMPLE = 'python -m training.index "laion/{00000..41455}.tar"'


def make_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(
        prog="training.index",
        description="Build the index of shards and say what they hold.",
        epilog=f"Example: {EXAMPLE}",
    )
    parser.add_argument(
        "shards", nargs="+",
        help="shards: paths, braces, globs, folders, list files; also joined by ::",
    )  # fmt: skip
    parser.add_argument("--manifest", type=Path, help="file to write (default: beside the shards)")
    parser.add_argument(
        "--filter", action="append", default=[], help="such as similarity>=0.3; may come again"
    )
    parser.add_argument("--train-data-upsampling-factors", help="such as 2::1, one for each source")
    parser.add_argument(
        "--processes", type=int, default=min(16, os.cpu_count() or 1),
        help="that walk shards (default: one for each CPU, at most 16)",
    )  # fmt: skip
    parser.add_argument("--chunk", type=int, default=How().chunk, help="samples read at once")
    parser.add_argument(
        "--strict", action="store_true", help="refuse truncated, damaged, empty, missing shards"
    )
    parser.add_argument("--rebuild", action="store_true", help="walk all shards again")
    return parser


def index(args: argparse.Namespace) -> Prepared:
    """Build or check the index that the flags ask for; raises `UserError`."""
    for flag in ("processes", "chunk"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)} is too small; use 1 or more")
    how = How(chunk=args.chunk, processes=args.processes)
    return prepare(
        Wanted(
            "::".join(args.shards), Path("."), args.train_data_upsampling_factors,
            tuple(args.filter), args.manifest, how, args.strict, args.rebuild,
        )
    )  # fmt: skip


def run(argv: Sequence[str] | None = None) -> None:
    """Build and check the index of shards."""
    args = make_parser().parse_args(argv)
    setup()
    began = time.perf_counter()
    prepared = index(args)
    seconds = time.perf_counter() - began
    size, factors = prepared.file.stat().st_size, args.train_data_upsampling_factors
    lines = [
        *report(prepared.manifest),
        f"{prepared.file}: {size:,} bytes, {seconds:.1f} s",
        f"train with: --train-data '{'::'.join(args.shards)}'"
        + (f" --manifest '{args.manifest}'" if args.manifest else "")
        + "".join(f" --filter '{text}'" for text in args.filter)
        + (f" --train-data-upsampling-factors {factors}" if factors else ""),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
