"""Loader samples per CPU second, ours beside open_clip_train's, on the same shards.

    python benchmarks/bench_loader.py [--peer FOLDER] [--rounds R] [--samples N]

Makes shards of 256 and 512 pixel JPEGs, then runs both loaders in alternating child processes, each
in place (no loader processes, one thread), and takes the processor time of the whole process for N
samples after the first batch. The peer needs its own webdataset (0.2.86), which this script puts in
FOLDER once by pip. Raw reading, without decoding, beside webdataset's own iterator. Prints tables
with the goals, then one line of JSON. Not here: training steps.
"""

import argparse
import functools
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PEER_WEBDATASET = "webdataset==0.2.86"
MODEL, BATCH = "ViT-B-32", 64
SHARDS, EACH = 8, 250
GOALS = {256: 2.5, 512: 2.0}
RAW_GOAL = 5.0
WORDS = ["old", "red", "house", "quiet", "lake", "two", "boats", "dawn", "a", "photo", "of", "the"]


def make_shards(folder: Path, side: int) -> None:
    """Write shards of textured JPEGs, quality 92, each with a caption and a json."""
    from PIL import Image

    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for place in range(EACH):
                draw = np.random.default_rng(shard * EACH + place)
                coarse = draw.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
                smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
                noisy = np.asarray(smooth, dtype=float) + draw.normal(0, 12, (side, side, 3))
                stream = io.BytesIO()
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
                    stream, "JPEG", quality=92
                )
                key = f"{shard:05d}{place:04d}"
                caption = " ".join(draw.permutation(WORDS))
                for suffix, content in (
                    ("jpg", stream.getvalue()),
                    ("json", json.dumps({"key": key, "caption": caption}).encode()),
                    ("txt", caption.encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size, info.mtime = len(content), time.time()  # a float: a pax header each
                    tar.addfile(info, io.BytesIO(content))


def _theirs(pattern: str) -> Iterator[int]:
    import open_clip

    # The peer's own module, not a part of ours.
    get_wds_dataset = importlib.import_module("open_clip_train.data").get_wds_dataset
    _, preprocess, _ = open_clip.create_model_and_transforms(MODEL)
    args = SimpleNamespace(
        train_data=pattern, val_data=None, dataset_resampled=True,
        train_num_samples=SHARDS * EACH * 100, train_data_upsampling_factors=None, seed=0,
        batch_size=BATCH, world_size=1, workers=0,
    )  # fmt: skip
    info = get_wds_dataset(args, preprocess, True, tokenizer=open_clip.get_tokenizer(MODEL))
    for images, _ in info.dataloader:
        yield len(images)


def _reader(pattern: str, folder: Path) -> Any:
    from training.data.chunks import Reader
    from training.data.prepare import Wanted, prepare

    prepared = prepare(Wanted(pattern=pattern, fallback=folder))
    return Reader(prepared.manifest, prepared.shards)


def _ours(pattern: str, folder: Path) -> Iterator[int]:
    from lazyclip.factory import build
    from training.data.batches import Loading
    from training.data.exact import Exact, steps
    from training.data.order import lanes_for
    from training.data.pixels import decode_pixels, fast_of
    from training.data.samples import decode

    built = build(MODEL)
    transform = fast_of(built.preprocess_train)
    if transform is None:
        raise SystemExit(f"{MODEL} has no fast transform")
    loading = Loading(BATCH, transform, built.tokenizer, 0, 0, 1, 0, pin=False)
    exact = Exact(
        _reader(pattern, folder),
        lanes=lanes_for(BATCH, 1),
        decode=functools.partial(decode, decoder=decode_pixels),
    )
    for step in steps(exact, loading):
        yield len(step.images)


def _read_all(pattern: str, folder: Path) -> int:
    from training.data.chunks import Shared

    reader = _reader(pattern, folder)
    chunks = Shared(reader)
    count = 0
    for number in range(len(reader.manifest.starts)):
        chunk = chunks.get(number)
        count += sum(1 for index in range(len(chunk.records)) if chunk.sample(index))
    return count


def child(kind: str, pattern: str, samples: int, folder: Path) -> None:
    """Load batches and print the samples per CPU second after the first one."""
    import torch

    torch.set_num_threads(1)
    batches = _ours(pattern, folder) if kind == "ours" else _theirs(pattern)
    next(batches)
    start, done = time.process_time(), 0
    while done < samples:
        done += next(batches)
    print(json.dumps({"rate": done / (time.process_time() - start)}))


def run_child(kind: str, pattern: str, samples: int, peer: Path, folder: Path) -> float:
    """Run one loader in a process of its own; returns samples per CPU second."""
    paths = [str(ROOT / "src"), str(ROOT)]
    if kind == "theirs":
        paths.insert(0, str(peer))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", kind, "--pattern", pattern,
         "--samples", str(samples), "--folder", str(folder)],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["rate"])


def raw(pattern: str, folder: Path, repeats: int) -> dict[str, float]:
    """Read all samples of the shards without decoding, by webdataset and by chunks; warm cache."""
    import webdataset
    from braceexpand import braceexpand

    def theirs() -> int:
        source = webdataset.WebDataset(list(braceexpand(pattern)), shardshuffle=False)
        return sum(1 for _ in source)

    rates: dict[str, list[float]] = {"webdataset": [], "chunks": []}
    for turn in range(repeats + 1):
        for name, read in (("webdataset", theirs), ("chunks", lambda: _read_all(pattern, folder))):
            start = time.process_time()
            count = read()
            if count != SHARDS * EACH:
                raise SystemExit(f"{name} read {count} of {SHARDS * EACH} samples")
            if turn:
                rates[name].append(count / (time.process_time() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def ensure_peer(folder: Path) -> None:
    """Put the peer's webdataset into a folder of its own, once."""
    if (folder / "webdataset").is_dir():
        return
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder),
         PEER_WEBDATASET],
        check=True,
    )  # fmt: skip


def compare(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Compare the loaders at both sizes, and raw reading at the first."""
    found: dict[str, Any] = {}
    for side, goal in GOALS.items():
        make_shards(root / str(side), side)
        pattern = str(root / str(side) / f"{{00000..{SHARDS - 1:05d}}}.tar")
        rates: dict[str, list[float]] = {"theirs": [], "ours": []}
        for turn in range(args.rounds):
            for kind in ("theirs", "ours") if turn % 2 == 0 else ("ours", "theirs"):
                rates[kind].append(run_child(kind, pattern, args.samples, args.peer, root / "m"))
        ratios = [o / t for o, t in zip(rates["ours"], rates["theirs"], strict=True)]
        ratio = statistics.median(ratios)
        found[str(side)] = {"rates": rates, "ratio": ratio, "goal": goal}
        reached = "reached" if ratio >= goal else "not reached"
        print(
            f"{side} px: open_clip_train {statistics.median(rates['theirs']):.0f}, ours "
            f"{statistics.median(rates['ours']):.0f} samples per CPU second; {ratio:.2f} x "
            f"({min(ratios):.2f}-{max(ratios):.2f} over {args.rounds} rounds), goal {goal}: "
            f"{reached}",
            flush=True,
        )
        if side == min(GOALS):
            found["raw"] = raw(pattern, root / "m", args.rounds)
            gain = found["raw"]["chunks"] / found["raw"]["webdataset"]
            print(
                f"raw reading, {side} px: webdataset {found['raw']['webdataset']:.0f}, chunks "
                f"{found['raw']['chunks']:.0f} samples per CPU second; {gain:.1f} x, goal "
                f"{RAW_GOAL:g}: {'reached' if gain >= RAW_GOAL else 'not reached'}",
                flush=True,
            )
    return found


def main() -> None:
    """Run the benchmark, or one child of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, default=Path("out/peer"), help="folder for webdataset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--child", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--pattern", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.pattern, args.samples, args.folder)
        return
    from timing import machine

    sys.path.insert(0, str(ROOT))
    args.peer = args.peer.resolve()
    ensure_peer(args.peer)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), args)
    print(json.dumps({"benchmark": "loader", "machine": machine(), **found}))


if __name__ == "__main__":
    main()
