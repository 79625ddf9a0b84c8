"""Memory of the exact loader, its processes included, over many passes: flat or not.

    python benchmarks/bench_loader_memory.py [--epochs 20] [--workers 0 2]

Prints resident and proportional bytes (pages shared by several processes counted once) after the
first pass, in the middle and after the last, and the slope over the second half. Not here: what a
training holds beside the loader.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from kept import keep, output_flag
from laion_shards import write_shards
from processes import ROOT, run_child


def slope_of(row: list[int]) -> float:
    """Return the growth of a row of figures in each pass, over its second half."""
    later = row[len(row) // 2 :]
    return float(np.polyfit(np.arange(len(later)), later, 1)[0])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "out" / "bench", help="for shards")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--window", type=int, default=2)
    output_flag(parser)
    args = parser.parse_args()
    began = os.getloadavg()[0]
    pattern = write_shards(args.data / "256", shards=8, each=250, side=256)
    found: dict[str, Any] = {"benchmark": "loader memory"}
    for workers in args.workers:
        words = ["passes", "--pattern", pattern, "--epochs", args.epochs, "--workers", workers,
                 "--lanes", args.lanes, "--window", args.window, "--folder", args.data]  # fmt: skip
        one = run_child(sys.executable, "loader_child.py", words, ours=True)
        found[f"{workers} workers"] = one
        for kind in ("rss", "pss"):
            row = one[kind]
            print(
                f"{workers} workers, {kind}: after pass 1 {row[0] / 1e6:.0f} MB, median "
                f"{statistics.median(row) / 1e6:.0f}, least {min(row) / 1e6:.0f}, most "
                f"{max(row) / 1e6:.0f}, after pass {len(row)} {row[-1] / 1e6:.0f}; second half "
                f"{slope_of(row) / 1e6:+.2f} MB a pass",
                flush=True,
            )
    keep(args, began, found)


if __name__ == "__main__":
    main()
