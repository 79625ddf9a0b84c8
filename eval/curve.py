"""Scores over a share of 0..1 as a picture, by Pillow alone.

Not here: where the scores come from.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 970, 580
LEFT, RIGHT, TOP, BOTTOM = 70, 280, 76, 62
SCALE = 2  # drawn larger and shrunk, so that lines are smooth
# Told apart by colour-blind eyes and in grey; the first is for zero-shot top-1.
COLOURS = ("#1d3f8f", "#b35900", "#2e7d4f", "#8a2f7c", "#5a4a00")
GRID, BLACK = "#dddddd", "#111111"
DASH, DOT = 9, 3
SMALLEST = 9  # of letters, where a text is long
MOST_LINES = len(COLOURS)


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve.

    Fields: label; points (alpha, score as a fraction), in rising order of alpha; level and chance,
    the label and score of a dashed and of a dotted line of the same colour, None for none.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    level: tuple[str, float] | None = None
    chance: tuple[str, float] | None = None

    def levels(self) -> list[tuple[str, float]]:
        """Return what is drawn beside the curve."""
        return [level for level in (self.level, self.chance) if level is not None]


def _top(lines: Sequence[Line]) -> float:
    """Return the upper end of the axis in per cent, a multiple of 10."""
    values = [score for line in lines for _, score in line.points]
    values += [score for line in lines for _, score in line.levels()]
    return max(10.0, -(-100 * max(values, default=0.0) // 10) * 10)


def _spread(places: Sequence[float], apart: float, lowest: float) -> list[float]:
    """Move label places so that no two are nearer than `apart` and none is below `lowest`."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, here in itertools.pairwise(order):
        moved[here] = max(moved[here], moved[before] + apart)
    if order and moved[order[-1]] > lowest:
        moved[order[-1]] = lowest
        for here, after in zip(order[-2::-1], order[:0:-1], strict=True):
            moved[here] = min(moved[here], moved[after] - apart)
    return moved


class _Frame:
    """The area of a picture that curves are drawn in."""

    def __init__(self, top: float) -> None:
        self.top = top
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def place(self, alpha: float, percent: float) -> tuple[float, float]:
        x = LEFT + alpha * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - percent / self.top * (HEIGHT - TOP - BOTTOM)
        return x * SCALE, y * SCALE

    def text(
        self,
        at: tuple[float, float],
        words: str,
        colour: str,
        size: int,
        anchor: str,
        most: float = WIDTH,
    ) -> None:
        """Write a text, smaller and at last cut where it is wider than `most`."""
        font = ImageFont.load_default(size=size * SCALE)
        while font.getlength(words) > most * SCALE and size > SMALLEST:
            size -= 1
            font = ImageFont.load_default(size=size * SCALE)
        while font.getlength(words) > most * SCALE:
            words = words.removesuffix("…")[:-1] + "…"
        self.pen.text(at, words, colour, font, anchor)

    def axes(self, title: Sequence[str], x_title: str) -> None:
        step = 10 if self.top <= 60 else 20
        for percent in range(0, int(self.top) + 1, step):
            ends = self.place(0, percent), self.place(1, percent)
            self.pen.line(ends, GRID, SCALE)
            self.text((ends[0][0] - 8 * SCALE, ends[0][1]), str(percent), BLACK, 14, "rm")
        for tenth in range(0, 11, 2):
            x, y = self.place(tenth / 10, 0)
            self.pen.line(((x, y), (x, y + 5 * SCALE)), BLACK, SCALE)
            self.text((x, y + 9 * SCALE), f"{tenth / 10:g}", BLACK, 14, "ma")
        self.pen.line((self.place(0, 0), self.place(1, 0)), BLACK, SCALE)
        for y, size, words in zip((10, 32), (16, 14), title, strict=False):
            self.text((LEFT * SCALE, y * SCALE), words, BLACK, size, "la", WIDTH - LEFT - 10)
        self.text((LEFT * SCALE, 55 * SCALE), "per cent", BLACK, 13, "la")
        middle = self.place(0.5, 0)[0]
        self.text((middle, (HEIGHT - 24) * SCALE), x_title, BLACK, 14, "ma")

    def curve(self, line: Line, colour: str) -> None:
        spots = [self.place(alpha, 100 * score) for alpha, score in line.points]
        if len(spots) > 1:
            self.pen.line(spots, colour, 2 * SCALE + 1, joint="curve")
        for x, y in spots:
            reach = 4 * SCALE
            self.pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour)
        for level, dash in ((line.level, DASH), (line.chance, DOT)):
            if level is not None:
                self._dashes(100 * level[1], colour, dash * SCALE)

    def _dashes(self, percent: float, colour: str, dash: int) -> None:
        (x0, y), (x1, _) = self.place(0, percent), self.place(1, percent)
        for start in range(int(x0), int(x1), 2 * dash):
            self.pen.line(((start, y), (min(start + dash, x1), y)), colour, SCALE)


def draw(lines: Sequence[Line], title: Sequence[str], x_title: str) -> Image.Image:
    """Draw curves over alpha, each labelled at its end, y from zero in per cent.

    Args:
        lines: at most five.
        title: above the frame, at most two lines; which models, how and on what they are scored.
        x_title: of the axis.

    Raises:
        ValueError: more lines than can be told apart.
    """
    if len(lines) > MOST_LINES:
        raise ValueError(f"{len(lines)} lines, {MOST_LINES} can be told apart")
    lines = [line for line in lines if line.points]
    frame = _Frame(_top(lines))
    frame.axes(title, x_title)
    labels: list[tuple[str, float, str]] = []
    for line, colour in zip(lines, COLOURS, strict=False):
        frame.curve(line, colour)
        labels.append((line.label, line.points[-1][1], colour))
        labels += [(label, score, colour) for label, score in line.levels()]
    ends = [frame.place(1, 100 * score)[1] for _, score, _ in labels]
    places = _spread(ends, 20 * SCALE, (HEIGHT - BOTTOM) * SCALE)
    for (label, _, colour), y in zip(labels, places, strict=True):
        left = WIDTH - RIGHT + 14
        frame.text((left * SCALE, y), label, colour, 14, "lm", WIDTH - left - 6)
    return frame.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def save_picture(file: Path, lines: Sequence[Line], title: Sequence[str], x_title: str) -> None:
    """Write a picture of `draw` as PNG, whole or not at all; lines beyond five are left out."""
    part = file.with_name(file.name + ".part")
    draw(lines[:MOST_LINES], title, x_title).save(part, "PNG", optimize=True)
    part.replace(file)
