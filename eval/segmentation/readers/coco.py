"""COCO 2017: pictures, and labels as stuffthingmaps PNG or as panoptic PNG with its json.

Pictures: images/val2017/ID.jpg or val2017/ID.jpg. Maps: stuffthingmaps/val2017/ID.png or
annotations/val2017/ID.png, the raw ones; `ID_labelTrainIds.png` and `ID_instanceTrainIds.png`
beside them are not looked at. Not here: what the values become (`labels`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lazyclip.base.config import read_json
from lazyclip.base.errors import UserError, unknown

from .files import find_part, find_root, read_colour_ids
from .folders import FolderReader, list_ids, need_ids
from .labels import Labels

SPLITS = {"train": "train2017", "val": "val2017"}
DIGITS = r"\d{12}"


def _names(split: str) -> str:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return SPLITS[split]


def open_coco(root: Path, folder: str, split: str) -> FolderReader:
    """Open a split of COCO with the raw stuffthingmaps.

    Args:
        root: data root, see `files.find_root`.
        folder: the data set's own folder, such as `coco_stuff164k` or `coco`.
        split: `train` or `val`.

    Raises:
        UserError: a folder is missing, or holds no raw map.
    """
    name = _names(split)
    places = (f"stuffthingmaps/{name}", f"annotations/{name}")
    found = find_root(root, folder, *places)
    images = find_part(found, f"images/{name}", name)
    ids = need_ids(list_ids(images, ".jpg", DIGITS), images, "000000000139.jpg")
    there = [found / place for place in places if (found / place).is_dir()]
    maps = {place: list_ids(place, ".png", DIGITS) for place in there}
    labels = max(there, key=lambda place: len(maps[place]))
    label_ids = need_ids(maps[labels], labels, "000000000139.png (the raw map)")
    return FolderReader(ids, images, ".jpg", labels, ".png", label_ids=label_ids)


@dataclasses.dataclass(frozen=True)
class PanopticDecoder:
    """Panoptic PNG -> COCO category ids H x W, 0 where nothing is labelled.

    Attributes:
        segments: stem of the file -> segment id -> category id, as in the json.
    """

    segments: Mapping[str, Mapping[int, int]]

    def __call__(self, file: Path) -> Labels:
        """Read one map.

        Raises:
            UserError: a broken file, or a segment the json does not list.
        """
        stored = read_colour_ids(file)
        known = sorted({0: 0, **self.segments[file.stem]}.items())
        ids, categories = np.array(known, dtype=np.int64).T
        place = np.searchsorted(ids, stored).clip(max=len(ids) - 1)
        lost = ids[place] != stored
        if lost.any():
            listed = ", ".join(map(str, np.unique(stored[lost])[:5]))
            raise UserError(
                f"{file}: segments {listed} are not in the panoptic json; use the PNGs and the "
                "json of one release"
            )
        return categories[place]


def _read_segments(file: Path) -> dict[str, dict[int, int]]:
    loaded: dict[str, Any] = read_json(file)
    try:
        return {
            Path(entry["file_name"]).stem: {
                int(segment["id"]): int(segment["category_id"])
                for segment in entry["segments_info"]
            }
            for entry in loaded["annotations"]
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file}: no COCO panoptic json ({error!r} in its annotations); use the original file"
        ) from None


def open_coco_panoptic(root: Path, folder: str, split: str) -> FolderReader:
    """Open a split of COCO with panoptic PNGs and their json.

    Args:
        root: data root, see `files.find_root`.
        folder: the data set's own folder, such as `coco`.
        split: `train` or `val`.

    Raises:
        UserError: a folder or the json is missing, or the json is of another form.
    """
    name = _names(split)
    listed = f"annotations/panoptic_{name}.json"
    found = find_root(root, folder, listed)
    images = find_part(found, f"images/{name}", name)
    labels = find_part(found, f"annotations/panoptic_{name}", f"panoptic_{name}")
    segments = _read_segments(found / listed)
    ids = need_ids(sorted(segments), found / listed, "000000000139.png in its annotations")
    return FolderReader(
        ids, images, ".jpg", labels, ".png", PanopticDecoder(segments),
        label_ids=tuple(list_ids(labels, ".png", DIGITS)),
    )  # fmt: skip
