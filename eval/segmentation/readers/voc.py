"""PASCAL VOC layout: JPEGImages/ID.jpg, SegmentationClass/ID.png, ImageSets/Segmentation/SPLIT.txt.

Not here: what the label ids mean (`labels`).
"""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lazyclip.base.errors import UserError, unknown

from .files import check_pair, find_root, read_ids, read_image, read_labels
from .labels import Labels

LISTS = Path("ImageSets") / "Segmentation"


@dataclasses.dataclass(frozen=True)
class VocReader:
    """Pictures and stored labels of one split, by id."""

    folder: Path
    ids: tuple[str, ...]

    def image_file(self, name: str) -> Path:
        """Return the picture of an id."""
        return self.folder / "JPEGImages" / f"{name}.jpg"

    def label_file(self, name: str) -> Path:
        """Return the label file of an id."""
        return self.folder / "SegmentationClass" / f"{name}.png"

    def read(self, name: str) -> tuple[npt.NDArray[np.uint8], Labels]:
        """Read image H x W x 3 uint8 and stored label ids H x W int64 of one size.

        Raises:
            UserError: a missing or broken file, or two sizes.
        """
        image, turned = read_image(self.image_file(name))
        label = read_labels(self.label_file(name))
        check_pair(image, label, self.image_file(name), turned)
        return image, label


def open_voc(root: Path, folder: str, split: str) -> VocReader:
    """Open a split of a data set in VOC layout.

    Args:
        root: data root, see `files.find_root`.
        folder: the data set's own folder, such as `VOCdevkit/VOC2012`.
        split: name of a list in ImageSets/Segmentation.

    Raises:
        UserError: a folder or list is missing.
    """
    found = find_root(root, folder, str(LISTS))
    file = found / LISTS / f"{split}.txt"
    if not file.is_file():
        lists = [path.stem for path in (found / LISTS).glob("*.txt")]
        raise unknown("split", split, lists, f"{file} does not exist")
    for name in ("JPEGImages", "SegmentationClass"):
        if not (found / name).is_dir():
            raise UserError(f"{found / name} does not exist; expected beside {LISTS}")
    return VocReader(found, tuple(read_ids(file)))
