"""Readers: one module per folder layout, each returning pictures and stored labels unresized.

A new layout is one module with an `open_...` function and one line here. Where people keep labels
in two equivalent forms, a reader returns the same stored ids for both. Not here: protocols,
windows, models.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lazyclip.base.errors import UserError
from lazyclip.base.registry import Registry

from .ade20k import open_ade20k
from .cityscapes import open_cityscapes
from .coco import open_coco, open_coco_panoptic
from .context import open_context
from .files import NotHereError
from .labels import IGNORE, LABEL_RULES, Labels, to_ids
from .voc import open_voc

__all__ = [
    "IGNORE", "LABEL_RULES", "READERS", "NotHereError", "Reader", "check_files", "to_ids",
]  # fmt: skip


class Reader(Protocol):
    """What every layout offers; a reader can be sent to worker processes."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the split, in the order of its list."""

    @property
    def label_ids(self) -> tuple[str, ...]:
        """Ids that have a label file, where the folder is the split; none where a list is."""

    def image_file(self, name: str) -> Path:
        """Return the picture of an id."""

    def label_file(self, name: str) -> Path:
        """Return the label file of an id."""

    def read_label(self, name: str) -> Labels:
        """Read stored label ids H x W int64 alone."""

    def read(self, name: str) -> tuple[npt.NDArray[np.uint8], Labels]:
        """Read image H x W x 3 uint8 and stored label ids H x W int64."""


READERS: Registry[Callable[[Path, str, str], Reader]] = Registry("layout")
READERS.add("voc")(open_voc)
READERS.add("context")(open_context)
READERS.add("cityscapes")(open_cityscapes)
READERS.add("ade20k")(open_ade20k)
READERS.add("coco")(open_coco)
READERS.add("coco_panoptic")(open_coco_panoptic)


def check_files(reader: Reader, names: Sequence[str], most: int = 0) -> None:
    """Check that every id has its picture and label before any work is done.

    Args:
        reader: of the split.
        names: ids.
        most: files of a kind that may be missing.

    Raises:
        UserError: how many are missing, and the first.
    """
    for what, place in (("picture", reader.image_file), ("label file", reader.label_file)):
        missing = [place(name) for name in names if not place(name).is_file()]
        if len(missing) > most:
            raise UserError(
                f"{len(missing)} of {len(names)} ids of the split have no {what}; "
                f"the first expected is {missing[0]}; complete the data set, or name another list "
                "with --split"
            )
