"""Time to the first batch when a loader begins inside a pass, beside reading and throwing away.

    python benchmarks/bench_first_batch.py [--at 0 0.1 0.5 0.9] [--rounds R] [--lanes N ...]

The exact loader begins at a share of a pass over shards in LAION's layout, cold cache, batch 256,
in place; webdataset reads its stream up to the same sample and hands 256 to the same decoder. Not
here: what comes after the first batch.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from bench_index import EACH
from kept import keep, output_flag
from laion_shards import forget, total_bytes, write_shards
from processes import ROOT, Child

BATCH = 256


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Begin at each share by every way, in alternating rounds, each from a cold cache."""
    folder = args.data / "laion"
    pattern = write_shards(folder, shards=args.shards, each=EACH, side=256)
    common = ["--pattern", pattern, "--batch", BATCH, "--folder", args.data]
    ways = {
        f"exact, {lanes} lanes": ["first", *common, "--lanes", lanes, "--window", args.window]
        for lanes in args.lanes
    }
    ways["webdataset, read and skip"] = ["skip", *common]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    child = Child(sys.executable, "loader_child.py", ["serve"], ours=True)
    try:
        child.ask(["first", *common])  # the index is there before the first timing
        for turn in range(args.rounds):
            for at in args.at:
                for name in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
                    forget(folder)
                    one = child.ask([*ways[name], "--at", at])
                    rows[name].append({"at": at, "load": round(os.getloadavg()[0], 2), **one})
    finally:
        child.close()
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "out" / "bench", help="for shards")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--at", type=float, nargs="+", default=[0.0, 0.1, 0.5, 0.9])
    parser.add_argument("--lanes", type=int, nargs="+", default=[256, 32])
    parser.add_argument("--window", type=int, default=8)
    output_flag(parser)
    args = parser.parse_args()
    began = os.getloadavg()[0]
    rows = measure(args)
    print(f"{args.shards} shards, {total_bytes(args.data / 'laion') / 1e6:.0f} MB, batch {BATCH}")
    for name, runs in rows.items():
        cells = []
        for at in args.at:
            seconds = [run["first_batch_s"] for run in runs if run["at"] == at]
            cpu = [run["cpu_s"] for run in runs if run["at"] == at]
            cells.append(
                f"at {100 * at:.0f} %: {statistics.median(seconds):.1f} s "
                f"({statistics.median(cpu):.1f} CPU s)"
            )
        print(f"{name}: {', '.join(cells)}")
    keep(args, began, {"benchmark": "first batch", "rows": rows})


if __name__ == "__main__":
    main()
