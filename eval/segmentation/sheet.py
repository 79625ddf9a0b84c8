"""Contact sheets: rows pictures, columns picture, truth and one for each result.

Made from the files that a scored data set leaves in `shown/` (ID.image.png, ID.truth.png,
ID.prediction.png). Not here: which results are shown.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lazyclip.base.errors import UserError
from lazyclip.base.pictures import open_picture
from lazyclip.base.resources import config_names

from .overlays import MARGIN, PALE, Entry, Pixels, generated_colours, read_palette
from .protocol import read_task

log = logging.getLogger(__name__)
CELL = 240  # width of a picture on the sheet, in pixels
TALLEST = 2.0  # a picture's height at most, in widths: taller ones are made narrower
LINE = 17
MOST_NAMES = 24


@dataclasses.dataclass(frozen=True)
class Column:
    """A result on the sheet: its title, lines split by newlines, and its `shown` folder."""

    title: str
    folder: Path


def _ids(folder: Path) -> set[str]:
    return {file.name.removesuffix(".prediction.png") for file in folder.glob("*.prediction.png")}


def _open(folder: Path, name: str, what: str) -> Pixels:
    file = folder / f"{name}.{what}.png"
    try:
        with open_picture(file) as opened:
            return np.asarray(opened.convert("RGB"), dtype=np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file}: not readable as a picture ({error}); score it again") from None


def palette_of(dataset: str, classes: int) -> Pixels:
    """Return the colours C x 3 that results of a data set are painted in."""
    if dataset not in config_names("protocols", ".yaml"):
        return generated_colours(classes)
    return read_palette(read_task(dataset).benchmark.palette, classes)


def colours_in(pixels: Sequence[Pixels], names: Sequence[str], colours: Pixels) -> list[Entry]:
    """List the classes painted in label maps, by area, and what is left out of the score.

    Args:
        pixels: painted label maps, H x W x 3 each.
        names: C names.
        colours: C x 3.
    """
    areas: dict[tuple[int, int, int], int] = {}
    for picture in pixels:
        found, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
        for (red, green, blue), count in zip(found.tolist(), counts.tolist(), strict=True):
            areas[red, green, blue] = areas.get((red, green, blue), 0) + count
    known: list[tuple[int, Entry]] = []
    for name, (red, green, blue) in zip(names, colours.tolist(), strict=True):
        area = areas.pop((red, green, blue), 0)
        if area:
            known.append((area, (name, (red, green, blue))))
    known.sort(key=lambda pair: -pair[0])
    entries: list[Entry] = [entry for _, entry in known[:MOST_NAMES]]
    if len(known) > MOST_NAMES:
        entries.append((f"and {len(known) - MOST_NAMES} more", None))
    if areas.pop(PALE, 0):
        entries.insert(0, ("left out of the score", PALE))
    if areas:
        log.warning("%d colours on the sheet belong to no class of the legend", len(areas))
    return entries


def _scaled(pixels: Pixels, size: tuple[int, int], smooth: bool) -> Image.Image:
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return Image.fromarray(pixels).resize(size, how)


def _size(pixels: Pixels) -> tuple[int, int]:
    height, width = pixels.shape[:2]
    scale = min(CELL / width, TALLEST * CELL / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _font(bold_size: int = 13) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(bold_size)


def _wrap(title: str) -> list[str]:
    """Break a title into lines that fit a column."""
    font, lines = _font(), []
    for text in title.split("\n"):
        line = ""
        for word in text.split(" "):
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > CELL:
                lines.append(line)
                longer = word
            line = longer
        while font.getlength(line) > CELL and len(line) > 1:
            cut = next(i for i in range(len(line), 0, -1) if font.getlength(line[:i]) <= CELL)
            lines.append(line[:cut])
            line = line[cut:]
        lines.append(line)
    return lines


def _legend(entries: Sequence[Entry], width: int) -> Image.Image:
    font = _font()
    places, x, y = [], MARGIN, 0
    for name, _ in entries:
        wide = 3 * LINE + int(font.getlength(name))
        if x > MARGIN and x + wide > width:
            x, y = MARGIN, y + LINE + 3
        places.append((x, y))
        x += wide
    drawn = Image.new("RGB", (width, y + LINE + 3), "white")
    pen = ImageDraw.Draw(drawn)
    for (name, colour), (left, top) in zip(entries, places, strict=True):
        if colour is not None:
            pen.rectangle((left, top + 2, left + 13, top + 15), fill=colour, outline="black")
        pen.text((left + 18, top + 1), name, fill="black", font=font)
    return drawn


def shared_ids(columns: Sequence[Column]) -> list[str]:
    """Return the pictures that every result shows, in order of their names.

    Raises:
        UserError: there are none.
    """
    held = [_ids(column.folder) for column in columns]
    shared = set.intersection(*held)
    if not shared:
        raise UserError(
            "--sheet: the results show no picture in common; score them with the same --limit and "
            "--overlays"
        )
    left = set.union(*held) - shared
    if left:
        log.warning("%d pictures are not shown by every result and stay off the sheet", len(left))
    return sorted(shared)


def contact_sheet(dataset: str, names: Sequence[str], columns: Sequence[Column]) -> Image.Image:
    """Draw one sheet.

    Args:
        dataset: name of the benchmark, for its colours.
        names: C class names.
        columns: results, left to right.

    Raises:
        UserError: no picture in common, or one that cannot be read.
    """
    ids = shared_ids(columns)
    rows = []
    painted: list[Pixels] = []
    for name in ids:
        first = columns[0].folder
        image, truth = _open(first, name, "image"), _open(first, name, "truth")
        found = [_open(column.folder, name, "prediction") for column in columns]
        for column in columns[1:]:
            if not np.array_equal(_open(column.folder, name, "truth"), truth):
                log.warning("%s: the truth of %s is another one than on the sheet", name,
                            column.folder)  # fmt: skip
        painted += [truth, *found]
        size = _size(image)
        cells = [_scaled(image, size, True), *(_scaled(p, size, False) for p in (truth, *found))]
        rows.append((name, cells))
    return _draw(rows, ["picture", "truth", *(c.title for c in columns)],
                 colours_in(painted, names, palette_of(dataset, len(names))))  # fmt: skip


def _draw(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    titles: Sequence[str],
    entries: Sequence[Entry],
) -> Image.Image:
    wrapped = [_wrap(title) for title in titles]
    head = max(map(len, wrapped)) * LINE + MARGIN
    width = len(titles) * (CELL + MARGIN) + MARGIN
    legend = _legend(entries, width)
    high = [cells[0].height + LINE + MARGIN for _, cells in rows]
    sheet = Image.new("RGB", (width, head + sum(high) + MARGIN + legend.height), "white")
    pen, font = ImageDraw.Draw(sheet), _font()
    for index, lines in enumerate(wrapped):
        for row, line in enumerate(lines):
            pen.text((MARGIN + index * (CELL + MARGIN), 4 + row * LINE), line, "black", font)
    top = head
    for (name, cells), step in zip(rows, high, strict=True):
        for index, cell in enumerate(cells):
            left = MARGIN + index * (CELL + MARGIN)
            sheet.paste(cell, (left, top))
            # What is left out of the score is as white as the sheet.
            pen.rectangle((left - 1, top - 1, left + cell.width, top + cell.height), outline="grey")
        pen.text((MARGIN, top + cells[0].height + 1), name, "grey", _font(11))
        top += step
    sheet.paste(legend, (0, top + MARGIN))
    return sheet
