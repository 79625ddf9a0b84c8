"""The demonstration from end to end: make the world, train, score, show.

    make demo SEED=0        (python -m demo.run --seed 0; add --full for four more trainings)

Every figure comes from a command that anyone can type; each stands beside its figure in
out/demo/table.csv. Not here: the world (`world`), the commands (`commands`), the page (`page`).
"""

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lazyclip.base.config import write_json
from lazyclip.base.errors import UserError, cli
from lazyclip.base.record import make_record

from . import page, table
from .commands import (
    ARMS,
    BATCH,
    BLANK,
    EPOCHS,
    EXTRA,
    MODEL,
    Places,
    collect,
    scoring_jobs,
    training_job,
)
from .jobs import LANES, ROOT, JobError, run_jobs
from .world import Sizes, make_world

MARKER = ".lazyclip-demo"  # a folder without it is never deleted
OUTPUT = Path("out") / "demo"


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


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.run", description="Make a small world, train on it, show what differs."
    )
    parser.add_argument("--seed", type=int, default=0, help="of the world and the weights (0)")
    parser.add_argument("--full", action="store_true", help="four more poolings, thrice the time")
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
