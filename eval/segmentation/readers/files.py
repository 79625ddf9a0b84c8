"""Pictures and label files to arrays, and the check that they fit each other.

Not here: where a benchmark keeps its files (one module each).
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from lazyclip.base.errors import UserError

from .labels import Labels

ORIENTATION = 0x0112  # EXIF tag


def find_root(root: Path, folder: str, proof: str) -> Path:
    """Find a benchmark's own folder from the data root a user gave.

    Args:
        root: the folder that holds `folder`, or any folder on the way down to it, or itself.
        folder: the benchmark's own folder, such as `VOCdevkit/VOC2012`.
        proof: a path that stands inside it, such as `ImageSets/Segmentation`.

    Raises:
        UserError: no such folder, with what was expected where.
    """
    if not root.is_dir():
        raise UserError(f"data root {root} is no folder; it should hold {folder}; give --data-root")
    parts = Path(folder).parts
    places = [root.joinpath(*parts[start:]) for start in range(len(parts) + 1)]
    for place in places:
        if (place / proof).exists():
            return place
    raise UserError(
        f"no {folder}/{proof} in data root {root}; unpack the data set so that "
        f"{places[0] / proof} exists, or give its place with --data-root"
    )


def read_ids(file: Path) -> list[str]:
    """Read a split list, one id a line; an empty list or an id given twice is an error.

    An id may hold folders (`frankfurt/000000_000294`) but not lead out of the data set: results are
    written under these names.
    """
    try:
        ids = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a list of image ids ({error})") from None
    ids = [name for name in ids if name]
    if not ids:
        raise UserError(f"{file} lists no image; expected one id a line")
    twice = (
        sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
    )
    if twice:
        raise UserError(f"{file}: {len(twice)} ids stand twice, the first is {twice[0]}; keep one")
    for name in ids:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{file}: '{name}' leads out of the data set; give plain image ids")
    return ids


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as opened:
            opened.load()
            return opened
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not readable as a picture ({error})") from None


def read_image(file: Path) -> tuple[npt.NDArray[np.uint8], bool]:
    """Read a picture, turned by its EXIF orientation as OpenCV does.

    Returns:
        H x W x 3 uint8, red green blue, and whether the orientation turned it.
    """
    opened = _open(file)
    turned = opened.getexif().get(ORIENTATION, 1) not in (0, 1)
    upright = ImageOps.exif_transpose(opened) if turned else opened
    return np.asarray(upright.convert("RGB"), dtype=np.uint8), turned


def read_labels(file: Path) -> Labels:
    """Read stored label ids, H x W int64, from an 8-bit palette or grey picture."""
    opened = _open(file)
    if opened.mode not in ("P", "L"):
        raise UserError(
            f"{file} has mode {opened.mode}; expected an 8-bit palette or grey picture whose "
            "values are label ids (colour-coded copies do not hold them); use the original files"
        )
    return np.asarray(opened, dtype=np.int64)


def check_pair(image: npt.NDArray[np.uint8], label: Labels, file: Path, turned: bool) -> None:
    """Check that a picture and its label have the same height and width."""
    if image.shape[:2] != label.shape:
        why = " (the picture's EXIF orientation turned it)" if turned else ""
        raise UserError(
            f"{file}: picture is {image.shape[1]}x{image.shape[0]}{why}, its label "
            f"{label.shape[1]}x{label.shape[0]}; labels are never resized, so use "
            "the pair that has one size"
        )
