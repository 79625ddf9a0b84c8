"""The costs that `--dry-run` foretells, beside those of small trainings on the CPU.

Two trainings of a few steps with different batches: what does not grow with the batch (the program
itself, the weights) falls out of the difference of their peak memory. Not here: GPUs.

    python benchmarks/check_costs.py --train-data SHARDS --model LaSt-ViT-nano --batches 64 192
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lazyclip.factory import build

STEPS = 3


def flags(args: argparse.Namespace, batch: int, folder: Path) -> list[str]:
    """Return the flags of a training of `STEPS` steps."""
    return [
        "--train-data", args.train_data, "--model", args.model, "--batch-size", str(batch),
        "--train-num-samples", str(batch * STEPS), "--epochs", "1", "--workers", "0",
        "--threads", "1", "--device", "cpu", "--report-to", "none", "--save-every-minutes", "0",
        "--logs", str(folder / "logs"), "--name", f"b{batch}",
        "--manifest", str(folder / "manifest.npz"),
    ]  # fmt: skip


def started(words: list[str]) -> int:
    """Run `training.main`; returns the peak of its memory in bytes."""
    command = [sys.executable, "-m", "training.main", *words]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return used.ru_maxrss * 1024


def one(args: argparse.Namespace, batch: int, folder: Path) -> dict[str, Any]:
    """Foretell one training, run it, and return both."""
    words, plan = flags(args, batch, folder), folder / f"{batch}.json"
    started([*words, "--dry-run", str(plan)])
    told = json.loads(plan.read_text(encoding="utf-8"))
    peak = started(words)
    run = folder / "logs" / f"b{batch}"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    saved = max((run / "checkpoints").glob("step_*"))
    return {
        "steps": (told["plan"]["steps"], max(line["step"] for line in metrics)),
        "samples": (told["plan"]["samples"], max(line["samples"] for line in metrics)),
        "checkpoint_bytes": (
            told["costs"]["checkpoint_bytes"], sum(p.stat().st_size for p in saved.iterdir()),
        ),
        "peak_bytes": (told["costs"]["memory"]["total"], peak),
        "forward_flop": (sum(told["costs"]["forward"][t] for t in ("image", "text")),
                         counted(args.model)),
    }  # fmt: skip


def counted(name: str) -> int:
    """Count the FLOP of a forward of one sample as torch does."""
    built = build(name, device="meta")
    texts = torch.zeros(1, built.info.context_length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        built.model(torch.zeros(1, 3, *built.info.image_size, device="meta"), texts)
    return counter.get_total_flops()


def table(rows: dict[str, tuple[float, float]]) -> list[str]:
    """Return a Markdown table of what was foretold and found."""
    lines = ["| | foretold | found | found / foretold |", "|---|---|---|---|"]
    for name, (told, found) in rows.items():
        lines.append(f"| {name} | {told:,.0f} | {found:,.0f} | {found / told:.4f} |")
    return lines


def main() -> None:
    """Compare, print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-data", required=True)
    parser.add_argument("--model", default="LaSt-ViT-nano")
    parser.add_argument("--batches", type=int, nargs=2, default=[64, 192])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        small, large = (one(args, batch, Path(name)) for batch in args.batches)
    rows = {
        **{key: value for key, value in large.items() if key != "peak_bytes"},
        f"peak bytes, batch {args.batches[1]} less batch {args.batches[0]}": tuple(
            after - before
            for before, after in zip(small["peak_bytes"], large["peak_bytes"], strict=True)
        ),
    }
    print("\n".join(table(rows)))
    print(json.dumps({"model": args.model, "batches": args.batches, "small": small,
                      "large": large, "torch": torch.__version__}))  # fmt: skip


if __name__ == "__main__":
    main()
