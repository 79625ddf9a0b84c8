"""The demo's synthetic world on disk: shards, VOC folders, class and template files, protocols.

A class stands on its own texture in 70 % of the training pictures, in none of the decorrelated test
pictures, and in all of the correlated ones. The same seed makes the same bytes. Not here: what the
pictures show (`sets`), what is trained on them (`run`).
"""

import dataclasses
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from lazyclip.base.config import write_json

from .scene import COLOURS, SHAPES, SIDE
from .sets import (
    CAPTIONS,
    CLASSES,
    OWN_TEXTURE,
    PROMPTS,
    Pictures,
    PictureSet,
    caption_of,
    draw_single,
    draw_two,
)

CORRELATION = 0.7
PER_SHARD = 800
QUALITY = 92
_CHUNK = 400  # pictures drawn at once
_PROTOCOL = """\
# Made by demo.world: {count} pictures with {objects} each; pixels of the background are left out.
dataset: {name}
title: {title}
layout: voc
folder: VOCdevkit/{folder}
split: val
images: {{val: {count}}}
classes: classes.txt
labels: zero_ignored
background: false
protocols:
  toy:  # one window, the whole picture; mean and std of the models' own preprocessing
    templates: templates.txt
    mean: [122.771, 116.746, 104.094]
    std: [68.501, 66.632, 70.323]
    short: {side}
    cap: 2048
    window: {side}
    stride: {side}
    remainder: drop
    positions: offset
    logit_scale: 40
    threshold: 0
    area: 0
    pamr: off
"""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Pictures of each set."""

    train: int = 6400
    decorrelated: int = 600
    correlated: int = 600
    two: int = 270


def jpeg_bytes(picture: Pictures) -> bytes:
    """Encode a picture as JPEG."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def _members(drawn: PictureSet, shard: int, start: int, rng: np.random.Generator) -> Iterator[
    tuple[str, bytes]
]:  # fmt: skip
    """Yield member name and content of single-object pictures, three members each."""
    templates = rng.integers(len(CAPTIONS), size=len(drawn.pictures))
    for row, picture in enumerate(drawn.pictures):
        index, shape = int(drawn.classes[row, 0]), int(drawn.shapes[row, 0])
        key = f"{shard:05d}{start + row:04d}"
        caption = caption_of(index, shape, int(templates[row]))
        meta = {
            "caption": caption,
            "key": key,
            "class_index": index,
            "class_name": CLASSES[index],
            "shape": SHAPES[shape],
            "texture": int(drawn.textures[row]),
            "box": drawn.boxes[row, 0].tolist(),
            "width": SIDE,
            "height": SIDE,
        }
        yield f"{key}.jpg", jpeg_bytes(picture)
        yield f"{key}.txt", caption.encode()
        yield f"{key}.json", json.dumps(meta).encode()


def write_shards(
    folder: Path, n: int, own: float, rng: np.random.Generator
) -> Iterator[PictureSet]:
    """Draw n single-object pictures and write them as shards; yields what was drawn, in order."""
    folder.mkdir(parents=True)
    for shard, first in enumerate(range(0, n, PER_SHARD)):
        size = min(PER_SHARD, n - first)
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for start in range(0, size, _CHUNK):
                drawn = draw_single(min(_CHUNK, size - start), own, rng)
                for name, content in _members(drawn, shard, start, rng):
                    info = tarfile.TarInfo(name)  # time 0 and no owner: the same bytes each time
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                yield drawn


def palette() -> list[int]:
    """Return 256 RGB triples for label files: black, then per class its colour, by fill."""
    triples: list[tuple[int, ...]] = [(0, 0, 0)]
    for colour in COLOURS.values():
        strong = np.array(colour)
        for shown in (strong, strong * 0.55, 1 - (1 - strong) * 0.45):  # plain, striped, dotted
            triples.append(tuple(round(float(255 * c)) for c in shown))
    triples += [(255, 255, 255)] * (256 - len(triples))
    return [value for triple in triples for value in triple]


def write_voc(folder: Path, drawn: PictureSet, start: int = 0) -> list[str]:
    """Add pictures and exact label files to a VOC folder; returns their ids."""
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    ids = [f"{start + row:06d}" for row in range(len(drawn.pictures))]
    colours = palette()
    for name, picture, labels in zip(ids, drawn.pictures, drawn.label_maps(), strict=True):
        (folder / "JPEGImages" / f"{name}.jpg").write_bytes(jpeg_bytes(picture))
        stored = Image.fromarray(labels)
        stored.putpalette(colours)  # turns the grey picture into one of palette indices
        stored.save(folder / "SegmentationClass" / f"{name}.png")
    return ids


def _write_list(folder: Path, ids: list[str]) -> None:
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")


def _write_texts(root: Path, sizes: Sizes) -> None:
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    (root / "templates.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    for file, name, folder, objects, count in (
        ("protocol.yaml", "toy-two", "Toy", "two objects", sizes.two),
        ("protocol-one.yaml", "toy-one", "ToyOne", "one object", sizes.decorrelated),
    ):
        title = f"Toy world, {objects} in a picture"
        text = _PROTOCOL.format(
            name=name, folder=folder, objects=objects, title=title, count=count, side=SIDE
        )
        (root / file).write_text(text, encoding="utf-8")


def make_world(root: Path, seed: int, sizes: Sizes | None = None) -> dict[str, object]:
    """Write the whole world below a folder that does not exist yet.

    Args:
        root: gets train, test-decorrelated and test-correlated (shards), seg (a data root with
            VOCdevkit/Toy of two objects in a picture and VOCdevkit/ToyOne of the decorrelated
            test pictures), classes.txt, templates.txt, protocol.yaml, protocol-one.yaml and
            world.json.
        seed: of everything drawn.
        sizes: pictures of each set.

    Returns:
        What world.json holds: sizes, and shares measured on what was drawn (fractions).
    """
    sizes = sizes or Sizes()
    root.mkdir(parents=True)
    streams = [np.random.default_rng([seed, part]) for part in range(4)]
    kept = 0
    for drawn in write_shards(root / "train", sizes.train, CORRELATION, streams[0]):
        kept += int((drawn.textures == np.array(OWN_TEXTURE)[drawn.classes[:, 0]]).sum())
    one = root / "seg" / "VOCdevkit" / "ToyOne"
    ids: list[str] = []
    masks, boxes, counts = [], [], np.zeros(len(CLASSES), np.int64)
    for drawn in write_shards(root / "test-decorrelated", sizes.decorrelated, 0.0, streams[1]):
        ids += write_voc(one, drawn, len(ids))
        masks.append(drawn.masks.mean(axis=(1, 2, 3)))
        sides = drawn.boxes[:, 0, 2:] - drawn.boxes[:, 0, :2] + 1
        boxes.append(sides.prod(axis=1) / SIDE**2)
        counts += np.bincount(drawn.classes[:, 0], minlength=len(CLASSES))
    _write_list(one, ids)
    for _ in write_shards(root / "test-correlated", sizes.correlated, 1.0, streams[2]):
        pass
    two = root / "seg" / "VOCdevkit" / "Toy"
    _write_list(two, write_voc(two, draw_two(sizes.two, streams[3])))
    _write_texts(root, sizes)
    summary: dict[str, object] = {
        "seed": seed,
        "sizes": dataclasses.asdict(sizes),
        "classes": list(CLASSES),
        "own_texture_share": kept / sizes.train,
        "mask_share": float(np.concatenate(masks).mean()),
        "box_share": float(np.concatenate(boxes).mean()),
        "majority": int(counts.max()) / int(counts.sum()),
    }
    write_json(root / "world.json", summary)
    return summary
