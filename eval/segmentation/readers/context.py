"""PASCAL Context: JPEGImages/ID.jpg, and labels as PNG of 60 ids or as the raw .mat of 459 ids.

PNG: SegmentationClassContext/ID.png, as mmsegmentation's converter writes them (0 background,
1..59). Raw: trainval/ID.mat, or ID.mat in SegmentationClassContext, with the array `LabelMap`.
Lists: ImageSets/SegmentationContext/SPLIT.txt. Not here: what the 60 ids become (`labels`).
"""

import functools
import importlib
import zlib
from pathlib import Path

import numpy as np

from lazyclip.base.errors import UserError

from .files import find_part, read_labels
from .folders import FolderReader, commonest
from .labels import Labels, read_table
from .voc import open_lists

PNG_FOLDER = "SegmentationClassContext"
MAT_FOLDER = "trainval"
ARRAY = "LabelMap"
# What scipy raises on files that are cut short, damaged, or of another kind.
BROKEN = (
    OSError, ValueError, TypeError, KeyError, IndexError, EOFError, NotImplementedError, zlib.error,
)  # fmt: skip


@functools.cache
def _to_60() -> Labels:
    table = read_table("context459_to_60_59", "id459", "id60")
    found = np.full(max(table) + 1, -1, dtype=np.int64)
    found[list(table)] = list(table.values())
    return found


def _load_mat(file: Path) -> Labels:
    try:
        matlab = importlib.import_module("scipy.io.matlab")
    except ImportError:
        raise UserError(
            f"{file}: reading .mat files needs scipy; pip install scipy, or use the PNG labels in "
            f"{PNG_FOLDER}"
        ) from None
    try:
        loaded = matlab.loadmat(str(file), variable_names=[ARRAY])[ARRAY]
        return np.asarray(loaded).astype(np.int64, casting="unsafe")
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (*BROKEN, matlab.MatReadError) as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"{file}: not readable as a .mat file with the array {ARRAY} ({text}); get it again"
        ) from None


def read_mat(file: Path) -> Labels:
    """Read a .mat of 459 ids as the 60 ids of the PNGs, H x W int64.

    Raises:
        UserError: a broken file, scipy is missing, or an id outside 0..459.
    """
    raw = _load_mat(file)
    table = _to_60()
    if raw.ndim != 2:
        raise UserError(f"{file}: {ARRAY} has shape {raw.shape}; expected height x width")
    wrong = (raw < 0) | (raw >= len(table))
    if wrong.any():
        listed = ", ".join(map(str, np.unique(raw[wrong])[:5]))
        raise UserError(
            f"{file}: {int(wrong.sum())} pixels hold label ids {listed}; expected 0.."
            f"{len(table) - 1} (459 classes); use the benchmark's own files"
        )
    return table[raw]


def read_context(file: Path) -> Labels:
    """Read a label file of either form as the 60 ids of the PNGs, H x W int64."""
    return read_mat(file) if file.suffix == ".mat" else read_labels(file)


def open_context(root: Path, folder: str, split: str) -> FolderReader:
    """Open a split of PASCAL Context; PNG labels are taken where both forms are complete.

    Args:
        root: data root, see `files.find_root`.
        folder: the data set's own folder, such as `VOCdevkit/VOC2010`.
        split: name of a list in ImageSets/SegmentationContext.

    Raises:
        UserError: a folder or list is missing.
    """
    found, ids = open_lists(root, folder, split, "ImageSets/SegmentationContext")
    images = find_part(found, "JPEGImages")
    find_part(found, PNG_FOLDER, MAT_FOLDER)
    forms = [(found / PNG_FOLDER, ".png"), (found / MAT_FOLDER, ".mat")]
    labels, suffix = commonest(ids, [*forms, (found / PNG_FOLDER, ".mat")])
    return FolderReader(ids, images, ".jpg", labels, suffix, read_context)
