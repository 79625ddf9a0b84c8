"""Tiny shards and pictures that tests make for themselves. Not here: expected values."""

import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "red": (220, 30, 30),
    "blue": (30, 30, 220),
    "green": (30, 180, 30),
    "yellow": (230, 220, 40),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
}


def write_shard(
    path: Path, samples: Sequence[Mapping[str, bytes]], keys: Sequence[str] | None = None
) -> Path:
    """Write samples (suffix -> bytes) as one tar, gzipped when the name ends in `gz`.

    Keys default to 000000000, 000000001, ... The bytes depend on the arguments alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{index:09d}" for index in range(len(samples))] if keys is None else list(keys)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, sample in zip(names, samples, strict=True):
            for suffix, content in sample.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    content = stream.getvalue()
    path.write_bytes(gzip.compress(content, mtime=0) if path.name.endswith("gz") else content)
    return path


def _pixels(array_or_seed: np.ndarray | int, size: tuple[int, int]) -> np.ndarray:
    if isinstance(array_or_seed, np.ndarray):
        return array_or_seed
    width, height = size
    draw = np.random.default_rng(array_or_seed)
    return draw.integers(0, 256, (height, width, 3), dtype=np.uint8)


def jpeg(array_or_seed: np.ndarray | int, size: tuple[int, int] = (64, 64)) -> bytes:
    """Encode an H x W x 3 uint8 array as JPEG; a seed makes noise of `size` (width, height)."""
    stream = io.BytesIO()
    Image.fromarray(_pixels(array_or_seed, size)).save(stream, format="JPEG", quality=92)
    return stream.getvalue()


def png(array: np.ndarray) -> bytes:
    """Encode an H x W or H x W x 3 uint8 array as PNG, losslessly."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


def caption_sample(index: int, classes: Sequence[str], size: int = 64) -> dict[str, bytes]:
    """Make one sample: a box of plain colour on noise, its caption, its class and box."""
    draw = np.random.default_rng(1000 + index)
    label = index % len(classes)
    pixels = draw.integers(96, 160, (size, size, 3), dtype=np.uint8)
    side = int(draw.integers(size // 4, size // 2))
    x0, y0 = (int(v) for v in draw.integers(0, size - side, 2))
    colour = COLOURS.get(classes[label], tuple(int(v) for v in draw.integers(0, 256, 3)))
    pixels[y0 : y0 + side, x0 : x0 + side] = colour
    caption = f"a photo of a {classes[label]} box"
    about = {
        "caption": caption,
        "class_index": label,
        "class_name": classes[label],
        "box": [x0, y0, x0 + side - 1, y0 + side - 1],
        "width": size,
        "height": size,
    }
    return {"jpg": jpeg(pixels), "txt": caption.encode(), "json": json.dumps(about).encode()}


def caption_shards(
    folder: Path, shards: int = 2, per_shard: int = 8, classes: Sequence[str] = ("red", "blue")
) -> str:
    """Write LAION-form shards `00000.tar`, ... and return their brace pattern.

    Each sample: jpg, txt, and json with class_index, class_name, box ([x0, y0, x1, y1], inclusive),
    width and height. Keys are unique over all shards (SSSSSNNNN).
    """
    folder = Path(folder)
    for shard in range(shards):
        first = shard * per_shard
        samples = [caption_sample(first + i, classes) for i in range(per_shard)]
        keys = [f"{shard:05d}{i:04d}" for i in range(per_shard)]
        write_shard(folder / f"{shard:05d}.tar", samples, keys)
    return str(folder / ("{00000..%05d}.tar" % (shards - 1)))  # noqa: UP031
