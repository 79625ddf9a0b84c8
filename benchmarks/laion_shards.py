"""Synthetic shards in LAION's layout: jpg, json and txt of each sample, a pax header before each.

The pictures are textured noise, so that a JPEG has the size of a photograph's; a few hundred of
them come again under other keys, since making one takes longer than reading thousands. Not here:
reading them.
"""

import io
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ["old", "red", "house", "quiet", "lake", "two", "boats", "dawn", "a", "photo", "of", "the"]
DISTINCT = 250


def make_jpegs(count: int, side: int, noise: float = 5) -> list[bytes]:
    """Make JPEGs of quality 92, `side` x `side` pixels: 28 kB on average at 256, 112 kB at 512."""
    made = []
    for number in range(count):
        draw = np.random.default_rng([side, number])
        coarse = draw.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, dtype=np.float32) + draw.normal(0, noise, (side, side, 3))
        stream = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
        made.append(stream.getvalue())
    return made


def _about(key: str, caption: str, side: int) -> bytes:
    """Make the json that img2dataset writes for LAION-400M's columns."""
    about = {
        "url": f"https://images.example.org/{key}/photo-{key}.jpg", "caption": caption,
        "NSFW": "UNLIKELY", "similarity": 0.31, "LICENSE": "?", "key": key, "status": "success",
        "error_message": None, "width": side, "height": side, "original_width": 1200,
        "original_height": 800, "exif": "{}", "sha256": "0" * 64,
    }  # fmt: skip
    return json.dumps(about, indent=4).encode()


def write_shards(folder: Path, *, shards: int, each: int, side: int) -> str:
    """Write shards, unless the folder is there from an earlier run.

    Args:
        folder: to be made.
        shards: number of tars.
        each: samples of a tar.
        side: of the pictures, in pixels.

    Returns:
        The pattern that names them.
    """
    pattern = str(folder / f"{{00000..{shards - 1:05d}}}.tar")
    if folder.is_dir():
        return pattern
    being_made = folder.with_name(folder.name + ".part")
    being_made.mkdir(parents=True, exist_ok=True)
    pictures = make_jpegs(min(DISTINCT, each), side)
    draw = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(being_made / f"{shard:05d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for place in range(each):
                key, caption = f"{shard:05d}{place:04d}", " ".join(draw.permutation(WORDS))
                for suffix, content in (
                    ("jpg", pictures[(shard + place) % len(pictures)]),
                    ("json", _about(key, caption, side)),
                    ("txt", caption.encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size, info.mtime = len(content), time.time()  # a float: a pax header each
                    tar.addfile(info, io.BytesIO(content))
    being_made.rename(folder)
    return pattern


def forget(folder: Path) -> None:
    """Ask the system to drop a folder's files from its cache, so that reading is cold."""
    for file in sorted(folder.glob("*.tar")):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def total_bytes(folder: Path) -> int:
    """Return the size of a folder's tars."""
    return sum(file.stat().st_size for file in folder.glob("*.tar"))
