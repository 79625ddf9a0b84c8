"""Pictures of a segmentation: coloured overlays for people, index pictures for programs.

Pillow and numpy only. Not here: which pictures are shown, and scores.
"""

import colorsys
import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from lazyclip.base.errors import UserError

from .readers import IGNORE

Pixels = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]
Entry = tuple[str, tuple[int, int, int] | None]  # of the legend; None: no box

OPACITY = 0.6
PALE = (255, 255, 255)  # where the truth leaves pixels out of the score
SMALLEST = 192  # shorter sides are enlarged by whole factors, so that a person can see them
MOST_NAMES = 16
MARGIN = 8
ROW = 20


@dataclasses.dataclass(frozen=True)
class Legend:
    """Names and colours of the classes: C names, colours C x 3 uint8."""

    names: tuple[str, ...]
    colours: Pixels


def generated_colours(classes: int) -> Pixels:
    """Make C colours apart from each other: hues by the golden ratio, brightness in turns."""
    rows = [
        colorsys.hsv_to_rgb(i * 0.618034 % 1.0, 0.85 if i % 2 else 0.6, (1.0, 0.8, 0.6)[i % 3])
        for i in range(classes)
    ]
    return np.round(np.array(rows) * 255).astype(np.uint8)


def read_palette(file: Path | None, classes: int) -> Pixels:
    """Read colours C x 3 uint8 from a csv `id,r,g,b`; None gives generated ones.

    Raises:
        UserError: not such a csv, or not one row for each of the classes in order.
    """
    if file is None:
        return generated_colours(classes)
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = [
                [int(row[key]) for key in ("id", "r", "g", "b")] for row in csv.DictReader(stream)
            ]
        colours = np.array([row[1:] for row in rows], dtype=np.uint8)
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: not readable as a palette id,r,g,b ({error})") from None
    if [row[0] for row in rows] != list(range(classes)):
        raise UserError(f"{file}: {len(rows)} rows; expected the ids 0..{classes - 1} in order")
    return colours


def paint(image: Pixels, ids: Ids, colours: Pixels) -> Pixels:
    """Lay class colours over a picture.

    Args:
        image: H x W x 3.
        ids: H x W, 0..C-1 or 255, which becomes pale.
        colours: C x 3.
    """
    table = np.full((IGNORE + 1, 3), PALE, dtype=np.float32)
    table[: len(colours)] = colours
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    mixed = (1 - OPACITY) * grey + OPACITY * table[ids]
    return np.round(mixed).astype(np.uint8)


def paint_ids(ids: Ids, colours: Pixels) -> Pixels:
    """Paint a label map H x W (0..C-1, or 255, which becomes pale) in the colours C x 3."""
    table = np.full((IGNORE + 1, 3), PALE, dtype=np.uint8)
    table[: len(colours)] = colours
    painted: Pixels = table[ids]
    return painted


def _font(size: int = 13) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _enlarge(pixels: Pixels) -> Image.Image:
    factor = -(-SMALLEST // min(pixels.shape[:2]))
    opened = Image.fromarray(pixels)
    return opened.resize((opened.width * factor, opened.height * factor), Image.Resampling.NEAREST)


def legend_entries(truth: Ids, prediction: Ids, legend: Legend) -> list[Entry]:
    """List the classes in sight: those of the truth first, then by area, at most `MOST_NAMES`."""
    labelled = np.bincount(truth.ravel(), minlength=IGNORE + 1)
    seen = labelled + np.bincount(prediction.ravel(), minlength=IGNORE + 1)
    known = [i for i in range(len(legend.names)) if seen[i]]
    known.sort(key=lambda i: (labelled[i] == 0, -seen[i]))
    entries: list[Entry] = []
    if labelled[IGNORE]:
        entries.append(("left out of the score", PALE))
    for i in known[:MOST_NAMES]:
        red, green, blue = (int(v) for v in legend.colours[i])
        entries.append((legend.names[i], (red, green, blue)))
    if len(known) > MOST_NAMES:
        entries.append((f"and {len(known) - MOST_NAMES} more", None))
    return entries


def _draw_legend(entries: Sequence[Entry], width: int) -> Image.Image:
    """Draw coloured boxes with names in rows of at most `width` pixels."""
    font = _font()
    places, x, y = [], MARGIN, 0
    for name, _ in entries:
        wide = ROW + int(font.getlength(name)) + 2 * MARGIN
        if x > MARGIN and x + wide > width:
            x, y = MARGIN, y + ROW
        places.append((x, y))
        x += wide
    drawn = Image.new("RGB", (width, y + ROW), "white")
    pen = ImageDraw.Draw(drawn)
    for (name, colour), (left, top) in zip(entries, places, strict=True):
        if colour is not None:
            pen.rectangle((left, top + 3, left + 12, top + 15), fill=colour, outline="black")
        pen.text((left + 17, top + 1), name, fill="black", font=font)
    return drawn


def overlay(image: Pixels, truth: Ids, prediction: Ids, legend: Legend) -> Image.Image:
    """Put picture, truth and prediction side by side, with the classes in sight below.

    Args:
        image: H x W x 3.
        truth: H x W, 0..C-1 or 255.
        prediction: H x W, 0..C-1.
        legend: names and colours.
    """
    entries = legend_entries(truth, prediction, legend)
    return _sheet(
        [
            ("picture", image),
            ("truth", paint(image, truth, legend.colours)),
            ("prediction", paint(image, prediction, legend.colours)),
        ],
        entries,
    )


def overlay_alone(image: Pixels, prediction: Ids, legend: Legend) -> Image.Image:
    """Put picture H x W x 3 and prediction H x W side by side, with the classes in sight below."""
    nothing = np.zeros((0, 0), dtype=np.int64)
    panels = [("picture", image), ("prediction", paint(image, prediction, legend.colours))]
    return _sheet(panels, legend_entries(nothing, prediction, legend))


def _sheet(titled: Sequence[tuple[str, Pixels]], entries: Sequence[Entry]) -> Image.Image:
    """Put panels of one size side by side under their titles, a legend below."""
    panels = [(title, _enlarge(pixels)) for title, pixels in titled]
    wide, high = panels[0][1].size
    width = len(panels) * (wide + MARGIN) + MARGIN
    below = _draw_legend(entries, width)
    sheet = Image.new("RGB", (width, ROW + high + MARGIN + below.height + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (title, panel) in enumerate(panels):
        left = MARGIN + index * (wide + MARGIN)
        pen.text((left, 2), title, fill="black", font=_font())
        sheet.paste(panel, (left, ROW))
    sheet.paste(below, (0, ROW + high + MARGIN))
    return sheet


def save_ids(prediction: Ids, file: Path) -> None:
    """Save a label map as a PNG of 8 bits and one channel whose values are the class ids."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(prediction.astype(np.uint8)).save(file)
