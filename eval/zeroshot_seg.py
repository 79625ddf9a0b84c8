"""Score zero-shot segmentation: one benchmark, one model, one command.

    python -m eval.zeroshot_seg --dataset voc20 --model ViT-B-16-quickgelu --pretrained openai \
        --data-root data

Not here: the steps from picture to label map (`segmentation`), and the collecting of results.
"""

import argparse
import csv
import dataclasses
import hashlib
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lazyclip.base.config import write_json
from lazyclip.base.errors import UserError, cli
from lazyclip.base.logs import Progress, setup
from lazyclip.base.record import make_record, shorten, utc_now
from lazyclip.base.resources import config_names
from lazyclip.dense import METHODS
from lazyclip.factory import Built
from lazyclip.zeroshot import text_features

from .models import add_model_flags, load_from_flags
from .segmentation.confusion import Counts, Scores, count, score
from .segmentation.engine import CosineMaps, cosine_maps, segment
from .segmentation.overlays import Legend, overlay, read_palette, save_ids
from .segmentation.protocol import Task, read_task
from .segmentation.readers import READERS, Reader, check_files, to_ids

log = logging.getLogger(__name__)

MODULE = "eval.zeroshot_seg"
RESULTS = "results.json"
EXAMPLE = (
    f"python -m {MODULE} --dataset voc20 --model ViT-B-16-quickgelu --pretrained openai "
    "--data-root data"
)
SAME = 2e-3  # means and deviations of 0..1 closer than this are the same but for rounding


@dataclasses.dataclass(frozen=True)
class Job:
    """What is scored and where the results go; every part of it has been checked.

    Attributes:
        task: benchmark, protocol, classes and prompts.
        reader: pictures and stored labels.
        names: ids scored, in the order of the split's list.
        expected: number of images the benchmark has in this split, None where it is not known.
        complete: whether all images of the split are scored, and are as many as expected.
        legend: names and colours of the classes.
        output: folder of the results.
        predictions: folder of the label maps, None for none.
        shown: ids that get an overlay.
    """

    task: Task
    reader: Reader
    names: tuple[str, ...]
    expected: int | None
    complete: bool
    legend: Legend
    output: Path
    predictions: Path | None
    shown: frozenset[str]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Score zero-shot segmentation of one benchmark with one model.",
        epilog=f"example: {EXAMPLE}",
    )
    known = ", ".join(config_names("protocols", ".yaml"))
    data = parser.add_argument_group("task")
    data.add_argument("--dataset", help=f"{known}, or the path of such a YAML file")
    data.add_argument(
        "--data-root",
        type=Path,
        default=Path(os.environ.get("LAZYCLIP_DATA", "data")),
        help="folder that holds the benchmark's own folder, or is it ($LAZYCLIP_DATA or ./data)",
    )
    data.add_argument(
        "--protocol", help="how the score is made (default: the first of the data set)"
    )
    data.add_argument("--split", help="another list of images than the data set's own")
    data.add_argument("--limit", type=int, help="score the first N images only (not comparable)")
    data.add_argument(
        "--method", default="vanilla", help=f"dense features: {', '.join(METHODS)} (vanilla)"
    )
    data.add_argument("--batch-size", type=int, default=32, help="windows in one pass (32)")
    out = parser.add_argument_group("results")
    out.add_argument("--output", type=Path, help="folder (logs/seg/DATASET-MODEL-WEIGHTS)")
    out.add_argument("--overwrite", action="store_true", help="replace results that are there")
    out.add_argument(
        "--save-predictions", type=Path, metavar="DIR", help="write DIR/ID.png of class ids"
    )
    out.add_argument("--overlays", type=int, default=4, help="coloured pictures to write (4)")
    add_model_flags(parser)
    return parser


def _weights_word(args: argparse.Namespace) -> str:
    if args.pretrained:
        return _short_name(args.pretrained)
    return f"random{args.seed}" if args.random_weights else ""


def _short_name(place: str) -> str:
    """Shorten a model name, tag or path to a word: `logs/NAME/model` becomes `NAME`."""
    parts = [part for part in Path(place).parts if part not in ("model", "checkpoints", "/")]
    return re.sub(r"[^\w.-]+", "-", parts[-1].removesuffix(".safetensors") if parts else "model")


def default_output(args: argparse.Namespace, task: Task) -> Path:
    """Name the results folder after data set, model, weights, and what is not the default."""
    words = [task.benchmark.dataset, _short_name(args.model), _weights_word(args)]
    words += [args.protocol or "", args.split or ""]
    words += [args.method if args.method != "vanilla" else ""]
    words += [f"first{args.limit}" if args.limit else ""]
    return Path("logs") / "seg" / "-".join(word for word in words if word)


def _check_output(output: Path, overwrite: bool) -> None:
    place = output
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--output {output}: {place} is no folder that can be written to")
    if (output / RESULTS).exists() and not overwrite:
        raise UserError(
            f"{output / RESULTS} exists; give another folder with --output, or --overwrite"
        )


def _check_predictions(folder: Path, reader: Reader, names: Sequence[str], args: Any) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save-predictions {folder} is a file; give a folder")
    target = folder.resolve()
    sources = {place.resolve() for n in names for place in (reader.label_file(n).parent,)}
    if target in sources or target == (args.output / "overlays").resolve():
        raise UserError(
            f"--save-predictions {folder} holds the labels or the overlays; give a folder of its own"
        )
    there = {str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.png")}
    foreign = sorted(there - set(names))
    if there and (foreign or not args.overwrite):
        raise UserError(
            f"--save-predictions {folder} holds {len(there)} .png already, such as "
            f"{(foreign or sorted(there))[0]}.png; give an empty folder"
            + ("" if foreign else ", or --overwrite")
        )


def prepare(args: argparse.Namespace) -> Job:
    """Check all that can be checked without the model, and gather it.

    Sets `args.output` where it was not given.

    Raises:
        UserError: whatever of data set, protocol, method, files or output does not fit.
    """
    if not args.dataset:
        known = ", ".join(config_names("protocols", ".yaml"))
        raise UserError(f"no data set is named; pass --dataset ({known}), such as: {EXAMPLE}")
    for flag, value, low in (
        ("--limit", args.limit, 1),
        ("--batch-size", args.batch_size, 1),
        ("--overlays", args.overlays, 0),
    ):
        if value is not None and value < low:
            raise UserError(f"{flag} {value} is too small; use {low} or more")
    METHODS[args.method]  # an unknown name raises
    task = read_task(args.dataset, args.protocol, args.split)
    bench = task.benchmark
    legend = Legend(task.names, read_palette(bench.palette, len(task.names)))
    reader = READERS[bench.layout](args.data_root, bench.folder, bench.split)
    names = reader.ids[: args.limit]
    check_files(reader, names)
    args.output = args.output or default_output(args, task)
    _check_output(args.output, args.overwrite)
    if args.save_predictions:
        _check_predictions(args.save_predictions, reader, names, args)
    read_pair(task, reader, names[0])  # a wrong encoding shows in the first file
    expected = bench.images.get(bench.split)
    if expected not in (None, len(reader.ids)):
        log.warning(
            "%s %s has %d images here, the benchmark %d: scores are not comparable with published "
            "ones", bench.dataset, bench.split, len(reader.ids), expected,
        )  # fmt: skip
    most = min(args.overlays, len(names))
    return Job(
        task=task,
        reader=reader,
        names=names,
        expected=expected,
        complete=len(names) == len(reader.ids) and expected in (None, len(names)),
        legend=legend,
        output=args.output,
        predictions=args.save_predictions,
        shown=frozenset(names[i * len(names) // most] for i in range(most)),
    )


def read_pair(
    task: Task, reader: Reader, name: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read a picture H x W x 3 and its label H x W with ids 0..C-1 and 255."""
    image, stored = reader.read(name)
    label = to_ids(stored, task.protocol.labels, task.protocol.classes, reader.label_file(name))
    return image, label


def _say_differences(built: Built, task: Task) -> None:
    """Log where the protocol treats the model otherwise than its training did."""
    info, protocol = built.info, task.protocol
    own = [*info.mean, *info.std]
    used = [value / 255 for value in (*protocol.mean, *protocol.std)]
    if any(abs(a - b) > SAME for a, b in zip(own, used, strict=True)):
        log.warning(
            "%s was trained with mean %s and std %s; protocol %s normalises all models with its own",
            info.name, info.mean, info.std, protocol.name,
        )  # fmt: skip
    if protocol.window and (protocol.window, protocol.window) != info.image_size:
        log.info(
            "windows of %d px are not the model's %d x %d px: its positions are interpolated",
            protocol.window, *info.image_size,
        )  # fmt: skip


def evaluate(job: Job, maps: CosineMaps, batch_size: int) -> Counts:
    """Segment all images, count, and write the pictures asked for on the way.

    Returns:
        C x C int64, rows truth, columns prediction.
    """
    task, classes = job.task, job.task.protocol.classes
    confusion = np.zeros((classes, classes), dtype=np.int64)
    progress = Progress(len(job.names), "images")
    for name in job.names:
        image, label = read_pair(task, job.reader, name)
        try:
            found = segment(image, maps, task.protocol, task.classes.query_class, batch_size)
        except UserError as error:
            raise UserError(f"{job.reader.image_file(name)}: {error}") from None
        confusion += count(label, found, classes)
        if job.predictions:
            save_ids(found, job.predictions / f"{name}.png")
        if name in job.shown:
            file = job.output / "overlays" / f"{name.replace('/', '_')}.png"
            overlay(image, label, found, job.legend).save(file)
        progress.update(1, f"mIoU {_percent(score(confusion).miou, 2)}")
    return confusion


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _pooling_words(pooling: Any) -> str:
    if pooling["pooling"] != "last":
        return str(pooling["pooling"])
    return f"last (k {pooling['k']}, score {pooling['score']})"


def print_table(job: Job, scores: Scores, built: Built, method: str, seconds: float) -> None:
    """Print scores by class and over all, in per cent, and what they must not be taken for."""
    names, protocol = job.task.names, job.task.protocol
    wide = max(len("class"), *map(len, names))
    print(f"{'class':<{wide}}  {'IoU':>5}  {'Acc':>5}")
    for name, iou, accuracy in zip(names, scores.iou, scores.accuracy, strict=True):
        print(f"{name:<{wide}}  {_percent(iou):>5}  {_percent(accuracy):>5}")
    print(
        f"{protocol.dataset}  mIoU {_percent(scores.miou, 2)}  aAcc {_percent(scores.aacc)}  "
        f"mAcc {_percent(scores.macc)}  ({len(job.names)} images, protocol {protocol.name}:"
        f"{protocol.hash}, method {method}, pooling {_pooling_words(built.info.pooling)}, "
        f"{seconds:.0f} s)"
    )
    if not job.complete:
        of = job.expected or len(job.reader.ids)
        print(
            f"NOT COMPARABLE: {len(job.names)} images scored, the split {protocol.split} has {of}"
        )
    if built.info.weights_sha256 is None:
        print("RANDOM WEIGHTS: these scores say nothing about a trained model")


def _write_classes(file: Path, names: Sequence[str], scores: Scores, confusion: Counts) -> None:
    truth, found = confusion.sum(axis=1), confusion.sum(axis=0)
    with file.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("id", "class", "iou", "accuracy", "truth_px", "predicted_px", "both_px"))
        for i, name in enumerate(names):
            ratios = (scores.iou[i], scores.accuracy[i])
            table.writerow((i, name, *ratios, truth[i], found[i], confusion[i, i]))


def _results(job: Job, scores: Scores, built: Built, method: str) -> dict[str, Any]:
    return {
        "dataset": job.task.protocol.dataset,
        "images": len(job.names),
        "expected_images": job.expected,
        "complete": job.complete,
        "miou": scores.miou,
        "aacc": scores.aacc,
        "macc": scores.macc,
        "iou": dict(zip(job.task.names, scores.iou, strict=True)),
        "protocol": job.task.protocol.to_dict(),
        "method": method,
        "model": {
            **{key: shorten(value) for key, value in built.info.to_dict().items()},
            "random_weights": built.info.weights_sha256 is None,
        },
    }


def _make_folders(job: Job) -> None:
    """Make the folders; overlays of an earlier run go, so that none is taken for this one's."""
    folder = job.output / "overlays"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    if job.predictions:
        job.predictions.mkdir(parents=True, exist_ok=True)


def run(argv: Sequence[str] | None = None) -> None:
    """Score zero-shot segmentation."""
    args = make_parser().parse_args(argv)
    setup()
    job = prepare(args)
    built = load_from_flags(args)
    _say_differences(built, job.task)
    if built.info.weights_sha256 is None:
        log.warning("random weights: the scores will say nothing about a trained model")
    record = make_record(
        MODULE,
        argv,
        vars(args),
        device=args.device,
        precision=args.precision,
        batch_size=args.batch_size,
        protocol_hash=job.task.protocol.hash,
        images_sha256=hashlib.sha256("\n".join(job.names).encode()).hexdigest(),
    )
    start = time.monotonic()
    queries, prompts = job.task.classes.queries, job.task.templates
    log.info("encoding %d texts: %d queries x %d templates", len(queries) * len(prompts),
             len(queries), len(prompts))  # fmt: skip
    text = text_features(built.model, built.tokenizer, queries, prompts)
    maps = cosine_maps(
        built.model,
        text,
        patch=built.info.patch_size,
        method=args.method,
        device=args.device,
        precision=args.precision,
    )
    _make_folders(job)
    confusion = evaluate(job, maps, args.batch_size)
    scores = score(confusion)
    seconds = time.monotonic() - start
    record.update(end=utc_now(), seconds=round(seconds, 1))
    write_json(
        job.output / RESULTS, {**_results(job, scores, built, args.method), "record": record}
    )
    _write_classes(job.output / "classes.csv", job.task.names, scores, confusion)
    print_table(job, scores, built, args.method, seconds)
    log.info("wrote %s", job.output / RESULTS)


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
