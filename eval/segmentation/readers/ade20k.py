"""ADE20K as in the scene parsing challenge: images/ and annotations/, validation/ and training/.

The full ADE20K release (another tree, masks coded in colours) is another data set. Not here: what
the label ids mean (`labels`).
"""

from pathlib import Path

from lazyclip.base.errors import unknown

from .files import find_part, find_root
from .folders import FolderReader, list_ids, need_ids

SPLITS = {"train": "training", "val": "validation"}


def open_ade20k(root: Path, folder: str, split: str) -> FolderReader:
    """Open a split of the scene parsing data.

    Args:
        root: data root, see `files.find_root`.
        folder: the data set's own folder, such as `ADEChallengeData2016`.
        split: `train` or `val`.

    Raises:
        UserError: a folder is missing.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    found = find_root(root, folder, "annotations")
    images = find_part(found, f"images/{SPLITS[split]}")
    labels = find_part(found, f"annotations/{SPLITS[split]}")
    ids = need_ids(list_ids(images, ".jpg"), images, "ID.jpg")
    return FolderReader(
        ids, images, ".jpg", labels, ".png", label_ids=tuple(list_ids(labels, ".png"))
    )
