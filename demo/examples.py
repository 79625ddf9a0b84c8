"""Rows of example pictures with what each model makes of them, as an HTML table.

Not here: the maps (`look` saves them), colours (`draw`), the page around (`page`).
"""

import dataclasses
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lazyclip.base.pictures import FILE_FORMATS, open_picture

from . import draw
from .sets import CLASSES
from .world import palette

FOLDERS = {"one": "ToyOne", "two": "Toy"}  # things in a picture -> folder of the world
Paint = Callable[[str, npt.NDArray[np.float64]], npt.NDArray[np.uint8]]


@dataclasses.dataclass(frozen=True)
class Maps:
    """What one model makes of the example pictures of one kind, in their order."""

    ids: tuple[str, ...]
    own: npt.NDArray[np.float64]
    text: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    votes: npt.NDArray[np.float64] | None


@dataclasses.dataclass(frozen=True)
class Shown:
    """A model on the page: its name in paths and its label."""

    name: str
    label: str


def read_maps(file: Path) -> Maps:
    """Read the maps that `demo.look` saved."""
    with np.load(file) as stored:
        return Maps(
            ids=tuple(str(name) for name in stored["ids"]),
            own=stored["own"],
            text=stored["text"],
            classes=stored["classes"],
            votes=stored.get("votes"),
        )


def shared_range(values: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """Return the range that all maps of one kind share: the middle 98 % of the values."""
    low, high = np.quantile(np.concatenate([v.ravel() for v in values]), [0.01, 0.99])
    return float(low), float(high)


def _cell(picture: npt.NDArray[np.uint8], below: str = "", first: bool = False) -> str:
    mark = ' class="first"' if first else ""
    return f'<td{mark}><img alt="" src="{draw.png_uri(picture)}">{html.escape(below)}</td>'


def read_labels(file: Path) -> npt.NDArray[np.int64]:
    """Read a label map, H x W."""
    with open_picture(file, FILE_FORMATS) as opened:
        return np.asarray(opened, dtype=np.int64)


def read_picture(file: Path) -> npt.NDArray[np.uint8]:
    """Read a picture, H x W x 3."""
    with open_picture(file, FILE_FORMATS) as opened:
        return np.asarray(opened.convert("RGB"))


def mask_colours(file: Path, truth: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Read predicted classes as colours, H x W x 3, pale where the truth is no thing."""
    predicted = read_labels(file) + 1  # stored from 0, the palette from 1
    shown = draw.label_colours(predicted, palette())
    pale = (255 - (255 - shown.astype(np.int64)) // 4).astype(np.uint8)
    return np.where((truth > 0)[..., None], shown, pale)


def _arm_cells(
    masks: Path, maps: Maps, row: int, truth: npt.NDArray[np.int64], paint: Paint
) -> list[str]:
    cells = [_cell(paint("own", maps.own[row]), first=True)]
    if maps.votes is not None:
        cells.append(_cell(paint("votes", maps.votes[row])))
    for text, index in zip(maps.text[row], maps.classes[row], strict=True):
        cells.append(_cell(paint("text", text), CLASSES[index]))
    cells.append(_cell(mask_colours(masks / f"{maps.ids[row]}.png", truth)))
    return cells


def _heads(arms: Sequence[Shown], maps: Mapping[str, Maps]) -> str:
    top = ['<tr><th colspan="2"></th>']
    low = ["<tr><th>picture</th><th>truth</th>"]
    for arm in arms:
        has_votes = maps[arm.name].votes is not None
        texts = maps[arm.name].text.shape[1]
        names = ["patch score", *(["votes"] if has_votes else []), *["text map"] * texts, "masks"]
        top.append(f'<th class="arm first" colspan="{len(names)}">{html.escape(arm.label)}</th>')
        low.append(f'<th class="first">{names[0]}</th>')
        low += [f"<th>{name}</th>" for name in names[1:]]
    return "".join([*top, "</tr>", *low, "</tr>"])


def examples(folder: Path, arms: Sequence[Shown], kind: str, rows: int) -> str:
    """Return a table of example pictures: a row each, and for each model its maps and masks.

    Args:
        folder: the demo's folder.
        arms: models, left to right; their maps share one range of each kind.
        kind: `one` or `two` objects in a picture.
        rows: the first so many pictures of the set, not chosen by their looks.
    """
    maps = {
        arm.name: read_maps(folder / "results" / arm.name / "look" / f"{kind}.npz") for arm in arms
    }
    ranges = {
        "own": shared_range([m.own for m in maps.values()]),
        "text": shared_range([m.text for m in maps.values()]),
        "votes": shared_range(
            [m.votes for m in maps.values() if m.votes is not None] or [np.zeros(1)]
        ),
    }

    def paint(what: str, values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
        return draw.colour_map(values, *ranges[what])

    world = folder / "world" / "seg" / "VOCdevkit" / FOLDERS[kind]
    lines = [_heads(arms, maps)]
    ids = maps[arms[0].name].ids[:rows]
    for row, name in enumerate(ids):
        truth = read_labels(world / "SegmentationClass" / f"{name}.png")
        cells = [
            _cell(read_picture(world / "JPEGImages" / f"{name}.jpg")),
            _cell(draw.label_colours(truth, palette())),
        ]
        for arm in arms:
            masks = folder / "results" / arm.name / f"seg-{kind}" / "masks"
            cells += _arm_cells(masks, maps[arm.name], row, truth, paint)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    legend = (
        f'<p class="note"><img class="bar" alt="low to high" src="{draw.colour_bar()}"> low to '
        "high; "
        f"one range for all models: patch score {ranges['own'][0]:.2f} to {ranges['own'][1]:.2f}, "
        f"text map {ranges['text'][0]:.2f} to {ranges['text'][1]:.2f} (cosines)"
        + (f", votes {ranges['votes'][0]:.0f} to {ranges['votes'][1]:.0f}" if any(
            m.votes is not None for m in maps.values()) else "")
        + ".</p>"
    )  # fmt: skip
    return f'<div class="pictures"><table>{"".join(lines)}</table></div>{legend}'
