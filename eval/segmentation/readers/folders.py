"""The reader all layouts share: pictures in one folder, labels in another, by id and suffix.

A layout's module finds the folders and the ids. Files are chosen by exact name, so that converted
copies beside a label file change nothing. Not here: what the label ids mean (`labels`).
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .files import NotHereError, check_pair, read_image, read_labels
from .labels import Labels


@dataclasses.dataclass(frozen=True)
class FolderReader:
    """Pictures and stored labels of one split, by id; can be sent to worker processes.

    Attributes:
        ids: ids of the split, in the order of its list, or sorted.
        images: folder of the pictures.
        image_suffix: what follows an id in a picture's name.
        labels: folder of the label files.
        label_suffix: what follows an id in a label file's name.
        decode: label file -> stored ids H x W, the same whichever form lies on disk.
        label_ids: ids that have a label file, where the folder is the split; else none.
    """

    ids: tuple[str, ...]
    images: Path
    image_suffix: str
    labels: Path
    label_suffix: str
    decode: Callable[[Path], Labels] = read_labels
    label_ids: tuple[str, ...] = ()

    def image_file(self, name: str) -> Path:
        """Return the picture of an id."""
        return self.images / f"{name}{self.image_suffix}"

    def label_file(self, name: str) -> Path:
        """Return the label file of an id."""
        return self.labels / f"{name}{self.label_suffix}"

    def read_label(self, name: str) -> Labels:
        """Read stored label ids H x W int64 alone.

        Raises:
            UserError: a missing or broken file, or one of another form.
        """
        return self.decode(self.label_file(name))

    def read(self, name: str) -> tuple[npt.NDArray[np.uint8], Labels]:
        """Read image H x W x 3 uint8 and stored label ids H x W int64 of one size.

        Raises:
            UserError: a missing or broken file, or two sizes.
        """
        image, turned = read_image(self.image_file(name))
        label = self.read_label(name)
        check_pair(image, label, self.image_file(name), turned)
        return image, label


def list_ids(folder: Path, suffix: str, pattern: str = r"[^.].*") -> list[str]:
    """List the ids of a folder: names less the suffix that match a pattern as a whole, sorted.

    Args:
        folder: where the files are.
        suffix: what follows the id, such as `.png`.
        pattern: regular expression of an id; by default whatever does not start with a dot.
    """
    form = re.compile(f"({pattern}){re.escape(suffix)}")
    with os.scandir(folder) as entries:
        found = [form.fullmatch(entry.name) for entry in entries]
    return sorted(match[1] for match in found if match)


def need_ids(ids: Sequence[str], folder: Path, form: str) -> tuple[str, ...]:
    """Return the ids as a tuple.

    Raises:
        NotHereError: there are none; `form` is what the files should be called.
    """
    if not ids:
        raise NotHereError(f"{folder} holds no file named {form}; unpack it again")
    return tuple(ids)


def commonest(ids: Sequence[str], forms: Sequence[tuple[Path, str]]) -> tuple[Path, str]:
    """Choose among forms (folder, suffix) of label files the one most ids have; first wins ties."""
    counts = [sum((folder / f"{n}{suffix}").is_file() for n in ids) for folder, suffix in forms]
    return forms[counts.index(max(counts))]
