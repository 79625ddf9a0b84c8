"""What a run leaves on disk: checkpoints, each whole or not at all, and status.json.

A checkpoint holds the model as a folder that open_clip reads and, beside it, what going on would
need: optimiser, step, random state. Plain types only. Not here: reading one back.
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lazyclip.base.config import write_json
from lazyclip.base.record import utc_now
from lazyclip.export import save_model
from lazyclip.factory import ModelInfo

STATE_FILE = "train_state.pt"


@dataclasses.dataclass(frozen=True)
class Progressed:
    """How far a run is: optimiser steps done, samples seen, records dropped (all ranks)."""

    step: int
    samples: int
    dropped: int


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies: `checkpoints/step_00000100`."""
    return run / "checkpoints" / f"step_{step:08d}"


def save_checkpoint(
    run: Path,
    done: Progressed,
    model: nn.Module,
    info: ModelInfo,
    optimizer: torch.optim.Optimizer,
    record: Mapping[str, Any],
) -> Path:
    """Save a checkpoint; it appears under its name when it is complete.

    Args:
        run: LOGS/NAME.
        done: how far the run is.
        model: the bare model.
        info: of the model.
        optimizer: of the run.
        record: of the run.

    Returns:
        The checkpoint's folder.
    """
    folder = checkpoint_folder(run, done.step)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    save_model(model, info, part, {**record, **dataclasses.asdict(done), "saved": utc_now()})
    state = {
        **dataclasses.asdict(done),
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
    }
    with (part / STATE_FILE).open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(folder)
    return folder


def write_status(
    run: Path, state: str, step: int, reason: str | None = None, retryable: bool = False
) -> None:
    """Write status.json: `running`, `finished` or `failed`, why, and at which step."""
    write_json(
        run / "status.json",
        {
            "state": state, "reason": reason, "retryable": retryable, "step": step,
            "time": utc_now(),
        },
    )  # fmt: skip
