"""Everything that can be checked before a run, and its plan.

Nothing here writes a file: a run that fails its preflight leaves no folder.
"""

import dataclasses
import datetime
import importlib.util
import itertools
import math
import re
from pathlib import Path

import lazyclip
from lazyclip.base.errors import UserError
from lazyclip.base.record import git_state, versions
from lazyclip.factory import ModelInfo
from lazyclip.shards import class_index_of, expand, iterate_samples
from lazyclip.zeroshot import ClassList, read_classes, templates

from .data.sources import LOOK_AT, Source, open_source
from .distributed import Place
from .optim import default_warmup
from .params import EXAMPLE, TrainArgs


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will do; counts of steps and samples are those of all ranks together."""

    samples_per_epoch: int
    global_batch: int
    steps: int
    steps_per_epoch: int
    warmup: int
    save_every: int
    probe_every: int

    @property
    def samples(self) -> int:
        """Samples seen in the whole run."""
        return self.steps * self.global_batch


@dataclasses.dataclass(frozen=True)
class ValData:
    """The zero-shot probe's pictures, classes and prompts."""

    shards: tuple[Path, ...]
    classes: ClassList
    templates: str


def check_name(args: TrainArgs) -> None:
    """Check that a named run does not exist yet.

    Raises:
        UserError: LOGS/NAME is there, or the name is no folder name.
    """
    if args.name is None:
        return
    if not re.fullmatch(r"[\w.,=+-]+", args.name):
        raise UserError(f"--name {args.name} is no folder name; use letters, digits and ._,=+-")
    if (Path(args.logs) / args.name).exists():
        raise UserError(f"{Path(args.logs) / args.name} exists; give another --name or --logs")


def has_tensorboard() -> bool:
    """Tell whether TensorBoard's writer can be imported."""
    return importlib.util.find_spec("tensorboard") is not None


def check_report(args: TrainArgs) -> None:
    """Check that what `--report-to` asks for is installed; raises `UserError`."""
    if "tensorboard" in args.report_to.split(",") and not has_tensorboard():
        raise UserError("--report-to tensorboard needs tensorboard: pip install tensorboard")


def default_name(args: TrainArgs) -> str:
    """Return a run's name where none is given: model and start time."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{Path(args.model).name or 'model'}-{stamp}"


def check_data(args: TrainArgs, place: Place) -> Source:
    """Find and check the training shards; see `data.sources.open_source`."""
    if not args.train_data:
        raise UserError(f"--train-data is missing; an example: {EXAMPLE}")
    lanes = place.world * max(args.workers, 1)
    return open_source(
        args.train_data, args.train_num_samples, args.dataset_resampled, lanes, args.workers
    )


def check_val(args: TrainArgs) -> ValData | None:
    """Find the probe's shards and classes; None without `--val-data`.

    Raises:
        UserError: one of `--val-data` and `--classes` without the other, or not to be read.
    """
    if not args.val_data:
        if args.classes:
            raise UserError("--classes without --val-data names classes of no pictures; add it")
        return None
    shards = expand(args.val_data, "--val-data")
    if not args.classes:
        raise UserError(
            "--val-data needs class names: pass --classes FILE (one a line, in index order) or a "
            'comma list such as --classes "cat, dog"'
        )
    templates(args.templates)
    val = ValData(tuple(shards), read_classes(args.classes), args.templates)
    _look_at(val)
    return val


def _look_at(val: ValData) -> None:
    """Check that the first images have classes that the list names."""
    samples = itertools.islice(iterate_samples(val.shards[0]), LOOK_AT)
    targets = [(sample.label, class_index_of(sample)) for sample in samples]
    if not targets or targets[0][1] is None:
        raise UserError(
            f"--val-data {val.shards[0]}: the first sample has no class; its json needs "
            "class_index, or add KEY.cls"
        )
    for label, target in targets:
        if target is not None:
            check_class(target, label, len(val.classes))


def check_class(target: int, label: str, classes: int) -> None:
    """Check a class index against the number of names; raises `UserError` beyond it."""
    if not 0 <= target < classes:
        raise UserError(
            f"--val-data {label} has class {target}, and --classes names {classes}; give one name "
            "for each class, in index order"
        )


def check_size(args: TrainArgs, info: ModelInfo) -> None:
    """Check that whole patches cover a forced image size; raises `UserError`."""
    size, patch = args.force_image_size, info.patch_size
    if size is not None and size % patch:
        below = max(size // patch, 1) * patch
        raise UserError(
            f"--force-image-size {size} is no multiple of the {patch} px patches of {info.name}; "
            f"use {below} or {below + patch}"
        )


def make_plan(args: TrainArgs, source: Source, place: Place) -> Plan:
    """Count the steps of a run.

    Raises:
        UserError: a warm-up longer than the run.
    """
    global_batch = args.batch_size * place.world
    per_epoch = math.ceil(source.samples / global_batch)
    steps = math.ceil(args.epochs * source.samples / global_batch)
    warmup = default_warmup(steps) if args.warmup is None else args.warmup
    if warmup > steps:
        raise UserError(
            f"--warmup {warmup} exceeds the {steps} steps of this run: the learning rate would "
            f"stop at {100 * steps / warmup:.1f} % of --lr {args.lr:g}; use "
            f"--warmup {default_warmup(steps)} or more --epochs"
        )
    return Plan(
        samples_per_epoch=source.samples,
        global_batch=global_batch,
        steps=steps,
        steps_per_epoch=per_epoch,
        warmup=warmup,
        save_every=args.save_every or per_epoch,
        probe_every=args.probe_every or per_epoch,
    )


def describe(
    args: TrainArgs,
    overrode: tuple[str, ...],
    source: Source,
    plan: Plan,
    info: ModelInfo,
    place: Place,
    precision: str,
    trainable: int,
) -> list[str]:
    """Phrase the banner: versions, code, device, model, data, plan; one line each."""  # fmt: skip
    known, git = versions(), git_state()
    shown = {**info.pooling}
    if shown["sigma"] is None:
        shown["sigma"] = "sqrt(D)"
    pooling = ", ".join(f"{key} {value}" for key, value in shown.items())
    ranks = f"{place.world} rank" + ("s" if place.world > 1 else "")
    lanes = place.world * max(args.workers, 1)
    held = args.pretrained or ("its own" if info.weights_sha256 else "random")
    lines = [
        "versions: " + ", ".join(f"{name} {version}" for name, version in known.items()),
        f"code: {Path(lazyclip.__file__).parent}, commit {git['commit'] or 'unknown'}"
        + (" with changes" if git["dirty"] else ""),
        f"device: {place.device}, {ranks}, precision {precision}",
        f"model: {info.name}, weights {held}, {info.parameters:,} "
        f"parameters ({trainable:,} trained), activation {info.activation}, image "
        f"{info.image_size[0]} x {info.image_size[1]} px, {info.grid[0]} x {info.grid[1]} patches",
        f"pooling: {pooling}",
        f"data: {len(source.shards)} shards, {plan.samples_per_epoch:,} samples in an epoch, "
        f"{len(source.shards) / lanes:.1f} shards per loader process"
        + (", drawn with replacement" if source.resampled else ""),
        f"plan: {plan.steps:,} steps of {plan.global_batch} samples ({args.batch_size} per rank x "
        f"{place.world}) = {plan.samples:,} samples seen; warm-up {plan.warmup} steps "
        f"({100 * plan.warmup / plan.steps:.1f} %); lr {args.lr:g}, weight decay {args.wd:g}; "
        f"checkpoint every {plan.save_every} steps",
    ]
    if args.config:
        flags = ", ".join("--" + key.replace("_", "-") for key in overrode)
        lines.append(f"recipe: {Path(args.config).name}; overridden by flags: {flags or 'nothing'}")
    return lines
