"""Score zero-shot segmentation: benchmarks, one model, one command.

    python -m eval.zeroshot_seg --dataset voc20 --model ViT-B-16-quickgelu --pretrained openai \
        --data-root data
    torchrun --nproc_per_node 8 -m eval.zeroshot_seg --dataset all ...

Not here: the steps from picture to score (`segmentation`), and the collecting of results (`table`).
"""

import argparse
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lazyclip.base.errors import UserError, cli
from lazyclip.base.logs import setup
from lazyclip.base.resources import config_names
from lazyclip.dense import METHODS, refuse_method

from .commandline import RESULTS, Parser, add_output_flags, check_output
from .models import add_model_flags, load_from_flags
from .ranks import find_ranks, own_device, process_group
from .seg_run import MODULE, run_job
from .segflags import add_engine_flags, add_protocol_flags, check_numbers, protocol_overrides
from .segmentation.check import check_dataset
from .segmentation.job import Job
from .segmentation.loading import Broken
from .segmentation.prepare import Wanted, prepare
from .segmentation.protocol import Task, read_task
from .segmentation.readers import NotHereError

log = logging.getLogger(__name__)

EXAMPLE = (
    f"python -m {MODULE} --dataset voc20 --model ViT-B-16-quickgelu --pretrained openai "
    "--data-root data"
)
ALL = "all"
LISTED = 10  # broken pictures named in the last line; results.json names all


def make_parser() -> Parser:
    """Make the parser of this command."""
    parser = Parser(EXAMPLE, "Score zero-shot segmentation of benchmarks with one model.")
    known = ", ".join(config_names("protocols", ".yaml"))
    data = parser.add_argument_group("task")
    data.add_argument(
        "--dataset", help=f"{known}; a comma list; {ALL}; or the path of such a YAML file"
    )
    data.add_argument(
        "--data-root",
        type=Path,
        default=Path(os.environ.get("LAZYCLIP_DATA", "data")),
        help="folder that holds the benchmark's own folder, or is it ($LAZYCLIP_DATA or ./data)",
    )
    data.add_argument("--split", help="another list of images than the data set's own")
    data.add_argument("--limit", type=int, help="score the first N images only (not comparable)")
    data.add_argument("--classes", help="another class file of the same length (changes the hash)")
    data.add_argument("--check", action="store_true", help="examine the data set, score nothing")
    data.add_argument("--max-bad", type=int, default=0, help="images that may be left unscored (0)")
    out = parser.add_argument_group("results")
    add_output_flags(out, "logs/seg/DATASET-MODEL-WEIGHTS")
    out.add_argument("--resume", action="store_true", help="continue an interrupted evaluation")
    out.add_argument(
        "--save-predictions", type=Path, metavar="DIR", help="write DIR/ID.png of class ids"
    )
    out.add_argument("--overlays", type=int, default=4, help="coloured pictures to write (4)")
    add_protocol_flags(parser)
    add_engine_flags(parser)
    add_model_flags(parser)
    return parser


def _short_name(place: str) -> str:
    """Shorten a model name, tag or path to a word: `logs/NAME/model` becomes `NAME`."""
    parts = [part for part in Path(place).parts if part not in ("model", "checkpoints", "/")]
    return re.sub(r"[^\w.-]+", "-", parts[-1].removesuffix(".safetensors") if parts else "model")


def default_output(args: argparse.Namespace, task: Task) -> Path:
    """Name the results folder after data set, model, weights, and what is not the default."""
    weights = f"random{args.seed}" if args.random_weights else _short_name(args.pretrained or "")
    changed = protocol_overrides(args) or args.classes
    words = [
        task.benchmark.dataset,
        _short_name(args.model),
        weights if args.random_weights or args.pretrained else "",
        args.protocol or "",
        task.protocol.hash if changed else "",
        args.split or "",
        args.method if args.method != "vanilla" else "",
        f"first{args.limit}" if args.limit else "",
    ]
    return Path("logs") / "seg" / "-".join(word for word in words if word)


def dataset_names(spec: str | None) -> list[str]:
    """Split `--dataset` into names: one, a comma list, or all that ship."""
    shipped = config_names("protocols", ".yaml")
    if not spec:
        raise UserError(
            f"no data set is named; pass --dataset ({', '.join(shipped)}, {ALL}), such as: "
            f"{EXAMPLE}"
        )
    names = [word.strip() for word in spec.split(",") if word.strip()]
    if names == [ALL]:
        return list(shipped)
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"--dataset names {', '.join(sorted(twice))} twice; name each once")
    return names


def read_tasks(args: argparse.Namespace) -> list[Task]:
    """Read the tasks that the flags name."""
    overrides = protocol_overrides(args)
    if args.classes:
        overrides["classes"] = args.classes
    return [
        read_task(name, args.protocol, args.split, overrides or None)
        for name in dataset_names(args.dataset)
    ]


def prepare_jobs(args: argparse.Namespace) -> list[Job]:
    """Check all that can be checked without the model, for every data set.

    Raises:
        UserError: whatever of data set, protocol, method, files or output does not fit.
    """
    tasks = read_tasks(args)
    check_numbers(args, limit=1, overlays=0, max_bad=0)
    if "," in args.method:
        raise UserError(f"--method {args.method} names several; give one, and run once for each")
    METHODS[args.method]  # an unknown name raises
    jobs = []
    for task in tasks:
        output = args.output or default_output(args, task)
        predictions = args.save_predictions
        if len(tasks) > 1:
            output = args.output / task.benchmark.dataset if args.output else output
            predictions = predictions / task.benchmark.dataset if predictions else None
        check_output(output, args.overwrite or args.resume)
        wanted = Wanted(
            data_root=args.data_root,
            output=output,
            limit=args.limit,
            predictions=predictions,
            overlays=args.overlays,
            overwrite=args.overwrite,
            resume=args.resume,
            max_bad=args.max_bad,
        )
        try:
            jobs.append(prepare(task, wanted))
        except NotHereError as error:
            others = [t.benchmark.dataset for t in tasks if t is not task]
            without = f", or leave it out: --dataset {','.join(others)}" if others else ""
            raise UserError(
                f"{task.benchmark.dataset}: {error}; --check says what to fetch{without}"
            ) from None
    return jobs


def check(args: argparse.Namespace) -> None:
    """Examine data sets and print one line a fault.

    Raises:
        UserError: faults were found.
    """
    faults = 0
    for task in read_tasks(args):
        found = check_dataset(task, args.data_root)
        for line in found:
            print(f"{task.benchmark.dataset}: {line}")
        if not found:
            print(f"{task.benchmark.dataset}: no fault found in split {task.benchmark.split}")
        faults += len(found)
    if faults:
        lines = "1 line" if faults == 1 else f"{faults} lines"
        raise UserError(f"--data-root {args.data_root} is not as it should be: {lines} above")


def _refuse_bad(broken: Sequence[Broken], total: int, most: int) -> None:
    if len(broken) <= most:
        return
    listed = "; ".join(one.reason for one in broken[:LISTED])
    more = f"; and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
    raise UserError(
        f"{len(broken)} of {total} images could not be scored (--max-bad {most}): {listed}{more}; "
        f"the results of the others are written, {RESULTS} lists all; mend them and add --resume"
    )


def run(argv: Sequence[str] | None = None) -> None:
    """Score zero-shot segmentation."""
    args = make_parser().read(argv)
    ranks = find_ranks()
    setup()
    if not ranks.first:
        logging.getLogger().setLevel(logging.WARNING)
    if args.check:
        check(args)
        return
    jobs = prepare_jobs(args)
    args.device = own_device(ranks, args.device)
    built = load_from_flags(args)
    refuse_method(built.model, args.method)
    if args.random_weights:
        log.warning("random weights: the scores will say nothing about a trained model")
    broken: list[Broken] = []
    said: list[str] = []
    with process_group(ranks):
        for job in jobs:
            bad, line = run_job(job, built, argv, args, ranks)
            broken += bad
            said.append(line)
    if len(jobs) > 1 and ranks.first:
        print("\n" + "\n".join(said))
    _refuse_bad(broken, sum(len(job.names) for job in jobs), args.max_bad)


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
