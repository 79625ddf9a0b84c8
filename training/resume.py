"""Going on from a checkpoint: finding it, whose settings hold, and putting everything back.

Not here: what a checkpoint holds (`state`), how it is written.
"""

import copy
import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lazyclip.base.checkpoint import NotWholeError, list_steps, newest_whole, verify
from lazyclip.base.errors import UserError
from lazyclip.factory import Built, ModelInfo
from lazyclip.weights import WEIGHT_FILE

from .batchsize import near_pieces, near_ranks
from .params import Parsed, TrainArgs, check_ranges
from .sharded import Sharded
from .state import STATE_FILE

log = logging.getLogger(__name__)
# What may change from start to start: where and how fast a run runs, not what it computes.
FREE = {
    "train_data", "manifest", "window_memory", "allow_pipe", "workers", "max_bad_fraction",
    "batch_size", "global_batch", "accum_freq", "logs", "name", "save_every",
    "save_every_minutes", "keep", "resume", "audit", "watchdog_minutes", "log_every_n_steps",
    "report_to", "device", "threads", "dry_run", "gpus", "gpu", "mfu", "config", "local_loss",
    "gather_with_grad", "grad_checkpointing", "torchcompile", "fsdp", "max_nonfinite",
    "val_data", "val_num_samples", "classes", "templates", "probe_every", "max_top1_drop",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from: its folder and what its state file holds, tensors unread."""

    folder: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int(self.state["step"])


def find_checkpoint(args: TrainArgs) -> Path | None:
    """Find what `--resume` means; None for `latest` where nothing was saved yet.

    Raises:
        UserError: no such checkpoint, or one that is not whole.
    """
    if args.resume is None:
        return None
    if args.resume == "latest":
        if args.name is None:
            raise UserError("--resume latest needs the run's --name (or give --resume a folder)")
        return _newest(Path(args.logs) / args.name / "checkpoints")
    folder = Path(args.resume).absolute()
    if (folder / "checkpoints").is_dir():
        found = _newest(folder / "checkpoints")
        if found is None:
            raise UserError(f"--resume {folder}: no whole checkpoint in it; start without --resume")
        return found
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: no such folder; use latest, or a checkpoint's folder")
    try:
        verify(folder)
    except NotWholeError as error:
        raise UserError(
            f"--resume {folder}: {error}; name an older checkpoint, or use --resume latest"
        ) from None
    return folder


def _newest(parent: Path) -> Path | None:
    """Find the newest whole checkpoint, None where none was ever saved.

    Raises:
        UserError: there are some, and none is whole: starting over would throw the run away.
    """
    found = newest_whole(parent)
    there = list_steps(parent)
    if found is None and there:
        raise UserError(
            f"none of the {len(there)} checkpoints in {parent} is whole; restore one, or start a "
            "new run with another --name"
        )
    return found


def set_aside(run: Path, step: int) -> None:
    """Rename checkpoints after a step, from which the run goes on another way now.

    Otherwise `latest` would mean them, and the samples between would be in no record.
    """
    for later, folder in list_steps(run / "checkpoints"):
        if later > step:
            aside = folder.with_name(f"{folder.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            log.warning("%s is of the run before, now %s", folder.name, aside.name)


def read_checkpoint(folder: Path) -> Resumed:
    """Open a checkpoint's state.

    Raises:
        UserError: it is of the streaming loader, which cannot go on, or of another program.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise UserError(f"--resume {folder} holds no {STATE_FILE}: it is no checkpoint of a run")
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if "args" not in state:
        raise UserError(f"--resume {folder} is of an older version, which could not be resumed")
    if state["args"]["loader"] != "exact":
        raise UserError(
            f"--resume {folder} is of --loader sequential, which has no place to go on from; start "
            f"a new run with --pretrained {folder}"
        )
    return Resumed(folder, state)


def settings(parsed: Parsed, resumed: Resumed, world: int) -> TrainArgs:
    """Return the settings of a run that goes on: the recorded ones, and what is free to change.

    The global batch stays; the batch of a rank follows from it.

    Raises:
        UserError: a flag that contradicts what was recorded.
    """
    known = {field.name for field in dataclasses.fields(TrainArgs)}
    recorded = {k: v for k, v in resumed.state["args"].items() if k in known}
    recorded["filter"] = tuple(recorded["filter"])
    recorded["precision"] = recorded.get("precision") or _precision(resumed)
    # What the run chose by itself, and what its order follows from.
    chosen = {name: int(resumed.state[name]) for name in ("lanes", "window")}
    before = {**dataclasses.asdict(TrainArgs()), **recorded, **chosen}
    for name, value in parsed.given.items():
        if name not in FREE and value != before[name]:
            raise UserError(
                f"{_differs(name, value, before[name], resumed.folder.name)}; leave it out, or "
                "start a new run without --resume"
            )
    free = {name: value for name, value in parsed.given.items() if name in FREE}
    args = TrainArgs(**{**recorded, "resume": None, "dry_run": None, **free})
    run = run_folder(parsed) or _goes_to(parsed, resumed.folder.parent.parent)
    args = dataclasses.replace(
        args, name=run.name, logs=str(run.parent),
        batch_size=_batch(parsed, args, int(resumed.state["global_batch"]), world),
        lanes=chosen["lanes"], window=chosen["window"],
    )  # fmt: skip
    check_ranges(args)
    return args


def _precision(resumed: Resumed) -> str | None:
    """Return the precision of a run that left it to its device, as its record has it."""
    try:
        record = json.loads((resumed.folder / "record.json").read_text(encoding="utf-8"))
        return record["precision"]
    except (OSError, ValueError, KeyError):
        return None


def run_folder(parsed: Parsed) -> Path | None:
    """Return LOGS/NAME of a run that goes on; None for a new one, or where no run is named."""
    args = parsed.args
    if args.resume is None:
        return None
    if args.resume == "latest":
        return Path(args.logs) / args.name if args.name else None
    given = Path(args.resume).absolute()
    if (given / "checkpoints").is_dir():
        run = given
    elif given.parent.name == "checkpoints":
        run = given.parent.parent
    else:
        return None
    return _goes_to(parsed, run)


def _goes_to(parsed: Parsed, run: Path) -> Path:
    """Return where a run goes on: in its own folder, unless flags name another."""
    logs = Path(parsed.args.logs) if "logs" in parsed.given else run.parent
    return logs / (parsed.args.name or run.name)


def _differs(name: str, value: object, before: object, checkpoint: str) -> str:
    """Phrase how a flag contradicts what a checkpoint was trained with."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        flag = flag if value else f"--no-{name.replace('_', '-')}"
        return f"{flag} does not fit {checkpoint}, which was trained without it"
    given = f"{flag} {_shown(value)}"
    if before in (None, ()):
        return f"{given} does not fit {checkpoint}, which was trained without {flag}"
    return f"{given} differs from the {_shown(before)} that {checkpoint} was trained with"


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _batch(parsed: Parsed, args: TrainArgs, total: int, world: int) -> int:
    """Return the batch of a rank, so that the global batch stays what it was."""
    ranks = f"{world} rank" + ("s" if world > 1 else "")
    pieces = f" x {args.accum_freq} pieces" if args.accum_freq > 1 else ""
    per_rank, rest = divmod(total, world * args.accum_freq)
    if rest:
        accum = args.accum_freq
        ways = [near_ranks(total, world, accum), near_pieces(total, world, accum)]
        near = ", or ".join(way for way in ways if way)
        near = near or f"{near_ranks(total, world, 1)} and --accum-freq 1"
        raise UserError(
            f"the run's global batch of {total} cannot be shared by {ranks}{pieces}; use {near}"
        )
    asked = parsed.given.get("global_batch")
    if asked is not None and asked != total:
        raise UserError(
            f"--global-batch {asked} contradicts the run's global batch of {total}; leave it out, "
            "or start a new run without --resume"
        )
    given = parsed.given.get("batch_size")
    if given is not None and given != per_rank:
        raise UserError(
            f"--batch-size {given} on {ranks}{pieces} contradicts the run's global batch of "
            f"{total}; leave it out or give --batch-size {per_rank}"
        )
    return per_rank


def check_manifest(resumed: Resumed, sha256: str) -> None:
    """Check that the data are those that the run began with; raises `UserError`."""
    before = resumed.state["manifest"]
    if sha256 != before:
        raise UserError(
            f"the manifest is {sha256[:12]}, {resumed.folder.name} was trained with {before[:12]}: "
            "shards, filters or factors changed; restore them, or start a new run with "
            f"--pretrained {resumed.folder}"
        )


def model_info(resumed: Resumed, built: Built) -> ModelInfo:
    """Return what the run's results say of its model: where its first weights came from."""
    before = json.loads((resumed.folder / "record.json").read_text(encoding="utf-8"))["model"]
    return dataclasses.replace(
        built.info, name=before["name"], pretrained=before["pretrained"],
        weights_sha256=before["weights_sha256"],
    )  # fmt: skip


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into a model of the same shape."""
    state = load_file(folder / WEIGHT_FILE)
    own = model.state_dict()
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in state.items()})


def check_groups(resumed: Resumed, sizes: list[int]) -> None:
    """Check that the optimiser has the checkpoint's groups; `sizes`, parameters of each here."""
    before = [len(group["params"]) for group in resumed.state["optimizer"]["param_groups"]]
    if before != sizes:
        raise UserError(
            f"{resumed.folder.name} holds an optimiser of {sum(before)} parameters in "
            f"{len(before)} groups, this run has {sum(sizes)} in {len(sizes)}: rates by tower or "
            "layer, or locked towers, differ; start a new run with --pretrained "
            f"{resumed.folder}"
        )


def restore(
    resumed: Resumed,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sharded: Sharded | None = None,
) -> None:
    """Put a checkpoint's weights and the optimiser's state back; into shares, where they are.

    Raises:
        UserError: the optimiser groups its parameters another way than the checkpoint's.
    """
    check_groups(resumed, [len(group["params"]) for group in optimizer.param_groups])
    if sharded is not None:
        weights = load_file(resumed.folder / WEIGHT_FILE)
        sharded.restore(weights, optimizer, resumed.state["optimizer"])
        return
    load_weights(resumed.folder, model)
    # Copied: the tensors of the file are only mapped, and the file may be pruned.
    optimizer.load_state_dict(copy.deepcopy(resumed.state["optimizer"]))
