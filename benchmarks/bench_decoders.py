"""Decoders through a DataLoader with 1 and 2 loader processes, and how far their pixels differ.

    python benchmarks/bench_decoders.py [--rounds R] [--simplejpeg FOLDER]

From JPEG bytes in memory to a batch: Pillow with torchvision's float transform (open_clip's), the
decoder of `training.data.pixels`, torchvision's own decoder without its checks, and simplejpeg with
and without the same checks, where it is installed (or lies in FOLDER). All but the first crop and
resize as bytes. Alternating rounds in one process; processor time of the loader processes. Not
here: reading.
"""

import argparse
import io
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from kept import keep, output_flag, ratio_of
from laion_shards import make_jpegs
from PIL import Image
from processes import ROOT
from torch import Tensor

CROP, SCALE, RATIO = (224, 224), (0.9, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH, DISTINCT = 32, 64


def decoders() -> dict[str, Callable[[bytes], Tensor]]:
    """Return each way from a JPEG's bytes to a cropped tensor 3 x 224 x 224."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import (
        Compose,
        InterpolationMode,
        Normalize,
        RandomResizedCrop,
        ToTensor,
    )

    from training.data.pixels import FastCrop, _plain_jpeg, check_size, decode_pixels

    bicubic = InterpolationMode.BICUBIC
    floats = Compose([
        RandomResizedCrop(CROP, SCALE, RATIO, interpolation=bicubic), ToTensor(),
        Normalize(MEAN, STD),
    ])  # fmt: skip
    crop = FastCrop(CROP, SCALE, RATIO, bicubic)

    def io_alone(content: bytes) -> Tensor:
        raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return crop(decode_jpeg(raw, mode=ImageReadMode.RGB))

    found: dict[str, Callable[[bytes], Tensor]] = {
        "pillow, float": lambda content: floats(Image.open(io.BytesIO(content)).convert("RGB")),
        "training.data.pixels": lambda content: crop(decode_pixels(content)),
        "torchvision.io alone": io_alone,
    }
    try:
        import simplejpeg
    except ImportError:
        print("simplejpeg is not installed: left out")
        return found

    def simple(content: bytes) -> Tensor:
        pixels = simplejpeg.decode_jpeg(content, "RGB")  # H x W x 3
        # The layout that the resize works in: a plane for each channel.
        return crop(torch.from_numpy(pixels).permute(2, 0, 1))

    def checked(content: bytes) -> Tensor:
        with Image.open(io.BytesIO(content)) as opened:
            check_size(*opened.size)
            if not _plain_jpeg(opened, content):
                raise ValueError("not a plain JPEG")
        return simple(content)

    return {**found, "simplejpeg alone": simple, "simplejpeg, checked": checked}


class Endless(torch.utils.data.IterableDataset[tuple[Tensor, float]]):
    """Batches of crops of the same JPEGs, without end, with the processor time since the last."""

    def __init__(self, name: str, jpegs: list[bytes]) -> None:
        """Hold a decoder's name and the files."""
        self.name, self.jpegs = name, jpegs

    def __iter__(self) -> Iterator[tuple[Tensor, float]]:
        """Yield batches B x 3 x 224 x 224 and CPU seconds of the process, sending included."""
        torch.set_num_threads(1)
        decode, place, before = decoders()[self.name], 0, time.process_time()
        while True:
            batch = [self.jpegs[(place + i) % len(self.jpegs)] for i in range(BATCH)]
            place += BATCH
            made = torch.stack([decode(content) for content in batch])
            now = time.process_time()
            yield made, now - before
            before = now


def differences(jpegs: list[bytes]) -> dict[str, tuple[float, int]]:
    """Compare each decoder's crops with Pillow's in float: mean and most, in grey levels 0..255."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    ways, gaps = decoders(), dict[str, list[Tensor]]()
    for number, content in enumerate(jpegs):
        crops = {}
        for name, decode in ways.items():
            torch.manual_seed(number)
            random.seed(number)
            crops[name] = decode(content)
        whole = ((crops.pop("pillow, float") * std + mean) * 255).round()
        for name, crop in crops.items():
            gaps.setdefault(name, []).append((crop.float() - whole).abs())
    return {
        name: (torch.stack(row).mean().item(), int(torch.stack(row).max().item()))
        for name, row in gaps.items()
    }


def open_loader(name: str, jpegs: list[bytes], workers: int) -> Iterator[tuple[Tensor, float]]:
    """Start a DataLoader of one decoder; it waits while others have their turn."""
    loader = torch.utils.data.DataLoader(
        Endless(name, jpegs), batch_size=None, num_workers=workers, prefetch_factor=2
    )
    return iter(loader)


def rate(
    batches: Iterator[tuple[Tensor, float]], workers: int, samples: int
) -> tuple[float, float]:
    """Return samples per CPU second and per second, after the batches that stood ready."""
    for _ in range(1 + 2 * workers):
        next(batches)
    wall, cpu, done = time.perf_counter(), 0.0, 0
    while done < samples:
        images, spent = next(batches)
        done, cpu = done + len(images), cpu + spent
    return done / cpu, done / (time.perf_counter() - wall)


def compare(args: argparse.Namespace, side: int, workers: int) -> dict[str, Any]:
    """Run all decoders in alternating rounds."""
    jpegs, names = make_jpegs(DISTINCT, side), list(decoders())
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    loaders = {name: open_loader(name, jpegs, workers) for name in names}
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            rows[name].append(rate(loaders[name], workers, args.samples))
    base = names[0]
    table = {}
    for name in names:
        cpu, wall = ([row[i] for row in rows[name]] for i in (0, 1))
        over = ratio_of(cpu, [row[0] for row in rows[base]])
        over_ours = ratio_of(cpu, [row[0] for row in rows["training.data.pixels"]])
        table[name] = {
            "per_cpu_second": statistics.median(cpu), "per_second": statistics.median(wall),
            "over_pillow": over, "over_ours": over_ours, "rows": rows[name],
        }  # fmt: skip
        print(
            f"{side} px, {workers} workers, {name}: {statistics.median(cpu):.0f} per CPU second, "
            f"{statistics.median(wall):.0f} per second; {over} Pillow, {over_ours} ours "
            f"(load {os.getloadavg()[0]:.1f})",
            flush=True,
        )
    return {"side": side, "workers": workers, "decoders": table}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simplejpeg", type=Path, help="folder that holds simplejpeg")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=512, help="of a turn")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    output_flag(parser)
    args = parser.parse_args()
    began = os.getloadavg()[0]
    sys.path.insert(0, str(ROOT))
    if args.simplejpeg:
        sys.path.append(str(args.simplejpeg))
    torch.set_num_threads(1)
    gaps = {}
    for side in args.sides:
        gaps[side] = differences(make_jpegs(DISTINCT, side))
        for name, (mean, most) in gaps[side].items():
            print(f"{side} px, {name}: mean difference {mean:.4f}, most {most} grey levels")
    found = [compare(args, side, count) for side in args.sides for count in args.workers]
    keep(args, began, {"benchmark": "decoders", "differences": gaps, "rates": found})


if __name__ == "__main__":
    main()
