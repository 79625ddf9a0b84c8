"""One benchmark scored by the model and the ranks at hand, and its results written.

Not here: flags and what can be checked before the model is built (`zeroshot_seg`), the loop over
pictures (`segmentation.job`).
"""

import argparse
import hashlib
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lazyclip.base.config import write_json
from lazyclip.base.record import make_record, shorten, utc_now
from lazyclip.factory import Built

from .commandline import RESULTS
from .ranks import Ranks
from .segflags import resolve_workers
from .segmentation.confusion import Counts, Scores, score
from .segmentation.engine import cosine_maps
from .segmentation.job import Job, make_folders, merge, missing_files, score_pictures
from .segmentation.ledger import FOLDER, Cells, Ledger, plain_values, read_ledgers, to_counts
from .segmentation.loading import Broken
from .segmentation.protocol import Task
from .segmentation.results import class_table, result_parts, summary, write_classes
from .textcache import encode_queries

log = logging.getLogger(__name__)

MODULE = "eval.zeroshot_seg"
KEPT = ("name", "weights_sha256", "pooling", "activation", "image_size", "patch_size")
SAME = 2e-3  # means and deviations of 0..1 closer than this differ by rounding only


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


def _what_is_scored(job: Job, built: Built, args: argparse.Namespace) -> dict[str, Any]:
    """Name what counts must have in common to be summed."""
    info = built.info.to_dict()
    return plain_values(
        {
            "dataset": job.task.protocol.dataset,
            "protocol": job.task.protocol.hash,
            "method": args.method,
            "precision": args.precision,
            "random_seed": args.seed if args.random_weights else None,
            **{key: info[key] for key in KEPT},
        }
    )


def _earlier(job: Job, scored: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Cells]:
    """Read what an interrupted run has left for these pictures; nothing without `--resume`."""
    if not args.resume:
        return {}
    held = read_ledgers(job.output, scored)
    again = set(missing_files(job, [name for name in job.names if name in held]))
    done = {name: held[name] for name in job.names if name in held and name not in again}
    log.info("%d of %d images are scored already", len(done), len(job.names))
    return done


def score_job(
    job: Job, built: Built, args: argparse.Namespace, ranks: Ranks
) -> tuple[Counts, list[Broken], int]:
    """Score the pictures of a data set on all ranks.

    Returns:
        Counts C x C, the pictures that could not be scored, and how many earlier counts were used.
    """
    protocol, classes = job.task.protocol, job.task.protocol.classes
    scored = _what_is_scored(job, built, args)
    earlier = ranks.from_first(lambda: _earlier(job, scored, args))
    queries = ranks.from_first(
        lambda: encode_queries(
            built, job.task.classes.queries, job.task.templates, use_cache=not args.no_text_cache
        )
    )
    maps = cosine_maps(
        built.model,
        queries,
        method=args.method,
        positions=protocol.positions,
        device=args.device,
        precision=args.precision,
    )

    def begin() -> bool:
        # What is there goes only when the model has shown that it works.
        maps(torch.zeros(1, 3, *(2 * [4 * built.info.patch_size])))
        if args.overwrite:
            shutil.rmtree(job.output / FOLDER, ignore_errors=True)
            (job.output / RESULTS).unlink(missing_ok=True)
        make_folders(job, keep=args.resume)
        return True

    ranks.from_first(begin)
    left = [name for name in job.names if name not in earlier]
    before = np.zeros((classes, classes), dtype=np.int64)
    for cells in earlier.values():
        before += to_counts(cells, classes)
    with Ledger.open(job.output, ranks.rank, scored) as ledger:
        done = score_pictures(
            job,
            left[ranks.rank :: ranks.world],
            maps,
            ledger,
            patch=built.info.patch_size,
            batch_size=args.batch_size,
            workers=resolve_workers(args, ranks.world),
            note=f" (rank 0 of {ranks.world})" if ranks.world > 1 else "",
            before=before,
        )
    confusion, broken = merge(job.names, earlier, ranks.gather(done), classes)
    return confusion, broken, len(earlier)


def report(
    job: Job, built: Built, scores: Scores, broken: Sequence[Broken], args: argparse.Namespace
) -> str:
    """Print the scores, and what they must not be taken for; returns the line with the mIoU."""
    protocol = job.task.protocol
    images = len(job.names) - len(broken)
    print("\n".join(class_table(job.task.names, scores)))
    pooling = _pooling_words(built.info.pooling)
    line = summary(protocol, scores, images, args.method, pooling)
    print(line)
    if broken or not job.complete:
        of = job.expected or len(job.reader.ids)
        print(f"NOT COMPARABLE: {images} images scored, split {protocol.split} has {of}")
    if args.random_weights:
        print("RANDOM WEIGHTS: these scores say nothing about a trained model")
    return line


def run_job(
    job: Job, built: Built, argv: Sequence[str] | None, args: argparse.Namespace, ranks: Ranks
) -> tuple[list[Broken], str]:
    """Score one data set and write its results.

    Returns:
        The pictures that could not be scored, and the line that says the scores.
    """
    scores, broken = write_scores(job, built, argv, args, ranks)
    return broken, "" if scores is None else report(job, built, scores, broken, args)


def write_scores(
    job: Job,
    built: Built,
    argv: Sequence[str] | None,
    args: argparse.Namespace,
    ranks: Ranks,
    module: str = MODULE,
) -> tuple[Scores | None, list[Broken]]:
    """Score one data set and write its results, without a word on stdout.

    Args:
        job: what is scored.
        built: the model.
        argv: of the command, for the record.
        args: flags of `zeroshot_seg`.
        ranks: who shares the pictures.
        module: the command, for the record.

    Returns:
        The scores, None on ranks that are not the first; the pictures that could not be scored.
    """
    _say_differences(built, job.task)
    record = make_record(
        module,
        argv,
        vars(args),
        device=args.device,
        world=ranks.world,
        protocol_hash=job.task.protocol.hash,
        images_sha256=hashlib.sha256("\n".join(job.names).encode()).hexdigest(),
    )
    start = time.monotonic()
    confusion, broken, earlier = score_job(job, built, args, ranks)
    if not ranks.first:
        return None, broken
    scores = score(confusion)
    record.update(end=utc_now(), seconds=round(time.monotonic() - start, 1), resumed_from=earlier)
    model: dict[str, Any] = {**built.info.to_dict(), "random_weights": args.random_weights}
    results = {
        **result_parts(job.task.names, job.task.protocol, scores),
        "images": len(job.names) - len(broken),
        "expected_images": job.expected,
        "complete": job.complete and not broken,
        "bad": [{"id": one.name, "reason": str(shorten(one.reason))} for one in broken],
        "method": args.method,
        "precision": args.precision,
        "batch_size": args.batch_size,
        "model": {key: shorten(value) for key, value in model.items()},
        "record": record,
    }
    write_classes(job.output / "classes.csv", job.task.names, scores, confusion)
    write_json(job.output / RESULTS, results)
    log.info("wrote %s", job.output / RESULTS)
    return scores, broken
