"""What a run leaves on disk: checkpoints, each whole or not at all, and status.json.

A checkpoint holds the model as a folder that open_clip reads and, beside it, everything else that
going on needs: optimiser, step, data state, random states, settings. Plain types only. Not here:
reading one back (`resume`).
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lazyclip.base import checkpoint
from lazyclip.base.config import write_json
from lazyclip.base.record import utc_now
from lazyclip.export import save_model
from lazyclip.factory import ModelInfo

from .runlock import Hold

log = logging.getLogger(__name__)
STATE_FILE = "train_state.pt"
# Beside the newest ones, the first checkpoint of each so many steps stays for good.
KEPT_EVERY = 10_000
# What a checkpoint holds beside its tensors: names, vocabulary, records.
_MORE_BYTES = 1 << 20


class HasState(Protocol):
    """What has a state to save, as an optimiser has."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""


@dataclasses.dataclass(frozen=True)
class Progressed:
    """How far a run is, all ranks together.

    Fields: optimiser steps done; samples seen; dropped, samples that could not be used; k, samples
    of each lane that were consumed.
    """

    step: int
    samples: int
    dropped: int
    k: int = 0


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies: `checkpoints/step_00000100`."""
    return run / "checkpoints" / f"step_{step:08d}"


def random_states() -> dict[str, Any]:
    """Return the states of this process's random number generators, as plain types.

    numpy's global one is left out: nothing here draws from it.
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [random.getstate()[0], list(random.getstate()[1]), random.getstate()[2]],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put the generators into states that `random_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    version, inside, gauss = states["python"]
    random.setstate((version, tuple(inside), gauss))


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                      if value.dim() else repr(value.item()).encode())  # fmt: skip
    return digest.hexdigest()


def _tensor_bytes(value: object) -> int:
    """Count the bytes of all tensors in nested plain containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def check_room(parent: Path, model: nn.Module, optimizer: HasState) -> None:
    """Check that a checkpoint fits on the disk, before half of one is written.

    What killed starts left unfinished is removed first: it would take up the room for ever.

    Raises:
        OSError: ENOSPC; the run can go on without this checkpoint.
    """
    parent.mkdir(parents=True, exist_ok=True)
    checkpoint.prune(parent, 0)
    need = _tensor_bytes(model.state_dict()) + _tensor_bytes(optimizer.state_dict()) + _MORE_BYTES
    total, _, free = shutil.disk_usage(parent)
    if total and need > free:  # some disks know no sizes at all
        why = f"it needs {need / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, why, str(parent))


def save_checkpoint(
    run: Path,
    done: Progressed,
    model: nn.Module,
    info: ModelInfo,
    optimizer: HasState,
    record: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
    keep: int = 0,
) -> Path:
    """Save a checkpoint and verify it; it appears under its name when it is complete.

    Args:
        run: LOGS/NAME.
        done: how far the run is.
        model: the bare model, in one piece.
        info: of the model.
        optimizer: of the run, or its state in one piece.
        record: of the run.
        more: plain things that going on needs too.
        keep: older checkpoints than so many newest go, now that this one is whole, but for the
            first of each `KEPT_EVERY` steps; 0 keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it cannot be written; nothing of it is left.
        NotWholeError: what was read back is not what was written.
    """
    folder = checkpoint_folder(run, done.step)
    check_room(folder.parent, model, optimizer)
    with checkpoint.writing(folder) as part:
        save_model(model, info, part, {**record, **dataclasses.asdict(done), "saved": utc_now()})
        state = {
            **dataclasses.asdict(done), **(more or {}),
            "optimizer": optimizer.state_dict(),
        }  # fmt: skip
        with (part / STATE_FILE).open("wb") as stream:
            torch.save(state, stream)
    checkpoint.prune(folder.parent, keep, KEPT_EVERY, spare=(folder,))
    return folder


def write_status(
    run: Path,
    state: str,
    step: int,
    reason: str | None = None,
    retryable: bool = False,
    hold: Hold | None = None,
) -> None:
    """Write status.json: `running`, `preempted`, `finished` or `failed`, why, and at which step.

    A run fails for one reason: what a second rank has to say of the same failure is left out. So is
    what is left of a run has to say where another start has its folder, which `hold` tells.
    """
    if hold is not None and not hold.stands():
        log.warning("%s is another start's: '%s' at step %d is not noted", run, state, step)
        return
    if state == "failed" and _status(run).get("state") == "failed":
        return
    _put_status(run, state, step, reason, retryable)


def write_refused(run: Path, reason: str) -> None:
    """Say in status.json that a run was started so that it cannot go on, and is not to be again.

    The step stays, and a run that is finished stays so.
    """
    before = _status(run)
    if before.get("state") != "finished":
        with contextlib.suppress(OSError):
            _put_status(run, "failed", int(before.get("step", 0)), reason, False)


def _status(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _put_status(run: Path, state: str, step: int, reason: str | None, retryable: bool) -> None:
    about = {
        "state": state, "reason": reason, "retryable": retryable, "step": step, "time": utc_now(),
    }  # fmt: skip
    # Several ranks may write at once: each by a file of its own.
    mine = run / f"status.{os.getpid()}.json"
    try:
        write_json(mine, about)
        mine.replace(run / "status.json")
    finally:
        mine.unlink(missing_ok=True)
