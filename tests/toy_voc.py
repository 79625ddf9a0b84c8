"""A tiny data set in VOC layout, and a protocol file for it, made by the test itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path("VOCdevkit") / "VOC2012"

PROTOCOL = """\
dataset: toy
title: a toy
layout: voc
folder: VOCdevkit/VOC2012
split: val
images: {val: 3}
classes: classes.txt
labels: {labels}
background: {background}
protocols:
  small:
    templates: plain
    mean: [122.771, 116.746, 104.094]
    std: [68.501, 66.632, 70.323]
    short: 64
    cap: 2048
    window: 64
    stride: 32
    remainder: drop
    positions: offset
    logit_scale: 40
    threshold: 0
    area: 0
    pamr: off
"""


def palette_png(file: Path, ids: np.ndarray) -> None:
    """Save ids H x W as a palette PNG, as VOC's label files are."""
    picture = Image.fromarray(ids.astype(np.uint8))
    picture.putpalette([(37 * i) % 256 for i in range(768)])
    picture.save(file)


def make_voc(
    root: Path,
    ids: Sequence[str] = ("a1", "a2", "a3"),
    size: tuple[int, int] = (50, 70),
    stored: Sequence[int] = (0, 1, 2, 3, 255),
    lists: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write pictures and palette labels of random blocks; returns the data set's own folder.

    Args:
        root: data root.
        ids: one picture each, sizes differing by a few pixels.
        size: height and width of the first.
        stored: label ids that occur.
        lists: split -> ids, default val with all.
    """
    folder = root / FOLDER
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for index, name in enumerate(ids):
        draw = np.random.default_rng(index)
        height, width = size[0] + 3 * index, size[1] - 2 * index
        blocks = draw.choice(stored, (height // 10 + 1, width // 10 + 1))
        label = np.kron(blocks, np.ones((10, 10), dtype=int))[:height, :width]
        picture = draw.integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
        picture = np.kron(picture, np.ones((10, 10, 1), dtype=np.uint8))[:height, :width]
        Image.fromarray(picture).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        palette_png(folder / "SegmentationClass" / f"{name}.png", label)
    for split, listed in (lists or {"val": ids}).items():
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(
            "\n".join(listed) + "\n"
        )
    return folder


def make_protocol(
    folder: Path,
    classes: Sequence[str] = ("red thing", "blue thing, azure thing", "green thing"),
    labels: str = "zero_ignored",
    background: bool = False,
    **changed: object,
) -> Path:
    """Write `toy.yaml` and its class file; `changed` replaces keys of the protocol `small`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(classes) + "\n")
    text = PROTOCOL.replace("{labels}", labels).replace("{background}", str(background).lower())
    for key, value in changed.items():
        head, tail = text.split(f"    {key}: ", 1)
        text = f"{head}    {key}: {value}\n" + tail.split("\n", 1)[1]
    file = folder / "toy.yaml"
    file.write_text(text)
    return file
