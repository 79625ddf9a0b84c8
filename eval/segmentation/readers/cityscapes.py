"""Cityscapes: leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png, gtFine/SPLIT/CITY/ID_gtFine_labelIds.png.

Where the labelIds are not there, labelTrainIds are read and turned back into labelIds. Not here:
what the labelIds become (`labels`).
"""

import functools
import os
from pathlib import Path

import numpy as np

from lazyclip.base.errors import UserError, unknown

from .files import find_part, find_root, read_labels
from .folders import FolderReader, commonest, list_ids, need_ids
from .labels import IGNORE, Labels, cityscapes_ids

IMAGE = "_leftImg8bit.png"
LABEL_IDS = "_gtFine_labelIds.png"
TRAIN_IDS = "_gtFine_labelTrainIds.png"
SPLITS = ("train", "val")


@functools.cache
def _to_label_ids() -> Labels:
    found = np.full(256, -1, dtype=np.int64)
    for label_id, train_id in cityscapes_ids(19).items():
        if train_id != IGNORE:
            found[train_id] = label_id
    found[IGNORE] = 0  # unlabelled
    return found


def read_train_ids(file: Path) -> Labels:
    """Read labelTrainIds as labelIds, H x W int64; 255 becomes 0, unlabelled.

    Raises:
        UserError: another value than 0..18 and 255.
    """
    stored = read_labels(file)
    ids = _to_label_ids()[stored]
    if (ids < 0).any():
        listed = ", ".join(map(str, np.unique(stored[ids < 0])[:5]))
        raise UserError(
            f"{file}: {int((ids < 0).sum())} pixels hold train ids {listed}; expected 0..18 and "
            f"255; use the labels of the download, ID{LABEL_IDS}"
        )
    return ids


def _ids(folder: Path, suffix: str) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        cities = sorted(entry.name for entry in entries if entry.is_dir())
    return [f"{city}/{name}" for city in cities for name in list_ids(folder / city, suffix)]


def open_cityscapes(root: Path, folder: str, split: str) -> FolderReader:
    """Open a split of Cityscapes; labelIds are taken where both forms are complete.

    Args:
        root: data root, see `files.find_root`.
        folder: the data set's own folder, such as `cityscapes`.
        split: `train` or `val`; the labels of test are not public.

    Raises:
        UserError: a folder is missing.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    found = find_root(root, folder, "leftImg8bit", "gtFine")
    images = find_part(found, f"leftImg8bit/{split}")
    labels = find_part(found, f"gtFine/{split}")
    ids = need_ids(_ids(images, IMAGE), images, f"CITY/ID{IMAGE}")
    chosen = commonest(ids, [(labels, LABEL_IDS), (labels, TRAIN_IDS)])[1]
    decode = read_labels if chosen == LABEL_IDS else read_train_ids
    return FolderReader(
        ids, images, IMAGE, labels, chosen, decode, label_ids=tuple(_ids(labels, chosen))
    )
