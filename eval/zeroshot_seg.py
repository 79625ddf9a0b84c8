"""Score zero-shot segmentation: one benchmark, one model, one command.

    python -m eval.zeroshot_seg --dataset voc20 --model ViT-B-16-quickgelu --pretrained openai \
        --data-root data

Not here: the steps from picture to score (`segmentation`), and the collecting of results.
"""

import argparse
import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lazyclip.base.config import write_json
from lazyclip.base.errors import UserError, cli
from lazyclip.base.logs import Progress, setup
from lazyclip.base.record import make_record, shorten, utc_now
from lazyclip.base.resources import config_names
from lazyclip.dense import METHODS
from lazyclip.factory import Built
from lazyclip.zeroshot import text_features

from .commandline import RESULTS, Parser, add_output_flags, check_output
from .models import add_model_flags, load_from_flags
from .segmentation.confusion import Counts, Scores, score
from .segmentation.engine import cosine_maps
from .segmentation.job import OVERLAYS, Job, evaluate, make_folders, read_pair, spread
from .segmentation.overlays import Legend, read_palette
from .segmentation.protocol import Task, read_task
from .segmentation.readers import READERS, Reader, check_files
from .segmentation.results import class_table, result_parts, summary, write_classes

log = logging.getLogger(__name__)

MODULE = "eval.zeroshot_seg"
EXAMPLE = (
    f"python -m {MODULE} --dataset voc20 --model ViT-B-16-quickgelu --pretrained openai "
    "--data-root data"
)
TEXTS = 256  # encoded in one pass
SAME = 2e-3  # means and deviations of 0..1 closer than this differ by rounding only


def make_parser() -> Parser:
    """Make the parser of this command."""
    parser = Parser(EXAMPLE, "Score zero-shot segmentation of one benchmark with one model.")
    known = ", ".join(config_names("protocols", ".yaml"))
    data = parser.add_argument_group("task")
    data.add_argument("--dataset", help=f"{known}, or the path of such a YAML file")
    data.add_argument(
        "--data-root",
        type=Path,
        default=Path(os.environ.get("LAZYCLIP_DATA", "data")),
        help="folder that holds the benchmark's own folder, or is it ($LAZYCLIP_DATA or ./data)",
    )
    data.add_argument("--protocol", help="how the score is made (default: the data set's first)")
    data.add_argument("--split", help="another list of images than the data set's own")
    data.add_argument("--limit", type=int, help="score the first N images only (not comparable)")
    data.add_argument(
        "--method", default="vanilla", help=f"dense features: {', '.join(METHODS)} (vanilla)"
    )
    data.add_argument("--batch-size", type=int, default=32, help="windows in one pass (32)")
    out = parser.add_argument_group("results")
    add_output_flags(out, "logs/seg/DATASET-MODEL-WEIGHTS")
    out.add_argument(
        "--save-predictions", type=Path, metavar="DIR", help="write DIR/ID.png of class ids"
    )
    out.add_argument("--overlays", type=int, default=4, help="coloured pictures to write (4)")
    add_model_flags(parser)
    return parser


def _short_name(place: str) -> str:
    """Shorten a model name, tag or path to a word: `logs/NAME/model` becomes `NAME`."""
    parts = [part for part in Path(place).parts if part not in ("model", "checkpoints", "/")]
    return re.sub(r"[^\w.-]+", "-", parts[-1].removesuffix(".safetensors") if parts else "model")


def default_output(args: argparse.Namespace, task: Task) -> Path:
    """Name the results folder after data set, model, weights, and what is not the default."""
    weights = f"random{args.seed}" if args.random_weights else _short_name(args.pretrained or "")
    words = [
        task.benchmark.dataset,
        _short_name(args.model),
        weights if args.random_weights or args.pretrained else "",
        args.protocol or "",
        args.split or "",
        args.method if args.method != "vanilla" else "",
        f"first{args.limit}" if args.limit else "",
    ]
    return Path("logs") / "seg" / "-".join(word for word in words if word)


def _check_predictions(args: argparse.Namespace, reader: Reader, names: Sequence[str]) -> None:
    """Refuse a folder whose .png files this run would replace, or be mixed with."""
    folder: Path = args.save_predictions
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save-predictions {folder} is a file; give a folder")
    taken = {reader.label_file(name).parent.resolve() for name in names}
    if folder.resolve() in taken | {(args.output / OVERLAYS).resolve()}:
        raise UserError(
            f"--save-predictions {folder} holds the labels or the overlays; give another folder"
        )
    there = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.png")}
    foreign = sorted(there - set(names))
    if there and (foreign or not args.overwrite):
        first = (foreign or sorted(there))[0]
        raise UserError(
            f"--save-predictions {folder} holds {len(there)} .png already, such as {first}.png; "
            "give an empty folder" + ("" if foreign else ", or --overwrite")
        )


def _check_numbers(args: argparse.Namespace) -> None:
    for flag, value, low in (
        ("--limit", args.limit, 1),
        ("--batch-size", args.batch_size, 1),
        ("--overlays", args.overlays, 0),
    ):
        if value is not None and value < low:
            raise UserError(f"{flag} {value} is too small; use {low} or more")


def prepare(args: argparse.Namespace) -> Job:
    """Check all that can be checked without the model, and gather it.

    Sets `args.output` where it was not given.

    Raises:
        UserError: whatever of data set, protocol, method, files or output does not fit.
    """
    if not args.dataset:
        known = ", ".join(config_names("protocols", ".yaml"))
        raise UserError(f"no data set is named; pass --dataset ({known}), such as: {EXAMPLE}")
    _check_numbers(args)
    METHODS[args.method]  # an unknown name raises
    task = read_task(args.dataset, args.protocol, args.split)
    bench = task.benchmark
    legend = Legend(task.names, read_palette(bench.palette, len(task.names)))
    reader = READERS[bench.layout](args.data_root, bench.folder, bench.split)
    names = reader.ids[: args.limit]
    check_files(reader, names)
    args.output = args.output or default_output(args, task)
    check_output(args.output, args.overwrite)
    if args.save_predictions:
        _check_predictions(args, reader, names)
    read_pair(task, reader, names[0])  # a wrong encoding shows in the first file
    expected = bench.images.get(bench.split)
    if expected not in (None, len(reader.ids)):
        log.warning(
            "%s %s has %d images here, the benchmark %s: scores are not comparable with "
            "published ones", bench.dataset, bench.split, len(reader.ids), expected,
        )  # fmt: skip
    return Job(
        task=task,
        reader=reader,
        names=names,
        expected=expected,
        complete=len(names) == len(reader.ids) and expected in (None, len(names)),
        legend=legend,
        output=args.output,
        predictions=args.save_predictions,
        shown=spread(names, args.overlays),
    )


def _say_differences(built: Built, task: Task) -> None:
    """Log where the protocol treats the model otherwise than its training did."""
    info, protocol = built.info, task.protocol
    own = [*info.mean, *info.std]
    used = [value / 255 for value in (*protocol.mean, *protocol.std)]
    if any(abs(a - b) > SAME for a, b in zip(own, used, strict=True)):
        log.warning(
            "%s was trained with mean %s and std %s; protocol %s normalises every model with its "
            "own", info.name, info.mean, info.std, protocol.name,
        )  # fmt: skip
    if protocol.window and (protocol.window, protocol.window) != info.image_size:
        log.info(
            "windows of %d px are not the model's %d x %d px: its positions are interpolated",
            protocol.window, *info.image_size,
        )  # fmt: skip


def _pooling_words(pooling: Mapping[str, object]) -> str:
    if pooling["pooling"] != "last":
        return str(pooling["pooling"])
    return f"last k {pooling['k']} score {pooling['score']}"


def _encode_queries(built: Built, task: Task) -> Tensor:
    """Encode the prompts of all queries, Q x E, with progress: on a CPU this takes its time."""
    queries, prompts = task.classes.queries, task.templates
    log.info("encoding %d queries x %d templates", len(queries), len(prompts))
    progress = Progress(len(queries), "queries")
    few = max(1, TEXTS // len(prompts))
    parts = []
    for start in range(0, len(queries), few):
        some = queries[start : start + few]
        parts.append(text_features(built.model, built.tokenizer, some, prompts, TEXTS))
        progress.update(len(some))
    return torch.cat(parts)


def score_model(job: Job, built: Built, args: argparse.Namespace) -> Counts:
    """Encode the prompts and segment all images; returns the counts C x C."""
    maps = cosine_maps(
        built.model,
        _encode_queries(built, job.task),
        patch=built.info.patch_size,
        method=args.method,
        device=args.device,
        precision=args.precision,
    )
    make_folders(job)
    return evaluate(job, maps, args.batch_size)


def report(job: Job, built: Built, scores: Scores, args: argparse.Namespace) -> None:
    """Print the scores, and what they must not be taken for."""
    protocol = job.task.protocol
    print("\n".join(class_table(job.task.names, scores)))
    pooling = _pooling_words(built.info.pooling)
    print(summary(protocol, scores, len(job.names), args.method, pooling))
    if not job.complete:
        of = job.expected or len(job.reader.ids)
        print(f"NOT COMPARABLE: {len(job.names)} images scored, split {protocol.split} has {of}")
    if args.random_weights:
        print("RANDOM WEIGHTS: these scores say nothing about a trained model")


def run(argv: Sequence[str] | None = None) -> None:
    """Score zero-shot segmentation."""
    args = make_parser().read(argv)
    setup()
    job = prepare(args)
    built = load_from_flags(args)
    _say_differences(built, job.task)
    if args.random_weights:
        log.warning("random weights: the scores will say nothing about a trained model")
    record = make_record(
        MODULE,
        argv,
        vars(args),
        device=args.device,
        protocol_hash=job.task.protocol.hash,
        images_sha256=hashlib.sha256("\n".join(job.names).encode()).hexdigest(),
    )
    start = time.monotonic()
    confusion = score_model(job, built, args)
    scores = score(confusion)
    record.update(end=utc_now(), seconds=round(time.monotonic() - start, 1))
    model: dict[str, Any] = {**built.info.to_dict(), "random_weights": args.random_weights}
    results = {
        **result_parts(job.task.names, job.task.protocol, scores),
        "images": len(job.names),
        "expected_images": job.expected,
        "complete": job.complete,
        "method": args.method,
        "precision": args.precision,
        "batch_size": args.batch_size,
        "model": {key: shorten(value) for key, value in model.items()},
        "record": record,
    }
    write_classes(job.output / "classes.csv", job.task.names, scores, confusion)
    write_json(job.output / RESULTS, results)
    report(job, built, scores, args)
    log.info("wrote %s", job.output / RESULTS)


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
