"""PASCAL VOC layout: JPEGImages/ID.jpg, SegmentationClass/ID.png, ImageSets/Segmentation/SPLIT.txt.

Not here: what the label ids mean (`labels`).
"""

from pathlib import Path

from lazyclip.base.errors import unknown

from .files import NotHereError, find_part, find_root, read_ids
from .folders import FolderReader


def open_lists(root: Path, folder: str, split: str, lists: str) -> tuple[Path, tuple[str, ...]]:
    """Find a VOC-like folder and the ids of a split.

    Args:
        root: data root, see `files.find_root`.
        folder: the data set's own folder, such as `VOCdevkit/VOC2012`.
        split: name of a list.
        lists: folder of the lists, such as `ImageSets/Segmentation`.

    Returns:
        The folder, and the ids in the order of the list.
    """
    found = find_root(root, folder, lists)
    file = found / lists / f"{split}.txt"
    if not file.is_file():
        known = [path.stem for path in (found / lists).glob("*.txt")]
        if not known:
            raise NotHereError(f"{file} does not exist; complete the data set")
        raise unknown("split", split, known, f"{file} does not exist")
    return found, tuple(read_ids(file))


def open_voc(root: Path, folder: str, split: str) -> FolderReader:
    """Open a split of a data set in VOC layout.

    Args:
        root: data root, see `files.find_root`.
        folder: the data set's own folder, such as `VOCdevkit/VOC2012`.
        split: name of a list in ImageSets/Segmentation.

    Raises:
        UserError: a folder or list is missing.
    """
    found, ids = open_lists(root, folder, split, "ImageSets/Segmentation")
    images, labels = find_part(found, "JPEGImages"), find_part(found, "SegmentationClass")
    return FolderReader(ids, images, ".jpg", labels, ".png")
