"""The demo's models, the commands that train and score them, and where each figure is read.

Not here: running of the commands (`jobs`), the order of things (`run`).
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .jobs import ROOT, Job
from .table import CENTRE, CHANCE, HALF, LAST, MAJORITY, TOKEN, UNTRAINED, Figure, painted
from .world import PER_SHARD, Sizes

MODEL = "LaSt-ViT-nano"
BATCH, EPOCHS = 128, 2
KINDS = ("cls", "cls-own", "pib", "pib-text", "seg-one", "seg-two", "look")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model of the table.

    Attributes:
        name: in paths.
        label: of its row.
        pooling: its pooling flags.
        trained: False for random weights.
        kinds: of scoring commands it is run through.
        patches_of: another arm with the same patch features, whose figures stand for the kinds
            left out; empty where those stay empty.
    """

    name: str
    label: str
    pooling: tuple[str, ...]
    trained: bool = True
    kinds: tuple[str, ...] = KINDS
    patches_of: str = ""


def _last(k: int) -> tuple[str, ...]:
    return ("--last-pooling", "last", "--last-k", str(k))


ARMS = (
    Arm("token", TOKEN, ("--last-pooling", "token")),
    Arm("last", LAST, _last(1)),
)
EXTRA = (
    Arm("last-k8", "last K=8 (N/8)", _last(8)),
    Arm("last-k32", HALF, _last(32)),
    Arm("mean", "mean", ("--last-pooling", "mean")),
    Arm("max", "max", ("--last-pooling", "max")),
)
BLANK = (
    Arm(
        "untrained-token",
        UNTRAINED[TOKEN],
        ("--last-pooling", "token"),
        trained=False,
        kinds=("cls", "pib", "pib-text", "seg-one", "seg-two", "look"),
    ),
    # With the same random weights the patches are the same; only the global feature differs.
    Arm(
        "untrained-last",
        UNTRAINED[LAST],
        _last(1),
        trained=False,
        kinds=("cls", "pib", "look"),
        patches_of="untrained-token",
    ),
)


class Places:
    """Where things lie, relative to the checkout, so that commands can be typed again."""

    def __init__(self, output: Path) -> None:
        """Take the demo's folder."""
        self.output = output
        self.world = output / "world"
        self.logs = output / "logs"

    def text(self, *parts: str) -> str:
        """Return a path below the demo's folder as a word of a command."""
        return str(self.output.joinpath(*parts))

    def results(self, arm: Arm, job: str) -> Path:
        """Return the folder of one arm's results of one kind."""
        return self.output / "results" / arm.name / job


def training_job(arm: Arm, places: Places, seed: int, sizes: Sizes) -> Job:
    """Return the training of one arm: the same pictures, steps and seed for all."""
    steps = sizes.train * EPOCHS // BATCH
    shards = -(-sizes.train // PER_SHARD) - 1
    words = (
        "--model", MODEL, *arm.pooling,
        "--train-data", places.text("world", "train", f"{{00000..{shards:05d}}}.tar"),
        "--train-num-samples", str(sizes.train), "--epochs", str(EPOCHS),
        "--batch-size", str(BATCH), "--lr", "1e-3", "--beta1", "0.9", "--beta2", "0.98",
        "--wd", "0.1", "--warmup", str(max(1, steps // 10)), "--grad-clip-norm", "1.0",
        "--seed", str(seed), "--workers", "0", "--threads", "1", "--no-augment",
        "--precision", "fp32", "--device", "cpu",
        "--logs", places.text("logs"), "--name", arm.name, "--report-to", "none",
        "--log-every-n-steps", "5",
        "--val-data", places.text("world", "test-decorrelated"), "--val-num-samples", "300",
        "--classes", places.text("world", "classes.txt"),
        "--templates", places.text("world", "templates.txt"),
        "--probe-every", str(max(1, steps // 5)),
    )  # fmt: skip
    return Job(
        title=f"train {arm.label}",
        module="training.main",
        words=words,
        log=places.output / "printed" / f"train-{arm.name}.log",
        metrics=places.logs / arm.name / "metrics.jsonl",
    )


def scoring_jobs(arm: Arm, places: Places, seed: int) -> dict[str, Job]:
    """Return the commands that score one arm, by kind, in the order of its `kinds`."""
    if arm.trained:
        model: tuple[str, ...] = ("--model", places.text("logs", arm.name, "model"))
    else:
        model = ("--model", MODEL, "--random-weights", "--seed", str(seed), *arm.pooling)
    model = (*model, "--device", "cpu", "--precision", "fp32", "--threads", "1")
    texts = (
        "--classes", places.text("world", "classes.txt"),
        "--templates", places.text("world", "templates.txt"),
    )  # fmt: skip
    plain: tuple[str, ...] = ("--val-data", places.text("world", "test-decorrelated"))
    own = ("--val-data", places.text("world", "test-correlated"))
    root: tuple[str, ...] = ("--data-root", places.text("world", "seg"))

    def segmentation(file: str, kind: str) -> tuple[str, ...]:
        masks = str(places.results(arm, kind) / "masks")
        protocol = places.text("world", file)
        return ("--dataset", protocol, *root, "--overlays", "0", "--save-predictions", masks)

    kinds: dict[str, tuple[str, str, tuple[str, ...]]] = {
        "cls": ("top-1", "eval.zeroshot_cls", (*plain, *texts)),
        "cls-own": ("top-1 own", "eval.zeroshot_cls", (*own, *texts)),
        "pib": ("PiB", "eval.point_in_box", (*plain, "--q", "own", "--no-untrained")),
        "pib-text": (
            "PiB text",
            "eval.point_in_box",
            (*plain, "--q", "text", "--no-untrained", *texts),
        ),
        "seg-two": ("mIoU 2", "eval.zeroshot_seg", segmentation("protocol.yaml", "seg-two")),
        "seg-one": ("mIoU 1", "eval.zeroshot_seg", segmentation("protocol-one.yaml", "seg-one")),
        "look": ("maps", "demo.look", ("--world", places.text("world"))),
    }
    return {
        kind: Job(
            title=f"score {arm.label}: {title}",
            module=module,
            words=(*words, *model, "--output", str(places.results(arm, kind))),
            log=places.output / "printed" / f"{arm.name}-{kind}.log",
        )
        for kind in arm.kinds
        for title, module, words in [kinds[kind]]
    }


# Column of the table -> (kind of job, keys in its results.json).
SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "top1": ("cls", ("top1",)),
    "top1_own": ("cls-own", ("top1",)),
    "pib": ("pib", ("pib",)),
    "pib_text": ("pib-text", ("pib",)),
    "miou_one": ("seg-one", ("miou",)),
    "miou_two": ("seg-two", ("miou",)),
    "auroc": ("look", ("one", "auroc")),
    "votes": ("look", ("one", "votes")),
}


def _read(places: Places, arm: Arm, kind: str, *keys: str) -> float | None:
    file = ROOT / places.results(arm, kind) / "results.json"
    found: Any = json.loads(file.read_text(encoding="utf-8"))
    for key in keys:
        found = found[key]
    return None if found is None else float(found)


def collect(
    arms: Sequence[Arm], places: Places, jobs: dict[str, dict[str, Job]], majority: float
) -> list[Figure]:
    """Read every figure of the table out of the commands' results."""
    figures = []

    by_name = {arm.name: arm for arm in arms}

    def add(row: str, column: str, arm: Arm, kind: str, *keys: str) -> None:
        arm = arm if kind in arm.kinds else by_name.get(arm.patches_of, arm)
        if kind not in arm.kinds:
            return
        command = jobs[arm.name][kind].command
        figures.append(Figure(row, column, _read(places, arm, kind, *keys), command))

    for arm in arms:
        for column, (kind, keys) in SOURCES.items():
            add(arm.label, column, arm, kind, *keys)
    for arm in arms:
        if arm.trained:
            add(painted(arm.label), "miou_one", arm, "look", "one", "painted")
            add(painted(arm.label), "miou_two", arm, "look", "two", "painted")
    first = arms[0]
    add(CHANCE, "top1", first, "cls", "chance")
    add(CHANCE, "top1_own", first, "cls-own", "chance")
    add(CHANCE, "pib", first, "pib", "chance")
    add(CHANCE, "pib_text", first, "pib-text", "chance")
    add(CHANCE, "miou_one", first, "look", "one", "guess")
    add(CHANCE, "miou_two", first, "look", "two", "guess")
    figures.append(Figure(CHANCE, "auroc", 0.5, "by definition"))
    add(CHANCE, "votes", first, "look", "one", "object_patches")
    world_command = "world.json of the demo: share of the most frequent class"
    figures.append(Figure(MAJORITY, "top1", majority, world_command))
    add(CENTRE, "pib", first, "pib", "centre")
    add(CENTRE, "pib_text", first, "pib-text", "centre")
    return figures
