"""Flags and recipes to one frozen `TrainArgs`.

A flag is one field below, with its help and unit. Order: defaults < recipe (`--config`) < flags.
Not here: checks that need files or the model (`preflight`).
"""

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lazyclip.base.config import read_yaml
from lazyclip.base.errors import UserError, nearest
from lazyclip.base.resources import config_file
from lazyclip.poolflags import POOL_FLAGS

from .foreign import FOREIGN, FOREIGN_VALUES

# What belongs to one call.
NOT_IN_RECIPES = ("config", "dry_run", "gpus", "gpu", "mfu")
EXAMPLE = (
    "python -m training.main --model LaSt-ViT-B-16 --pretrained openai "
    '--train-data "laion/{00000..00099}.tar"'
)


def _flag(group: str, text: str, default: Any = None, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "help": text, **more})


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """The settings of a run; one field is one flag, spelt with dashes.

    `last_*` stay text here: the pooling's own table reads them (`lazyclip.poolflags`).
    """

    train_data: str | None = _flag(
        "data", "shards: a path, braces, a glob, a folder; sources joined by ::"
    )
    train_num_samples: int | None = _flag(
        "data", "samples in an epoch (default: counted from the shards)"
    )
    dataset_type: str = _flag(
        "data",
        "webdataset, the one form that is read",
        "webdataset",
        choices=("webdataset", "auto"),
    )
    loader: str = _flag(
        "data", "exact (each sample once in a pass, resumable) or sequential (streams)", "exact",
        choices=("exact", "sequential"),
    )  # fmt: skip
    manifest: str | None = _flag("data", "file of the shards' index (default: beside the shards)")
    lanes: int | None = _flag(
        "data", "streams the data are cut into (default: up to 384, what --window-memory allows)"
    )
    window: int | None = _flag(
        "data", "chunks a lane shuffles together (default: 8, or what --window-memory allows)"
    )
    window_memory: float = _flag(
        "data", "GiB that the windows of a rank and its processes take", 4.0
    )
    filter: tuple[str, ...] = _flag(
        "data", "condition on the json or parquet, such as similarity>=0.3; may come again", ()
    )
    train_data_upsampling_factors: str | None = _flag(
        "data", "such as 2::1: how often each source counts in a pass"
    )
    dataset_resampled: bool = _flag(
        "data", "draw shards with replacement (sequential loader)", False
    )
    allow_pipe: bool = _flag(
        "data", "run the shell commands of pipe: sources (sequential loader)", False
    )
    val_data: str | None = _flag("data", "shards with classes, for zero-shot top-1 while training")
    val_num_samples: int | None = _flag("data", "images of --val-data to score (default: all)")
    classes: str | None = _flag("data", "class names of --val-data: a file or a comma list")
    templates: str = _flag(
        "data", "prompts: openai, simple, plain, or a file of {} lines", "openai"
    )
    workers: int = _flag("data", "loader processes per rank; 0 loads in the trainer", 4)
    max_bad_fraction: float = _flag("data", "share of bad samples at which the run stops", 0.01)
    augment: bool = _flag("data", "random resized crop", True)
    model: str = _flag("model", "a model name, or a saved model's folder", "LaSt-ViT-B-16")
    pretrained: str | None = _flag("model", "a tag, a weight file, or a saved model's folder")
    force_image_size: int | None = _flag("model", "another input size, pixels")
    force_quick_gelu: bool = _flag("model", "ask for QuickGELU", False)
    lock_image: bool = _flag("model", "freeze the image tower", False)
    lock_image_unlocked_groups: int = _flag("model", "layer groups at its end left trainable", 0)
    lock_text: bool = _flag("model", "freeze the text tower", False)
    grad_checkpointing: bool = _flag("model", "trade time for memory", False)
    fsdp: bool = _flag(
        "model", "spread weights, gradients and optimiser over the ranks (FSDP2)", False, off=True
    )
    torchcompile: bool = _flag("model", "compile the towers with torch.compile", False)
    batch_size: int = _flag("optimisation", "samples per GPU (rank) and step", 64)
    global_batch: int | None = _flag(
        "optimisation", "samples per step, all ranks together, in place of --batch-size"
    )
    accum_freq: int = _flag("optimisation", "such batches in one step, as one large batch", 1)
    epochs: int = _flag("optimisation", "passes of --train-num-samples", 32)
    lr: float = _flag("optimisation", "peak learning rate", 5e-4)
    lr_image: float | None = _flag("optimisation", "that of the image tower (default: --lr)")
    lr_text: float | None = _flag("optimisation", "that of the text tower (default: --lr)")
    layer_decay: float = _flag(
        "optimisation", "factor on the image tower's rate for each layer below its end", 1.0
    )
    layer_decay_text: float = _flag("optimisation", "the same for the text tower", 1.0)
    beta1: float = _flag("optimisation", "Adam beta 1", 0.9)
    beta2: float = _flag("optimisation", "Adam beta 2, the same for every model", 0.98)
    eps: float = _flag("optimisation", "Adam epsilon, the same for every model", 1e-6)
    wd: float = _flag("optimisation", "weight decay, on matrices only", 0.2)
    warmup: int | None = _flag(
        "optimisation", "warm-up steps (default: a tenth of the run, at most 1000)"
    )
    grad_clip_norm: float | None = _flag("optimisation", "largest gradient norm (default: off)")
    precision: str | None = _flag(
        "optimisation", "amp_bf16 or fp32 (default: amp_bf16 on CUDA, fp32 on CPU)",
        choices=("amp_bf16", "fp32"),
    )  # fmt: skip
    max_nonfinite: int = _flag(
        "optimisation", "steps in 100 that may be skipped as not finite before going back", 10
    )
    local_loss: bool = _flag("optimisation", "accepted: always done", False)
    gather_with_grad: bool = _flag("optimisation", "accepted: always done", False)
    seed: int = _flag("run", "of weights, order and augmentation", 0)
    logs: str = _flag(
        "run", "folder that holds the runs (under torchrun: -m -- training.main)", "./logs"
    )
    name: str | None = _flag("run", "of the run (default: model and start time)")
    save_every: int | None = _flag("run", "steps between checkpoints (default: one epoch)")
    save_every_minutes: float | None = _flag(
        "run",
        "minutes between further checkpoints; the square root of 2 x the time of a save x the time "
        "between interruptions loses least: 15 for 30 s and 4 h; 0: none",
        15.0,
    )
    keep: int = _flag(
        "run", "newest checkpoints kept, beside the first of each 10,000 steps; 0 keeps all", 3
    )
    resume: str | None = _flag(
        "run", "latest (of --name), a run's folder, or a checkpoint's folder"
    )
    audit: str | None = _flag(
        "run", "write a digest of each step's samples; `ids`: the samples too",
        choices=("digest", "ids"), bare="digest",
    )  # fmt: skip
    watchdog_minutes: float = _flag(
        "run", "minutes without a step until a hung run is ended; 0: never", 10.0
    )
    log_every_n_steps: int = _flag("run", "steps between log lines", 10)
    probe_every: int | None = _flag(
        "run", "steps between zero-shot scores, with --val-data (default: one epoch)"
    )
    max_top1_drop: float | None = _flag(
        "run", "share by which zero-shot top-1 may fall below the run's best before the run is "
        "ended, such as 0.05 (default: a fall of 0.05 is only said)"
    )  # fmt: skip
    report_to: str = _flag(
        "run", "tensorboard, none, or auto (tensorboard where installed)", "auto",
        choices=("auto", "tensorboard", "none"),
    )  # fmt: skip
    device: str | None = _flag("run", "cuda or cpu (default: cuda where there is one)")
    threads: int | None = _flag("run", "CPU threads per rank (default: torch's choice)")
    dry_run: str | None = _flag(
        "run", "print the plan and what it costs, and end; with FILE.json: into it as well",
        bare="print",
    )  # fmt: skip
    gpus: int | None = _flag(
        "run", "plan for so many GPUs elsewhere (--dry-run): no weights are read, data if named"
    )
    gpu: str | None = _flag(
        "run", "the GPU that --dry-run reckons with (default: a100)", choices=("a100", "h100")
    )
    mfu: float | None = _flag("run", "share of its peak that --dry-run reckons with (default: 0.3)")
    config: str | None = _flag("run", "a recipe: a YAML file or a name in configs/recipes")
    last_pooling: str | None = _flag("pooling", "")
    last_k: str | None = _flag("pooling", "")
    last_score: str | None = _flag("pooling", "")
    last_sigma: str | None = _flag("pooling", "")
    last_kernel: str | None = _flag("pooling", "")
    last_eps: str | None = _flag("pooling", "")


class Parsed(NamedTuple):
    """The settings; which keys of the recipe a flag overrode; what recipe and flags gave."""

    args: TrainArgs
    overrode: tuple[str, ...]
    given: dict[str, object]


class _Parser(argparse.ArgumentParser):
    """argparse with errors as `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; an example: {EXAMPLE}")


def _fields() -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(TrainArgs)}


def _value_type(field: dataclasses.Field[Any]) -> type:
    text = str(field.type)
    for kind in (int, float, str):
        if f"'{kind.__name__}'" in text or text.startswith(kind.__name__):
            return kind
    return str


def make_parser() -> argparse.ArgumentParser:
    """Make the parser: a flag for each field of `TrainArgs`, none with a default of its own."""
    parser = _Parser(
        prog="training.main",
        description="Train a CLIP model from shards.",
        allow_abbrev=False,
        epilog=f"Example: {EXAMPLE}",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    pool_help = {f"last_{row.field}": row.help for row in POOL_FLAGS}
    for name, field in _fields().items():
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        text = pool_help.get(name, field.metadata["help"])
        shown = "" if field.default in (None, False, True) else f" (default: {field.default})"
        flag = "--" + name.replace("_", "-")
        if isinstance(field.default, bool):
            action: Any = "store_true"
            if field.default or "off" in field.metadata:
                action = argparse.BooleanOptionalAction
            groups[group].add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
            continue
        more: dict[str, Any] = {}
        if field.default == ():
            more, shown = {"action": "append"}, ""
        elif "bare" in field.metadata:
            more = {"nargs": "?", "const": field.metadata["bare"]}
        groups[group].add_argument(
            flag,
            type=_value_type(field),
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%") + shown,
            **more,
        )
    return parser


def _refuse_unknown(words: Sequence[str]) -> None:
    flags = ["--" + name.replace("_", "-") for name in _fields()]
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"'{word}' belongs to no flag; quote patterns and lists")
        plain = word.split("=")[0].removeprefix("--")
        if plain in FOREIGN:
            raise UserError(f"--{plain} is open_clip's: {FOREIGN[plain]}")
        close = difflib.get_close_matches(f"--{plain}", flags, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(close)}" if close else "see --help"
        raise UserError(f"unknown flag --{plain}; {hint}")


def _recipe_file(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    return config_file("recipes", name, ".yaml", "recipe")


def _check_value(key: str, value: object, where: Path) -> object:
    """Check a recipe's value against its field's type; a whole number may stand for a float."""
    field = _fields()[key]
    if field.default == ():
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{where}: {key} is {value!r}; expected a list of texts")
        return tuple(words)
    kind = bool if isinstance(field.default, bool) else _value_type(field)
    if kind is str and key.startswith("last_"):
        return str(value)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if kind is float and type(value) is str:
        # YAML reads 5e-4 (no dot) as text.
        try:
            return float(value)
        except ValueError:
            fits = False
    if not fits:
        raise UserError(f"{where}: {key} is {value!r}; expected {kind.__name__}")
    return float(value) if kind is float else value  # type: ignore[arg-type]


def read_recipe(name: str, nested: bool = False) -> dict[str, object]:
    """Read a recipe: a flat YAML of flags; `base: FILE` puts another one below it (one level).

    Args:
        name: a YAML file, or the name of one in `configs/recipes`.
        nested: read as somebody's base.

    Raises:
        UserError: an unknown key (nearest first), a value of another type, a base's base.
    """
    file = _recipe_file(name)
    values: dict[str, object] = {}
    for key, value in read_yaml(file).items():
        plain = key.replace("-", "_")
        if plain == "base":
            if nested:
                raise UserError(f"{file}: a base cannot have a base; one level only")
            base = str(value)
            below = file.parent / base
            values = {**read_recipe(str(below) if below.is_file() else base, True), **values}
            continue
        if plain not in _fields() or plain in NOT_IN_RECIPES:
            raise UserError(f"{file}: unknown key '{key}'; {nearest(plain, _fields())}")
        values[plain] = _check_value(plain, value, file)
    return values


def parse(argv: Sequence[str] | None) -> Parsed:
    """Read the flags, and below them the recipe of `--config`.

    Raises:
        UserError: an unknown flag (open_clip's are answered by name), a value that does not read.
    """
    given, rest = make_parser().parse_known_args(argv)
    if rest:
        _refuse_unknown(rest)
    flags = vars(given)
    if "filter" in flags:
        flags["filter"] = tuple(flags["filter"])
    recipe = read_recipe(str(flags["config"])) if "config" in flags else {}
    overrode = tuple(k for k in recipe if k in flags and flags[k] != recipe[k])
    merged = {**recipe, **flags}
    args = TrainArgs(**merged)
    check_ranges(args)
    return Parsed(args, overrode, merged)


def _check_choices(args: TrainArgs) -> None:
    for key, field in _fields().items():
        choices, value = field.metadata.get("choices"), getattr(args, key)
        if not choices or value is None:
            continue
        for word in str(value).split(",") if key == "report_to" else [str(value)]:
            flag = f"--{key.replace('_', '-')} {word}"
            if (key, word) in FOREIGN_VALUES:
                raise UserError(f"{flag} is open_clip's: {FOREIGN_VALUES[key, word]}")
            if word not in choices:
                raise UserError(f"{flag} is not known; {nearest(word, choices)}")


def check_ranges(args: TrainArgs) -> None:
    """Check each setting by itself; raises `UserError` with the flag and what it takes."""
    _check_choices(args)
    least = {
        "gpus": 1, "batch_size": 1, "global_batch": 1, "epochs": 1, "workers": 0, "save_every": 1,
        "log_every_n_steps": 1, "probe_every": 1, "warmup": 0, "train_num_samples": 1,
        "val_num_samples": 1, "threads": 1, "force_image_size": 1, "lr": 0.0,
        "lr_image": 0.0, "lr_text": 0.0, "wd": 0.0, "eps": 0.0, "max_bad_fraction": 0.0,
        "lock_image_unlocked_groups": 0, "grad_clip_norm": 0.0, "lanes": 1, "accum_freq": 1,
        "window": 1, "window_memory": 0.0,
        "keep": 0, "save_every_minutes": 0.0, "watchdog_minutes": 0.0, "max_nonfinite": 1,
    }  # fmt: skip
    for key, low in least.items():
        value = getattr(args, key)
        if value is not None and not value >= low:
            raise UserError(f"--{key.replace('_', '-')} {value} is too small; use {low} or more")
    for key in ("layer_decay", "layer_decay_text"):
        if not 0 <= getattr(args, key) <= 1:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(args, key):g} is outside 0..1 (1: off)")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)} is outside 0..1 (1 excluded)")
    if args.max_top1_drop is not None and not 0 < args.max_top1_drop <= 1:
        raise UserError(
            f"--max-top1-drop {args.max_top1_drop:g} is no share above 0; 0.05 means 5 points"
        )
    if args.max_bad_fraction > 1:
        raise UserError(f"--max-bad-fraction {args.max_bad_fraction} is a share; use 0..1")
    if args.fsdp and args.torchcompile:
        raise UserError("--fsdp with --torchcompile is not offered; drop one of the two")
    if args.lock_image and args.lock_text:
        raise UserError("--lock-image and --lock-text together leave nothing to train; drop one")
