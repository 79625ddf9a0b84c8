"""Tiny copies of every segmentation benchmark in the exact form it has on disk.

`make_benchmark(root, "cityscapes")` writes the folders, names and encodings of the real one with
pictures of random blocks: non-square, of several sizes, one grey JPEG where pictures are JPEG.
Decoys stand where real copies have them. What the stored ids mean is read here from the tables
again, apart from the code under test.
"""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.toy_voc import make_voc, palette_png

TABLES = Path(__file__).resolve().parents[1] / "configs" / "classes"
SIZES = ((50, 70), (64, 40), (33, 120))  # height, width
CONTEXT = Path("VOCdevkit") / "VOC2010"
STORED = {  # stored ids that the toys draw from
    "voc": (0, 1, 7, 15, 20, 255),
    "context": (0, 1, 2, 30, 59),
    "cityscapes": (0, 1, 6, 7, 8, 9, 11, 23, 24, 26, 31, 33),
    "ade20k": (0, 1, 2, 75, 150),
    "coco": (0, 10, 12, 43, 89, 91, 156, 181, 255),
    "panoptic": (0, 1, 11, 13, 90, 92, 200),  # COCO category ids
}


def table(name: str, stored: str, wanted: str) -> dict[int, int]:
    """Read two columns of a table, rows with an empty target left out."""
    with (TABLES / f"{name}.csv").open(encoding="utf-8") as stream:
        return {int(r[stored]): int(r[wanted]) for r in csv.DictReader(stream) if r[wanted]}


def blocks(seed: int, size: tuple[int, int], values: Sequence[int], cell: int = 8) -> np.ndarray:
    """Draw H x W int64 of square blocks; every value occurs where there is room."""
    height, width = size
    rows, columns = -(-height // cell), -(-width // cell)
    drawn = np.random.default_rng(seed).choice(values, rows * columns)
    drawn[: len(values)] = list(values)[: len(drawn)]
    grid = np.random.default_rng(seed + 1).permutation(drawn).reshape(rows, columns)
    return np.kron(grid, np.ones((cell, cell), dtype=np.int64))[:height, :width]


def picture(file: Path, seed: int, size: tuple[int, int], grey: bool = False) -> None:
    """Save a picture of coloured blocks; the suffix gives the format."""
    draw = np.random.default_rng(seed + 100)
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    drawn = draw.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    whole = np.kron(drawn, np.ones((8, 8, 1), dtype=np.uint8))[: size[0], : size[1]]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(whole[:, :, 0] if grey else whole).save(file)


def grey_png(file: Path, ids: np.ndarray) -> None:
    """Save ids H x W as an 8-bit grey PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids.astype(np.uint8)).save(file)


def make_context(root: Path, split: str = "val", forms: Sequence[str] = ("png",)) -> Path:
    """Write PASCAL Context with PNG labels of 60 ids, raw .mat labels of 459 ids, or both."""
    folder = root / CONTEXT
    raw_of = {to: raw for raw, to in table("context459_to_60_59", "id459", "id60").items() if to}
    names = [f"2008_{index:06d}" for index in range(3)]
    for index, name in enumerate(names):
        ids = blocks(index, SIZES[index], STORED["context"])
        picture(folder / "JPEGImages" / f"{name}.jpg", index, SIZES[index], grey=index == 1)
        if "png" in forms:
            (folder / "SegmentationClassContext").mkdir(parents=True, exist_ok=True)
            palette_png(folder / "SegmentationClassContext" / f"{name}.png", ids)
        if "mat" in forms:
            from scipy.io import savemat  # only this form needs it

            # Background is whatever of the 459 is none of the 59, such as 1 (accordion).
            raw = np.vectorize(lambda i: raw_of.get(i, 1 if i % 2 else 0))(ids)
            (folder / "trainval").mkdir(parents=True, exist_ok=True)
            savemat(folder / "trainval" / f"{name}.mat", {"LabelMap": raw.astype(np.uint16)})
    lists = folder / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    return folder


def make_cityscapes(
    root: Path, split: str = "val", forms: Sequence[str] = ("labelIds", "labelTrainIds")
) -> Path:
    """Write Cityscapes with labelIds, labelTrainIds, or both, and 16-bit instanceIds as decoys."""
    folder = root / "cityscapes"
    to_train = table("cityscapes_id_to_train", "label_id", "train_id")
    stems = ("frankfurt/frankfurt_000000_000294", "lindau/lindau_000000_000019",
             "lindau/lindau_000001_000019")  # fmt: skip
    for index, stem in enumerate(stems):
        ids = blocks(index, SIZES[index], STORED["cityscapes"])
        forms_of = {"labelIds": ids, "labelTrainIds": np.vectorize(to_train.get)(ids)}
        picture(folder / "leftImg8bit" / split / f"{stem}_leftImg8bit.png", index, SIZES[index])
        for form in forms:
            grey_png(folder / "gtFine" / split / f"{stem}_gtFine_{form}.png", forms_of[form])
        instances = folder / "gtFine" / split / f"{stem}_gtFine_instanceIds.png"
        Image.fromarray((ids * 1000).astype(np.uint16)).save(instances)
    return folder


def make_ade20k(root: Path, split: str = "val") -> Path:
    """Write ADE20K as in the scene parsing challenge."""
    folder = root / "ADEChallengeData2016"
    sub = {"train": "training", "val": "validation"}[split]
    for index in range(3):
        name = f"ADE_{split}_{index + 1:08d}"
        picture(folder / "images" / sub / f"{name}.jpg", index, SIZES[index], grey=index == 2)
        ids = blocks(index, SIZES[index], STORED["ade20k"])
        grey_png(folder / "annotations" / sub / f"{name}.png", ids)
    return folder


def make_coco(
    root: Path,
    split: str = "val",
    folder: str = "coco_stuff164k",
    images: str = "images",
    labels: str = "annotations",
    decoys: bool = True,
) -> Path:
    """Write COCO with raw stuffthingmaps; decoys are the two converted copies of each map.

    Args:
        root: data root.
        split: `train` or `val`.
        folder: the data set's own folder.
        images: folder that holds val2017 with the pictures, `.` for the data set's own.
        labels: folder that holds val2017 with the maps.
        decoys: whether to write them, with nonsense in them.
    """
    place, year = root / folder, f"{split}2017"
    for index, number in enumerate((139, 285, 632)):
        name = f"{number:012d}"
        picture(place / images / year / f"{name}.jpg", index, SIZES[index], grey=index == 0)
        ids = blocks(index, SIZES[index], STORED["coco"])
        grey_png(place / labels / year / f"{name}.png", ids)
        if decoys:
            for kind in ("labelTrainIds", "instanceTrainIds"):
                grey_png(place / labels / year / f"{name}_{kind}.png", ids * 0 + 200 + index)
    return place


def make_panoptic(root: Path, split: str = "val", folder: str = "coco") -> Path:
    """Write COCO with panoptic PNGs (id = red + 256 green + 65536 blue) and their json."""
    place, year = root / folder, f"{split}2017"
    entries = []
    for index, number in enumerate((139, 285, 632)):
        name = f"{number:012d}"
        picture(place / "images" / year / f"{name}.jpg", index, SIZES[index])
        categories = blocks(index, SIZES[index], STORED["panoptic"])
        ids = np.where(categories == 0, 0, categories * 40009 + 7)  # segments, all three bytes used
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1)
        file = place / "annotations" / f"panoptic_{year}" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours.astype(np.uint8)).save(file)
        segments = [
            {"id": int(c) * 40009 + 7, "category_id": int(c), "iscrowd": 0}
            for c in np.unique(categories)
            if c
        ]
        entries.append({"image_id": number, "file_name": file.name, "segments_info": segments})
    listed = place / "annotations" / f"panoptic_{year}.json"
    listed.write_text(json.dumps({"images": [], "annotations": entries, "categories": []}))
    return place


MAKERS: dict[str, Callable[[Path], Path]] = {
    "voc20": lambda root: make_voc(root, stored=STORED["voc"]),
    "voc21": lambda root: make_voc(root, stored=STORED["voc"]),
    "context59": make_context,
    "context60": make_context,
    "cityscapes": make_cityscapes,
    "ade20k": make_ade20k,
    "coco_stuff": make_coco,
    "coco_object": make_coco,
}


def make_benchmark(root: Path, dataset: str) -> Path:
    """Write a toy of one of the eight benchmarks below a data root; returns its own folder."""
    return MAKERS[dataset](root)
