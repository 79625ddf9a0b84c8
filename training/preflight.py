"""Everything that can be checked before a run, and its plan.

Nothing here writes a file: a run that fails its preflight leaves no folder.
"""

import dataclasses
import datetime
import importlib.util
import itertools
import logging
import math
import re
from pathlib import Path

import lazyclip
from lazyclip.base.errors import UserError
from lazyclip.base.record import git_state, versions
from lazyclip.factory import ModelInfo
from lazyclip.shards import class_index_of, expand, iterate_samples
from lazyclip.weights import trained_size
from lazyclip.zeroshot import ClassList, read_classes, templates

from .data.exact import Exact
from .data.sources import LOOK_AT, Source, open_source
from .data.survey import NOT_WHOLE
from .distributed import Place
from .indexed import exact_data
from .optim import default_warmup
from .params import EXAMPLE, TrainArgs
from .runlock import in_use, living


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


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads.

    Fields: samples of a pass (or what stands for one); source of the streaming loader, or exact,
    one of them; lines about it for the banner.
    """

    samples: int
    source: Source | None
    exact: Exact | None
    lines: tuple[str, ...] = ()


def check_name(args: TrainArgs) -> None:
    """Check that a named run does not exist yet, or is to be resumed.

    Raises:
        UserError: LOGS/NAME is in use, or the name is no folder name.
    """
    if args.name is None:
        return
    if not re.fullmatch(r"[\w.,=+-]+", args.name):
        raise UserError(f"--name {args.name} is no folder name; use letters, digits and ._,=+-")
    if args.resume is None:
        check_unused(Path(args.logs) / args.name)


def check_unused(folder: Path, locked: bool = False) -> None:
    """Check that a folder holds no run.

    Args:
        folder: LOGS/NAME.
        locked: by this process itself.

    Raises:
        UserError: it does; names the process where that run is alive.
    """
    if in_use(folder):
        raise UserError(
            (None if locked else living(folder))
            or f"{folder} exists; go on with it by --resume latest, or give another --name or "
            "--logs"
        )


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


def check_data(args: TrainArgs, place: Place, begun: bool = False) -> Data:
    """Find and check the training shards; the exact loader's are indexed where they were not.

    `begun`: see `exact_data`.
    """
    if not args.train_data:
        if args.dry_run and args.train_num_samples:
            return Data(args.train_num_samples, None, None, ("no --train-data: not looked at",))
        raise UserError(f"--train-data is missing; an example: {EXAMPLE}")
    if args.loader == "exact":
        for flag in ("dataset_resampled", "allow_pipe"):
            if getattr(args, flag):
                why = "has no passes" if flag == "dataset_resampled" else "streams"
                name = flag.replace("_", "-")
                raise UserError(f"--{name} {why}; add --loader sequential")
        exact, samples, lines = exact_data(args, place, global_batch(args, place), begun)
        return Data(args.train_num_samples or samples, None, exact, tuple(lines))
    for flag in ("lanes", "window", "manifest", "filter", "audit", "resume"):
        if getattr(args, flag):
            raise UserError(f"--{flag} needs the exact loader; leave --loader sequential out")
    lanes = place.world * max(args.workers, 1)
    source = open_source(
        args.train_data, args.train_num_samples, args.dataset_resampled, lanes, args.workers,
        args.train_data_upsampling_factors, args.allow_pipe,
    )  # fmt: skip
    drawn = ", drawn with replacement" if source.resampled else ""
    return Data(
        source.samples, source, None,
        (f"sequential loader, {len(source.shards)} shards, {len(source.shards) / lanes:.1f} shards "
         f"per loader process{drawn}; such a run cannot be resumed",),
    )  # fmt: skip


def global_batch(args: TrainArgs, place: Place) -> int:
    """Return the samples of a step, all ranks together."""
    return args.batch_size * args.accum_freq * place.world


def check_val(args: TrainArgs) -> ValData | None:
    """Find the probe's shards and classes; None without `--val-data`.

    Raises:
        UserError: one of `--val-data` and `--classes` without the other, or not to be read.
    """
    if not args.val_data:
        if args.max_top1_drop is not None:
            raise UserError("--max-top1-drop needs scores to fall: add --val-data and --classes")
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


def make_plan(args: TrainArgs, samples: int, place: Place) -> Plan:
    """Count the steps of a run of `samples` in an epoch.

    Raises:
        UserError: a warm-up longer than the run.
    """
    total = global_batch(args, place)
    per_epoch = math.ceil(samples / total)
    steps = math.ceil(args.epochs * samples / total)
    warmup = default_warmup(steps) if args.warmup is None else args.warmup
    if warmup > steps:
        raise UserError(
            f"--warmup {warmup} exceeds the {steps} steps of this run: the learning rate would "
            f"stop at {100 * steps / warmup:.1f} % of --lr {args.lr:g}; use "
            f"--warmup {default_warmup(steps)} or more --epochs"
        )
    return Plan(
        samples_per_epoch=samples,
        global_batch=total,
        steps=steps,
        steps_per_epoch=per_epoch,
        warmup=warmup,
        save_every=args.save_every or per_epoch,
        probe_every=args.probe_every or per_epoch,
    )


def describe(
    args: TrainArgs,
    overrode: tuple[str, ...],
    data: Data,
    plan: Plan,
    info: ModelInfo,
    place: Place,
    precision: str,
    trainable: int,
) -> list[str]:
    """Phrase the banner: versions, code, device, model, data, plan; one line each."""
    known, git = versions(), git_state()
    shown = {**info.pooling}
    if shown["sigma"] is None:
        shown["sigma"] = "sqrt(D)"
    pooling = ", ".join(f"{key} {value}" for key, value in shown.items())
    ranks = f"{place.world} rank" + ("s" if place.world > 1 else "")
    held = args.pretrained or ("its own" if info.weights_sha256 else "random")
    held += " (not read)" if place.planned and args.pretrained else ""
    size = f"{info.image_size[0]} x {info.image_size[1]} px"
    before = None if args.resume else trained_size(args.model, args.pretrained)
    if before not in (None, info.image_size):
        size += f" (positions interpolated from {before[0]} x {before[1]})"
    lines = [
        "versions: " + ", ".join(f"{name} {version}" for name, version in known.items()),
        f"code: {Path(lazyclip.__file__).parent}, commit {git['commit'] or 'unknown'}"
        + (" with changes" if git["dirty"] else ""),
        (
            f"planned for {place.world} GPUs, "
            if place.planned
            else f"device: {place.device}, {ranks}, "
        )
        + f"precision {precision}",
        f"model: {info.name}, weights {held}, {info.parameters:,} "
        f"parameters ({trainable:,} trained), activation {info.activation}, image {size}, "
        f"{info.grid[0]} x {info.grid[1]} patches",
        f"pooling: {pooling}",
        *_data_lines(data, plan),
        _plan_line(args, plan, place),
    ]
    if args.config:
        flags = ", ".join("--" + key.replace("_", "-") for key in overrode)
        lines.append(f"recipe: {Path(args.config).name}; overridden by flags: {flags or 'nothing'}")
    return lines


def _data_lines(data: Data, plan: Plan) -> list[str]:
    if data.exact is None:
        passes = f"{plan.samples / data.samples:.2f} epochs"
    else:
        passes = f"{plan.samples / data.exact.reader.manifest.samples:.2f} passes"
    first = f"data: {plan.samples_per_epoch:,} samples in an epoch, {passes}; {data.lines[0]}"
    return [first, *(f"data: {line}" for line in data.lines[1:])]


def level_of(line: str, place: Place) -> int:
    """Return the level at which a line of the banner is logged: damaged shards are a warning.

    Every rank has the banner, and one that is not the first shows warnings: it is told once.
    """
    broken = line.startswith(tuple(f"data: {kind}: " for kind in NOT_WHOLE))
    return logging.WARNING if broken and place.first else logging.INFO


def _plan_line(args: TrainArgs, plan: Plan, place: Place) -> str:
    pieces = f" x {args.accum_freq} pieces" if args.accum_freq > 1 else ""
    minutes = args.save_every_minutes
    clock = f" and {minutes:g} minutes" if minutes else ""
    return (
        f"plan: {plan.steps:,} steps of {plan.global_batch} samples ({args.batch_size} per rank x "
        f"{place.world}{pieces}) = {plan.samples:,} samples seen; warm-up {plan.warmup} steps "
        f"({100 * plan.warmup / plan.steps:.1f} %); lr {args.lr:g}, weight decay {args.wd:g}; "
        f"checkpoint every {plan.save_every} steps{clock}"
    )
