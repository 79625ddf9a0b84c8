"""The trainer's own command on synthetic shards: samples per second, and its wait for data.

Not here: steps on a batch in memory (`throughput_steps`).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from laion_shards import write_shards
from throughput_steps import CLIP, Setting

ROOT = Path(__file__).resolve().parents[1]
LOG_EVERY = 5


def read_rates(file: Path, skip: int) -> dict[str, float]:
    """Read samples per second and data wait from a metrics.jsonl, step `skip` and before left out.

    Windows of equal length weigh by their time, as one long window would.
    """
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [line for line in lines if line.get("samples_per_s") and line["step"] > skip]
    if not rows:
        raise SystemExit(f"{file} has no line after step {skip}; take more steps")
    first = max((line["samples"] for line in lines if line["step"] <= skip), default=0)
    seconds, before = [], first
    for row in rows:
        seconds.append((row["samples"] - before) / row["samples_per_s"])
        before = row["samples"]
    total = sum(seconds)
    waited = sum(s * row["data_wait"] for s, row in zip(seconds, rows, strict=True))
    return {"samples_per_s": (before - first) / total, "data_wait": waited / total}


def run_fed(
    setting: Setting, precision: str, device: str, *, data: Path, side: int, workers: int,
    steps: int, skip: int,
) -> dict[str, Any]:  # fmt: skip
    """Train by the real command and read what it logged.

    Args:
        setting: what is trained.
        precision: as the trainer's flag.
        device: as the trainer's flag.
        data: folder that holds the shards, made when missing.
        side: of the pictures in the shards, pixels.
        workers: loader processes.
        steps: of the run.
        skip: first steps that are not counted.

    Returns:
        `samples_per_s` and `data_wait`, a share of the time.

    Raises:
        SystemExit: the training failed; its last lines are shown.
    """
    # A pass must hold a batch; the pictures themselves come again.
    each = max(250, -(-setting.batch // 8))
    pattern = write_shards(data / f"{side}-{each}", shards=8, each=each, side=side)
    with tempfile.TemporaryDirectory() as logs:
        words = [
            "--model", f"LaSt-{setting.model}", "--last-pooling", setting.pooling,
            "--train-data", pattern, "--train-num-samples", setting.batch * steps, "--epochs", 1,
            "--batch-size", setting.batch, "--precision", precision, "--device", device,
            "--grad-clip-norm", CLIP, "--workers", workers, "--logs", logs, "--name", "run",
            "--log-every-n-steps", LOG_EVERY, "--report-to", "none", "--warmup", 1,
            *(["--torchcompile"] if setting.compiled else []),
            *(["--grad-checkpointing"] if setting.checkpointing else []),
            *(["--threads", 1] if device == "cpu" else []),
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "training.main", *map(str, words)],
            capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"the training on shards failed:\n{done.stderr[-2000:]}")
        return read_rates(Path(logs) / "run" / "metrics.jsonl", skip)
