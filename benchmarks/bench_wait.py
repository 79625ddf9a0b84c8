"""The share of time a training waits for data when its steps leave the loader the time it needs.

    python benchmarks/bench_wait.py [--workers 2] [--factors 1.5 2 3] [--rounds R]

The trainer is a sleep, so that the loader has the cores. A step takes a multiple of the time that
the loader needs for a batch, measured in the same process just before. Not here: a real step, which
competes for the cores where the model is on the CPU.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

from kept import keep, output_flag
from laion_shards import write_shards
from processes import ROOT, run_child

GOAL = 0.02


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "out" / "bench", help="for shards")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--factors", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    output_flag(parser)
    args = parser.parse_args()
    began = os.getloadavg()[0]
    pattern = write_shards(args.data / "256", shards=8, each=250, side=256)
    found = {}
    for workers in args.workers:
        words = ["wait", "--pattern", pattern, "--workers", workers, "--steps", args.steps,
                 "--folder", args.data, "--factors", *args.factors]  # fmt: skip
        runs = [
            run_child(sys.executable, "loader_child.py", words, ours=True)
            for _ in range(args.rounds)
        ]
        found[f"{workers} workers"] = runs
        for place, factor in enumerate(args.factors):
            shares = [run["rows"][place]["share"] for run in runs]
            middle = statistics.median(shares)
            print(
                f"{workers} workers, a step {factor:g} times as long as the loader needs: waits "
                f"{100 * middle:.2f} % ({100 * min(shares):.2f}-{100 * max(shares):.2f}), goal "
                f"{100 * GOAL:g}: {'reached' if middle < GOAL else 'not reached'} "
                f"(load {os.getloadavg()[0]:.1f})",
                flush=True,
            )
    keep(args, began, {"benchmark": "wait", **found})


if __name__ == "__main__":
    main()
