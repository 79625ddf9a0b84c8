"""Which picture formats are opened at all, whatever a file's name says.

Pillow looks at the content, not at the name, and knows formats that start other programs (EPS runs
Ghostscript) or read other files. Every picture from elsewhere is opened here. Not here: decoding
and its errors.
"""

from pathlib import Path
from typing import IO

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats of pictures from the web; a JPEG of several pictures (MPO) is a JPEG here."""

FILE_FORMATS = (*FORMATS, "TIFF")
"""Formats of a person's own files and of benchmarks."""


def open_picture(source: Path | IO[bytes], formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open a picture of a known format by its header; its pixels are not decoded yet.

    Args:
        source: a file, or a stream of its bytes.
        formats: those that are tried, by Pillow's names.

    Raises:
        PIL.UnidentifiedImageError: none of these, or none at all.
        OSError: it cannot be read, or is no whole picture.
    """
    return Image.open(source, formats=formats)
