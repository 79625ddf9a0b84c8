"""One loader in a process of its own; the last line it prints is JSON. Started by other scripts.

Runs in either environment: `theirs` imports open_clip_train and nothing of ours. Not here: what is
compared with what.
"""

import argparse
import contextlib
import functools
import importlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from processes import cpu_seconds, memory_bytes, settle

MODEL = "ViT-B-32"


@functools.cache
def their_parts() -> tuple[Any, Any]:
    """Return open_clip's training transform and tokenizer."""
    import open_clip

    _, preprocess, _ = open_clip.create_model_and_transforms(MODEL)
    return preprocess, open_clip.get_tokenizer(MODEL)


def theirs(args: argparse.Namespace) -> Iterator[int]:
    """Yield the sizes of open_clip_train's batches: its own pipeline, shards with replacement."""
    data = importlib.import_module("open_clip_train.data")
    # A buffer that is full from the first batch on: while it fills, two are read for one given.
    data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = 1000
    preprocess, tokenizer = their_parts()
    settings = SimpleNamespace(
        train_data=args.pattern, val_data=None, dataset_resampled=True,
        train_num_samples=10_000_000, train_data_upsampling_factors=None, seed=0,
        batch_size=args.batch, world_size=1, workers=args.workers,
    )  # fmt: skip
    info = data.get_wds_dataset(settings, preprocess, True, tokenizer=tokenizer)
    for images, _ in info.dataloader:
        yield len(images)


@functools.cache
def our_parts() -> tuple[Any, Any]:
    """Return our training transform and tokenizer."""
    from lazyclip.factory import build
    from training.data.pixels import fast_of

    built = build(MODEL)
    transform = fast_of(built.preprocess_train)
    if transform is None:
        raise SystemExit(f"{MODEL} has no fast transform")
    return transform, built.tokenizer


def make_exact(args: argparse.Namespace) -> tuple[Any, Any]:
    """Make our exact loader; returns it and how a rank loads."""
    from training.data.batches import Loading
    from training.data.chunks import Reader
    from training.data.exact import Exact
    from training.data.order import WINDOW, lanes_for
    from training.data.pixels import decode_pixels
    from training.data.prepare import Wanted, prepare
    from training.data.samples import decode

    transform, tokenizer = our_parts()
    prepared = prepare(Wanted(pattern=args.pattern, fallback=Path(args.folder)))
    exact = Exact(
        Reader(prepared.manifest, prepared.shards),
        lanes=args.lanes or lanes_for(args.batch, 1),
        window=args.window or WINDOW,
        workers=args.workers,
        decode=functools.partial(decode, decoder=decode_pixels),
    )
    return exact, Loading(args.batch, transform, tokenizer, 0, 0, 1, args.workers, pin=False)


def ours(args: argparse.Namespace) -> Iterator[int]:
    """Yield the sizes of the exact loader's batches."""
    from training.data.exact import steps

    for step in steps(*make_exact(args)):
        yield len(step.images)


@functools.cache
def opened(side: str, pattern: str, workers: int) -> list[Iterator[int]]:
    """Keep a place for a loader that goes on when the same is asked for again."""
    del side, pattern, workers
    return []


def rate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure samples per CPU second, children's too, and per second, after some batches."""
    place = opened(args.side, args.pattern, args.workers)
    if not place:
        place.append(ours(args) if args.side == "ours" else theirs(args))
        next(place[0])
    settle()
    batches = place[0]
    # The first comes late, and each process has two more ready by then.
    for _ in range(1 + 3 * args.workers):
        next(batches)
    wall, cpu, done = time.perf_counter(), cpu_seconds(), 0
    while done < args.samples:
        done += next(batches)
    seconds, spent = time.perf_counter() - wall, cpu_seconds() - cpu
    return {"per_cpu_second": done / spent, "per_second": done / seconds, "samples": done}


def first(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the time to the first batch when starting at a share of a pass."""
    from training.data.exact import steps

    exact, loading = make_exact(args)
    total = int(exact.reader.manifest.counts.sum())
    start = int(args.at * total / exact.lanes)
    began, cpu = time.perf_counter(), time.process_time()
    with contextlib.closing(steps(exact, loading, start)) as batches:
        next(batches)
        seconds, spent = time.perf_counter() - began, time.process_time() - cpu
    return {"first_batch_s": seconds, "cpu_s": spent, "samples": total}


def skip(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the same for webdataset reading and throwing away, with our decoder behind it."""
    import webdataset
    from braceexpand import braceexpand

    from training.data.pixels import decode_pixels

    exact, loading = make_exact(args)
    total = int(exact.reader.manifest.counts.sum())
    began, cpu = time.perf_counter(), time.process_time()
    stream = iter(webdataset.WebDataset(list(braceexpand(args.pattern)), shardshuffle=False))
    for _ in range(int(args.at * total)):
        next(stream)
    samples = [next(stream) for _ in range(args.batch)]
    torch.stack([loading.transform(decode_pixels(sample["jpg"])) for sample in samples])
    loading.tokenizer([sample["txt"].decode() for sample in samples])
    seconds, spent = time.perf_counter() - began, time.process_time() - cpu
    return {"first_batch_s": seconds, "cpu_s": spent, "samples": total}


def passes(args: argparse.Namespace) -> dict[str, Any]:
    """Record memory, children's too, at the end of each of some passes."""
    from training.data.exact import steps

    exact, loading = make_exact(args)
    total = int(exact.reader.manifest.counts.sum())
    batches, rows, seen = steps(exact, loading), [], 0
    for number in range(1, args.epochs + 1):
        while seen < number * total:
            seen += len(next(batches).images)
        rows.append(memory_bytes())
    window = exact.window_bytes(1)
    return {"rss": [r for r, _ in rows], "pss": [p for _, p in rows], "window_bytes": window}


def wait(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the share of time that steps of a set length wait for their batch.

    A step's length is a multiple of what the loader needs for a batch at that moment.
    """
    batches = ours(args)
    for _ in range(1 + 3 * args.workers):
        next(batches)
    wall = time.perf_counter()
    for _ in range(args.steps):
        next(batches)
    needs = (time.perf_counter() - wall) / args.steps
    rows = []
    for factor in args.factors:
        for _ in range(3 * args.workers):  # what was left to be made of the steps before
            next(batches)
            time.sleep(factor * needs)
        waits, began = [], time.perf_counter()
        for _ in range(args.steps):
            asked = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - asked)
            time.sleep(factor * needs)
        share = sum(waits) / (time.perf_counter() - began)
        rows.append({"factor": factor, "share": share, "longest": max(waits)})
    return {"batch_s": needs, "rows": rows}


KINDS = {"wait": wait, "rate": rate, "first": first, "skip": skip, "passes": passes}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of one question."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=(*KINDS, "serve"))
    parser.add_argument("--side", choices=("ours", "theirs"), default="ours")
    parser.add_argument("--pattern")
    parser.add_argument("--folder", default="out/bench-manifest", help="for the manifest")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lanes", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--factors", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--at", type=float, default=0.0, help="share of the pass to start at")
    return parser


def main() -> None:
    """Answer the question of the command line; `serve`: those that come line by line."""
    parser = make_parser()
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.kind != "serve":
        print(json.dumps(KINDS[args.kind](args)), flush=True)
        return
    for line in sys.stdin:
        one = parser.parse_args(shlex.split(line))
        print(json.dumps(KINDS[one.kind](one)), flush=True)


if __name__ == "__main__":
    main()
