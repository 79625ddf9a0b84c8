"""Small pictures and curves for a page: colour map, inline PNG, inline SVG.

Needs Pillow and numpy only. Not here: what is shown (`page`).
"""

import base64
import html
import io
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.float64]
# Dark blue over green to pale yellow; lightness rises evenly, so it reads in grey and for
# colour-blind eyes.
ANCHORS = (
    (24, 18, 70),
    (42, 56, 120),
    (38, 96, 132),
    (36, 134, 128),
    (78, 170, 104),
    (160, 200, 74),
    (246, 228, 96),
)
LINE_COLOURS = ("#767676", "#1d3f8f", "#b35900", "#2e7d4f", "#8a2f7c", "#5a4a00")


def colour_map(values: Array, low: float, high: float) -> npt.NDArray[np.uint8]:
    """Return values as colours, ... x 3 uint8; low and high are the ends of the range."""
    span = high - low if high > low else 1.0
    place = np.clip((values - low) / span, 0, 1) * (len(ANCHORS) - 1)
    table = np.array(ANCHORS, np.float64)
    channels = [np.interp(place, np.arange(len(ANCHORS)), table[:, c]) for c in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def label_colours(labels: npt.NDArray[np.int64], palette: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Return a map of palette indices as colours, H x W x 3."""
    table = np.array(palette, np.uint8).reshape(-1, 3)
    return table[labels]


def png_uri(picture: npt.NDArray[np.uint8]) -> str:
    """Return an H x W x 3 picture as a data URI."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def colour_bar() -> str:
    """Return a data URI of the colour map, low to high."""
    return png_uri(colour_map(np.linspace(0, 1, 128)[None].repeat(8, axis=0), 0, 1))


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    step = (high - low) / count or 1.0
    unit = 10 ** np.floor(np.log10(step))
    step = min((m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= step), default=step)
    first = np.ceil(low / step) * step
    return [float(v) for v in np.arange(first, high + step / 1000, step)]


def line_chart(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_title: str,
    y_title: str,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Return curves as inline SVG, each labelled at its end.

    Args:
        lines: (label, x values, y values) each; lines without points are left out.
        title: above the frame.
        x_title: of the axis, with its unit.
        y_title: of the axis, with its unit.
        y_range: ends of the y axis; None: those of the values.
    """
    lines = [line for line in lines if len(line[1])]
    if not lines:
        return f"<p>{html.escape(title)}: no points.</p>"
    width, height, left, right, top, bottom = 460, 260, 52, 110, 26, 40
    xs = [x for _, line, _ in lines for x in line]
    ys = [y for _, _, line in lines for y in line]
    x0, x1 = min(0.0, *xs), max(xs) or 1.0
    y0, y1 = y_range or (min(ys), max(ys))
    y1 = y1 if y1 > y0 else y0 + 1

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(title)}">',
        f'<text x="{left}" y="16" class="head">{html.escape(title)}</text>',
    ]
    for y in _ticks(y0, y1):
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}" '
            'class="grid"/>'
            f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    for x in _ticks(x0, x1):
        parts.append(
            f'<text x="{px(x):.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:g}</text>'
        )
    ends = _spread([py(line[2][-1]) for line in lines], 13.0)
    for index, ((label, x_values, y_values), end) in enumerate(zip(lines, ends, strict=True)):
        colour = LINE_COLOURS[index % len(LINE_COLOURS)]
        points = " ".join(
            f"{px(x):.1f},{py(min(max(y, y0), y1)):.1f}"
            for x, y in zip(x_values, y_values, strict=True)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{px(x_values[-1]) + 6:.1f}" y="{end + 4:.1f}" fill="{colour}">'
            f"{html.escape(label)}</text>"
        )
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">'
        f"{html.escape(x_title)}</text>"
        f'<text transform="translate(12 {(top + height - bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(y_title)}</text></svg>'
    )
    return "".join(parts)


def _spread(places: Sequence[float], apart: float) -> list[float]:
    """Move label places so that no two are nearer than `apart`, their order kept."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, here in itertools.pairwise(order):
        moved[here] = max(moved[here], moved[before] + apart)
    return moved
