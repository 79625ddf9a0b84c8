"""Pictures and label files to arrays, and the check that they fit each other.

Not here: where a benchmark keeps its files (one module each).
"""

import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from lazyclip.base.errors import UserError
from lazyclip.base.pictures import FILE_FORMATS, open_picture

from .labels import Labels

ORIENTATION = 0x0112  # EXIF tag
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width
# What Pillow raises on files that are cut short, damaged, or no pictures.
BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


class NotHereError(UserError):
    """A data set, or a part of it, is not where it is looked for.

    `depth` says how much was found: 0 nothing, 1 its folder, 2 a part of what belongs in it.
    """

    def __init__(self, text: str, depth: int = 2) -> None:
        """Hold the message."""
        super().__init__(text)
        self.depth = depth


def find_root(root: Path, folder: str, *proofs: str) -> Path:
    """Find a benchmark's own folder from the data root a user gave.

    Args:
        root: the folder that holds `folder`, or any folder on the way down to it, or itself.
        folder: the benchmark's own folder, such as `VOCdevkit/VOC2012`.
        proofs: paths of which at least one stands inside it, such as `ImageSets/Segmentation`.

    Raises:
        NotHereError: no such folder, with what was expected where.
    """
    if not root.is_dir():
        raise NotHereError(
            f"data root {root} is no folder; it should hold {folder}; give --data-root", 0
        )
    parts = Path(folder).parts
    places = [root.joinpath(*parts[start:]) for start in range(len(parts) + 1)]
    for place in places:
        if any((place / proof).exists() for proof in proofs):
            return place
    wanted = " or ".join(f"{folder}/{proof}" for proof in proofs)
    raise NotHereError(
        f"no {wanted} in data root {root}; unpack the data set so that "
        f"{places[0] / proofs[0]} exists, or give its place with --data-root",
        int(places[0].is_dir()),
    )


def find_part(folder: Path, *names: str) -> Path:
    """Return the first of several folders that exists in a data set's own folder.

    Raises:
        NotHereError: none does.
    """
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    others = f" (nor {', '.join(names[1:])})" if len(names) > 1 else ""
    raise NotHereError(f"{folder / names[0]} does not exist{others}; complete the data set")


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


def _orientation(opened: Image.Image) -> int:
    if opened.format == "PNG" and "exif" not in opened.info:
        return 1  # asking further would decode the picture a second time
    return int(opened.getexif().get(ORIENTATION, 1)) or 1


def _open(file: Path, coarse: bool = False) -> Image.Image:
    """Decode a picture; `coarse` lets a JPEG come out smaller, for a check of its data alone."""
    try:
        with open_picture(file, FILE_FORMATS) as opened:
            if coarse:
                opened.draft("L", (1, 1))
            opened.load()
            return opened
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except BROKEN as error:
        why = "the file is empty" if file.is_file() and not file.stat().st_size else error
        raise UserError(f"{file}: not readable as a picture ({why}); get it again") from None


def picture_size(file: Path) -> tuple[int, int, int]:
    """Read height and width as shown, and the EXIF orientation; the data are decoded coarsely.

    Raises:
        UserError: no such file, no picture, or one cut short.
    """
    try:
        with open_picture(file, FILE_FORMATS) as head:
            width, height = head.size
    except BROKEN:
        pass  # the next line says so
    orientation = _orientation(_open(file, coarse=True))
    return (width, height, orientation) if orientation in SIDEWAYS else (height, width, orientation)


def read_image(file: Path) -> tuple[npt.NDArray[np.uint8], bool]:
    """Read a picture, turned by its EXIF orientation as OpenCV does.

    Returns:
        H x W x 3 uint8, red green blue, and whether the orientation turned it.
    """
    opened = _open(file)
    turned = _orientation(opened) != 1
    upright = ImageOps.exif_transpose(opened) if turned else opened
    return np.asarray(_to_rgb(upright, file), dtype=np.uint8), turned


def _to_rgb(opened: Image.Image, file: Path) -> Image.Image:
    """Convert to RGB; Pillow's own conversion clips what has more than 8 bits to white."""
    if opened.mode.startswith("I;16"):
        grey = np.asarray(opened, dtype=np.uint16).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if opened.mode in ("I", "F"):
        raise UserError(
            f"{file} has mode {opened.mode} (32 bits a pixel), whose range is not known; save it "
            "as an 8-bit picture"
        )
    return opened.convert("RGB")


def read_labels(file: Path) -> Labels:
    """Read stored label ids, H x W int64, from an 8-bit palette or grey picture."""
    opened = _open(file)
    if opened.mode not in ("P", "L"):
        raise UserError(
            f"{file} has mode {opened.mode}; expected an 8-bit palette or grey picture whose "
            "values are label ids (colour-coded copies do not hold them); use the original files"
        )
    return np.asarray(opened, dtype=np.int64)


def read_colour_ids(file: Path) -> Labels:
    """Read ids red + 256 green + 65536 blue, H x W int64, from a colour picture."""
    opened = _open(file)
    if opened.mode != "RGB":
        raise UserError(
            f"{file} has mode {opened.mode}; expected the colours RGB of a COCO panoptic map; use "
            "the original files"
        )
    return np.asarray(opened, dtype=np.int64) @ np.array([1, 256, 65536])


def check_pair(image: npt.NDArray[np.uint8], label: Labels, file: Path, turned: bool) -> None:
    """Check that a picture and its label have the same height and width."""
    if image.shape[:2] != label.shape:
        why = " (the picture's EXIF orientation turned it)" if turned else ""
        raise UserError(
            f"{file}: picture is {image.shape[1]}x{image.shape[0]}{why}, its label "
            f"{label.shape[1]}x{label.shape[0]}; labels are never resized, so use "
            "the pair that has one size"
        )
