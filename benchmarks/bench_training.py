"""Training samples per second of a small model, and the way back, beside open_clip_train.

    python benchmarks/bench_training.py [--model ViT-nano] [--rounds R] [--steps N]
    python benchmarks/bench_training.py --resume [--rounds R]

The same shards, batch, precision, loader processes and shape; ours with LaSt pooling, theirs with
the plain tower; each by its own command in its own process, alternating, timed at the optimiser's
steps, with the peak memory of the process and its children. `--resume`: both are killed at the
middle of their second epoch and started again. Not here: GPUs.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from kept import keep, output_flag, ratio_of
from laion_shards import write_shards
from peer import DEFAULT, ensure_peer
from processes import ROOT, run_child

BATCH = 64
# What each side's log says when it goes on from a checkpoint.
RESUMED = {"theirs": "=> resuming checkpoint", "ours": "resumed from step_"}


def words_of(side: str, args: argparse.Namespace, logs: Path, samples: int) -> list[object]:
    """Return the flags of a training; what is spelt alike means the same on both sides."""
    pattern = write_shards(args.data / "256", shards=8, each=250, side=256)
    words: list[object] = [
        "--side", side, "--batch", BATCH, "--train-data", pattern, "--train-num-samples", samples,
        "--dataset-type", "webdataset", "--workers", args.workers, "--precision", "fp32",
        "--epochs", 2, "--warmup", 10, "--lr", 5e-4, "--wd", 0.2, "--seed", 0, "--device", "cpu",
        "--logs", logs, "--name", "run", "--log-every-n-steps", 10,
    ]  # fmt: skip
    if side == "ours":
        return [*words, "--model", f"LaSt-{args.model}", "--report-to", "none", "--threads", 1]
    return [*words, "--model", args.model]


def train(side: str, args: argparse.Namespace, words: list[object]) -> dict[str, Any]:
    """Run one training in its own environment."""
    python = ensure_peer(args.peer) if side == "theirs" else Path(sys.executable)
    return run_child(python, "train_child.py", words, ours=side == "ours", watch=2.0)


def rates(args: argparse.Namespace) -> dict[str, Any]:
    """Train on both sides in alternating rounds."""
    runs: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
    for turn in range(args.rounds):
        for side in ("theirs", "ours") if turn % 2 == 0 else ("ours", "theirs"):
            with tempfile.TemporaryDirectory() as folder:
                words = words_of(side, args, Path(folder), args.steps * BATCH)
                given = [*words, "--warm", args.warm, "--stop", args.steps]
                runs[side].append(train(side, args, given))
    found: dict[str, Any] = {"runs": runs}
    for key, unit in (
        ("per_second", "samples per second"), ("per_cpu_second", "samples per CPU second"),
        ("peak_rss", "peak RSS, bytes"), ("peak_pss", "peak PSS, bytes"),
    ):  # fmt: skip
        rows = {side: [run[key] for run in runs[side]] for side in runs}
        ratio = ratio_of(rows["ours"], rows["theirs"])
        found[key] = {**{n: statistics.median(r) for n, r in rows.items()}, "ratio": ratio}
        print(
            f"{args.model}, {unit}: open_clip_train {found[key]['theirs']:.4g}, ours with LaSt "
            f"{found[key]['ours']:.4g}; {ratio} (load {os.getloadavg()[0]:.1f})",
            flush=True,
        )
    return found


def resume(args: argparse.Namespace) -> dict[str, Any]:
    """Kill both sides in the middle of the second epoch, start them again, time the steps."""
    epoch = args.steps
    killed = epoch + epoch // 2
    rows: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
    for turn in range(args.rounds):
        for side in ("theirs", "ours") if turn % 2 == 0 else ("ours", "theirs"):
            with tempfile.TemporaryDirectory() as folder:
                words = words_of(side, args, Path(folder), epoch * BATCH)
                if side == "ours":
                    words += ["--save-every", epoch // 2]
                # One step more, so that the save after the last is done before the end.
                train(side, args, [*words, "--stop", killed + 1])
                # Theirs begins at its epoch's start, and meets the step again half an epoch later.
                again = 1 if side == "ours" else killed + 1 - epoch
                one = train(side, args, [*words, "--resume", "latest", "--stop", again])
                log = (Path(folder) / "run" / "out.log").read_text()
                if RESUMED[side] not in log:
                    raise SystemExit(f"{side} began anew:\n{log[-1000:]}")
            rows[side].append(
                {
                    "first_step_s": one["times"][0] - one["started"],
                    "same_step_s": one["times"][-1] - one["started"],
                    "load": one["load"],
                }
            )
    for key, what in (
        ("first_step_s", "the first step after it"), ("same_step_s", "the step it was killed at"),
    ):  # fmt: skip
        ours, theirs = ([row[key] for row in rows[side]] for side in ("ours", "theirs"))
        print(
            f"killed at step {killed} of {2 * epoch}, seconds from start to {what}: "
            f"open_clip_train {statistics.median(theirs):.1f}, ours {statistics.median(ours):.1f}; "
            f"{ratio_of(theirs, ours)} (load {os.getloadavg()[0]:.1f})",
            flush=True,
        )
    return {"killed": killed, "steps": 2 * epoch, "rows": rows}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, default=DEFAULT, help="environment of the other side")
    parser.add_argument("--data", type=Path, default=ROOT / "out" / "bench", help="for shards")
    parser.add_argument("--model", default="ViT-nano", help="plain name; ours has LaSt- before it")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40, help="of an epoch")
    parser.add_argument("--warm", type=int, default=10, help="steps before the timing begins")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resume", action="store_true", help="time the way back into a run")
    output_flag(parser)
    args = parser.parse_args()
    began = os.getloadavg()[0]
    found = resume(args) if args.resume else rates(args)
    keep(args, began, {"benchmark": "training", **found})


if __name__ == "__main__":
    main()
