"""The demonstration from end to end: make the world, train, score, show.

    make demo SEED=0        (python -m demo.run --seed 0; add --full for four more trainings)

Every figure comes from a command that anyone can type; each stands beside its figure in
out/demo/table.csv. Not here: the world (`world`), the page (`page`).
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lazyclip.base.config import write_json
from lazyclip.base.errors import UserError, cli
from lazyclip.base.record import make_record

from . import page, table
from .jobs import LANES, ROOT, Job, JobError, run_jobs
from .table import CENTRE, CHANCE, HALF, LAST, MAJORITY, TOKEN, UNTRAINED, Figure, painted
from .world import Sizes, make_world

MODEL = "LaSt-ViT-nano"
MARKER = ".lazyclip-demo"  # a folder without it is never deleted
OUTPUT = Path("out") / "demo"
BATCH, EPOCHS = 128, 2


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model of the table: its name in paths, its row, its pooling flags, whether trained."""

    name: str
    label: str
    pooling: tuple[str, ...]
    trained: bool = True


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
    Arm("untrained-token", UNTRAINED[TOKEN], ("--last-pooling", "token"), trained=False),
    Arm("untrained-last", UNTRAINED[LAST], _last(1), trained=False),
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


def prepare_folder(folder: Path) -> None:
    """Empty the demo's own folder, or make it.

    Raises:
        UserError: something else lies there.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is no plain folder; move it away, or pass --output FOLDER")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise UserError(
            f"{folder} was not made by the demo (it holds no {MARKER}) and is not deleted; "
            "move it away, or pass --output FOLDER"
        )
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("made by demo.run; replaced by its next run\n", encoding="utf-8")


def training_job(arm: Arm, places: Places, seed: int, sizes: Sizes) -> Job:
    """Return the training of one arm: the same pictures, steps and seed for all."""
    steps = sizes.train * EPOCHS // BATCH
    shards = -(-sizes.train // 800) - 1
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
    """Return the commands that score one arm, by kind."""
    if arm.trained:
        model = ("--model", places.text("logs", arm.name, "model"))
    else:
        model = ("--model", MODEL, "--random-weights", "--seed", str(seed), *arm.pooling)
    model = (*model, "--device", "cpu", "--precision", "fp32", "--threads", "1")
    texts = (
        "--classes", places.text("world", "classes.txt"),
        "--templates", places.text("world", "templates.txt"),
    )  # fmt: skip
    plain = ("--val-data", places.text("world", "test-decorrelated"))
    own = ("--val-data", places.text("world", "test-correlated"))
    root = ("--data-root", places.text("world", "seg"))

    def segmentation(file: str, kind: str) -> tuple[str, ...]:
        masks = str(places.results(arm, kind) / "masks")
        protocol = places.text("world", file)
        return ("--dataset", protocol, *root, "--overlays", "0", "--save-predictions", masks)

    kinds: dict[str, tuple[str, str, tuple[str, ...]]] = {
        "cls": ("top-1", "eval.zeroshot_cls", (*plain, *texts)),
        "cls-own": ("top-1 own", "eval.zeroshot_cls", (*own, *texts)),
        "pib": ("PiB", "eval.point_in_box", (*plain, "--q", "own")),
        "pib-text": ("PiB text", "eval.point_in_box", (*plain, "--q", "text", *texts)),
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
        for kind, (title, module, words) in kinds.items()
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

    def add(row: str, column: str, arm: Arm, kind: str, *keys: str) -> None:
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


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.run", description="Make a small world, train on it, show what differs."
    )
    parser.add_argument("--seed", type=int, default=0, help="of the world and the weights (0)")
    parser.add_argument("--full", action="store_true", help="four more poolings (15 minutes)")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help=f"folder, replaced when it is ours ({OUTPUT})"
    )
    parser.add_argument("--page-only", action="store_true", help="write the page of a run again")
    return parser


def demonstrate(seed: int, full: bool, output: Path, say: Callable[[str], None]) -> None:
    """Run everything below `output` and leave results.json, table.csv and report.html there."""
    start = time.monotonic()
    places, sizes = Places(output), Sizes()
    say("making the world")
    world = make_world(ROOT / places.world, seed, sizes)
    say(f"{sum(dataclasses.asdict(sizes).values())} pictures in {places.world}")
    trained = [*ARMS, *(EXTRA if full else ())]
    arms = [*trained, *BLANK]
    training = {arm.name: training_job(arm, places, seed, sizes) for arm in trained}
    say(f"{len(training)} trainings of {sizes.train * EPOCHS} samples, {LANES} at a time")
    seconds = run_jobs(list(training.values()), say)
    scoring = {arm.name: scoring_jobs(arm, places, seed) for arm in arms}
    queue = [job for jobs in scoring.values() for job in jobs.values()]
    say(f"{len(queue)} scoring commands, {LANES} at a time")
    seconds |= run_jobs(queue, say)
    figures = collect(arms, places, scoring, float(str(world["majority"])))
    config = {
        "seed": seed, "full": full, "model": MODEL, "batch_size": BATCH, "epochs": EPOCHS,
        "sizes": dataclasses.asdict(sizes), "arms": {arm.name: arm.pooling for arm in arms},
    }  # fmt: skip
    argv = ["--seed", str(seed), *(["--full"] if full else [])]
    folder = ROOT / output
    write_json(
        folder / "results.json",
        {
            "seed": seed,
            "full": full,
            "world": world,
            "arms": [{**dataclasses.asdict(arm)} for arm in arms],
            "figures": [dataclasses.asdict(figure) for figure in figures],
            "sentences": table.sentences(figures),
            "training": {name: job.command for name, job in training.items()},
            "seconds": {**seconds, "total": round(time.monotonic() - start, 1)},
            "record": make_record("demo.run", argv, config, device="cpu", dtype="fp32", seed=seed),
        },
    )
    table.write_csv(folder / "table.csv", figures)
    print(table.text_table(figures))
    print("\n" + "\n".join(table.sentences(figures)))


def run(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration."""
    args = make_parser().parse_args(argv)
    start = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - start:4.0f} s] {text}\n")
        sys.stderr.flush()

    output = args.output if args.output.is_absolute() else ROOT / args.output
    if output.is_relative_to(ROOT):
        output = output.relative_to(ROOT)
    if not args.page_only:
        prepare_folder(ROOT / output)
        demonstrate(args.seed, args.full, output, say)
    file = page.write_page(ROOT / output)
    say(f"the page is {file}")


def _main(argv: Sequence[str] | None = None) -> None:
    try:
        run(argv)
    except JobError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None


main = cli(_main)

if __name__ == "__main__":
    raise SystemExit(main())
