"""From parameters to pixels: outlines, fills and backgrounds of the demo's pictures, vectorised.

Everything is a function of arrays over n pictures; the only randomness is the pixel noise. Masks
are exact: a pixel belongs to an object when its centre lies in the outline, and edges are hard.
Not here: which parameters are drawn, captions and files (`world`).
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Masks = npt.NDArray[np.bool_]

SIDE = 64  # pixels of a picture
COLOURS = {
    "red": (0.80, 0.13, 0.13),
    "green": (0.13, 0.60, 0.20),
    "blue": (0.15, 0.28, 0.85),
    "yellow": (0.92, 0.78, 0.10),
}
HUES = {"red": 0.0, "green": 1 / 3, "blue": 2 / 3, "yellow": 1 / 6}
FILLS = ("plain", "striped", "dotted")
OFF_WHITE = (0.93, 0.91, 0.87)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "arrow")
PATTERNS = ("rows", "columns", "diagonals", "checks", "dots", "waves", "grid", "shade")
TEXTURES = 12  # one hue each, the patterns in turn
PERIOD = 10.0  # of a background pattern, pixels
SATURATION, VALUE, NOISE = 0.35, 0.55, 0.03


@dataclasses.dataclass(frozen=True)
class Objects:
    """One object in each of n pictures; every field has length n.

    Attributes:
        colour: index in COLOURS.
        fill: index in FILLS.
        shape: index in SHAPES.
        scale: pixels per unit of the outline.
        angle: rotation of the outline in radians.
        x: centre, pixels from the left.
        y: centre, pixels from the top.
        turn: rotation of the fill in radians.
        period: of the fill, pixels.
        phase: shift of the fill, n x 2, in periods.
    """

    colour: Ints
    fill: Ints
    shape: Ints
    scale: Floats
    angle: Floats
    x: Floats
    y: Floats
    turn: Floats
    period: Floats
    phase: Floats


@dataclasses.dataclass(frozen=True)
class Backgrounds:
    """The ground of n pictures: texture index, contrast (0..1), and shift (n x 2, in periods)."""

    texture: Ints
    contrast: Floats
    phase: Floats


def _star(u: Floats, v: Floats) -> Masks:
    sector = np.pi / 5
    turned = np.mod(np.arctan2(u, -v), 2 * sector)
    folded = np.minimum(turned, 2 * sector - turned)  # 0 at a tip, pi/5 in a notch
    radius = np.hypot(u, v)
    x, y = radius * np.cos(folded), radius * np.sin(folded)
    notch_x, notch_y = 0.48 * np.cos(sector), 0.48 * np.sin(sector)
    return (x - 1) * notch_y - y * (notch_x - 1) <= 0


def _heart(u: Floats, v: Floats) -> Masks:
    x, y = 1.2 * u, -1.2 * v
    return (x**2 + y**2 - 1) ** 3 - x**2 * y**3 <= 0


def _arrow(u: Floats, v: Floats) -> Masks:
    shaft = (u >= -1) & (u <= 0.1) & (np.abs(v) <= 0.3)
    head = (u >= 0) & (np.abs(v) <= 0.85 * (1 - u))
    return shaft | head


# Local coordinates: u to the right, v downwards, about one unit from the centre to the outline.
OUTLINES: dict[str, Callable[[Floats, Floats], Masks]] = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 1,
    "triangle": lambda u, v: (v <= 0.5) & (np.abs(u) * np.sqrt(3) <= v + 1),
    "star": _star,
    "cross": lambda u, v: (
        (np.minimum(np.abs(u), np.abs(v)) <= 0.36) & (np.maximum(np.abs(u), np.abs(v)) <= 1)
    ),
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.5**2),
    "heart": _heart,
    "arrow": _arrow,
}


@functools.cache
def _geometry() -> tuple[Floats, Floats]:
    """Return area of each outline (8) and its reach in 360 directions (8 x 360), in units."""
    axis = np.linspace(-1.5, 1.5, 601, dtype=np.float32)
    v, u = np.meshgrid(axis, axis, indexing="ij")
    degrees = np.deg2rad(np.arange(360))
    areas, reaches = [], []
    for name in SHAPES:
        inside = OUTLINES[name](u, v)
        areas.append(inside.sum() * (axis[1] - axis[0]) ** 2)
        # Border points are enough: the reach is a maximum over the outline.
        border = inside & ~(
            np.roll(inside, 1, 0) & np.roll(inside, -1, 0)
            & np.roll(inside, 1, 1) & np.roll(inside, -1, 1)
        )  # fmt: skip
        along = np.outer(np.cos(degrees), u[border]) + np.outer(np.sin(degrees), v[border])
        reaches.append(along.max(axis=1))
    return np.array(areas, np.float32), np.array(reaches, np.float32)


def scale_for(shape: Ints, share: Floats) -> Floats:
    """Return the scale at which an outline covers a share of the picture."""
    return np.sqrt(share * SIDE**2 / _geometry()[0][shape]).astype(np.float32)


def extent(shape: Ints, scale: Floats, angle: Floats) -> Floats:
    """Return how far rotated outlines reach left, up, right and down, n x 4 pixels."""
    reach = _geometry()[1]
    sides = np.array([180, 270, 0, 90])[None] - np.rad2deg(angle)[:, None]
    low = np.floor(sides).astype(np.int64)
    part = sides - low
    rows = shape[:, None]
    unit = reach[rows, low % 360] * (1 - part) + reach[rows, (low + 1) % 360] * part
    return (unit * scale[:, None]).astype(np.float32)


def _pixels() -> tuple[Floats, Floats]:
    axis = np.arange(SIDE, dtype=np.float32) + 0.5
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x[None], y[None]


def _rotated(x: Floats, y: Floats, angle: Floats) -> tuple[Floats, Floats]:
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    return x * cos + y * sin, y * cos - x * sin


def object_masks(objects: Objects) -> Masks:
    """Return the exact masks, n x 64 x 64."""
    x, y = _pixels()
    dx, dy = x - objects.x[:, None, None], y - objects.y[:, None, None]
    u, v = _rotated(dx, dy, objects.angle)
    u, v = u / objects.scale[:, None, None], v / objects.scale[:, None, None]
    masks = np.zeros(u.shape, dtype=bool)
    for index, name in enumerate(SHAPES):
        chosen = objects.shape == index
        masks[chosen] = OUTLINES[name](u[chosen], v[chosen])
    return masks


def paint(pictures: Floats, objects: Objects, masks: Masks) -> None:
    """Put the fills of objects into pictures n x 64 x 64 x 3 in 0..1, in place, where masks say."""
    row, y, x = np.nonzero(masks)
    cos, sin, period = np.cos(objects.turn), np.sin(objects.turn), objects.period[row]
    u = (x * cos[row] + y * sin[row]) / period + objects.phase[row, 0]
    v = (y * cos[row] - x * sin[row]) / period + objects.phase[row, 1]
    striped = np.mod(u, 1) < 0.5
    dotted = np.hypot(np.mod(u, 1) - 0.5, np.mod(v, 1) - 0.5) < 0.31
    fill = objects.fill[row]
    second = ((fill == 1) & striped) | ((fill == 2) & dotted)
    first = np.array(list(COLOURS.values()), np.float32)[objects.colour[row]]
    pictures[row, y, x] = np.where(second[:, None], np.array(OFF_WHITE, np.float32), first)


def _pattern(name: str, x: Floats, y: Floats) -> Floats:
    """Return a pattern in 0..1 at positions given in periods."""
    wave_x, wave_y = np.sin(2 * np.pi * x), np.sin(2 * np.pi * y)
    if name == "rows":
        return (wave_y + 1) / 2
    if name == "columns":
        return (wave_x + 1) / 2
    if name == "diagonals":
        return (np.sin(2 * np.pi * (x + y) / np.sqrt(2)) + 1) / 2
    if name == "checks":
        return (wave_x * wave_y > 0).astype(np.float32)
    if name == "dots":
        return (np.hypot(np.mod(x, 1) - 0.5, np.mod(y, 1) - 0.5) < 0.3).astype(np.float32)
    if name == "waves":
        return (np.sin(2 * np.pi * (y + 0.25 * np.sin(np.pi * x))) + 1) / 2
    if name == "grid":
        return ((np.mod(x, 1) < 0.2) | (np.mod(y, 1) < 0.2)).astype(np.float32)
    span = SIDE / PERIOD  # shade: one slow turn over the picture
    return (np.sin(np.pi * (x + y) / span) + 1) / 2


def hue_rgb(hue: Floats, saturation: float) -> Floats:
    """Return colours ... x 3 in 0..1 of full value for hues in 0..1."""
    offsets = np.array([0.0, 2 / 3, 1 / 3], np.float32)
    distance = np.abs(np.mod(hue[..., None] + offsets, 1) * 6 - 3) - 1
    return (1 - saturation * (1 - np.clip(distance, 0, 1))).astype(np.float32)


def background_colours(grounds: Backgrounds) -> Floats:
    """Return the grounds, n x 64 x 64 x 3 in 0..1, without noise."""
    x, y = _pixels()
    x = x / PERIOD + grounds.phase[:, 0, None, None]
    y = y / PERIOD + grounds.phase[:, 1, None, None]
    light = np.zeros((len(grounds.texture), SIDE, SIDE), np.float32)
    for texture in np.unique(grounds.texture):
        chosen = grounds.texture == texture
        light[chosen] = _pattern(PATTERNS[texture % len(PATTERNS)], x[chosen], y[chosen])
    value = VALUE + grounds.contrast[:, None, None] * (light - 0.5)
    tint = hue_rgb((grounds.texture / TEXTURES).astype(np.float32), SATURATION)
    return (value[..., None] * tint[:, None, None, :]).astype(np.float32)


def compose(
    grounds: Backgrounds, objects: list[Objects], masks: list[Masks], rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Put objects on grounds and add the noise.

    Args:
        grounds: of n pictures.
        objects: one entry for each object of a picture.
        masks: of each entry, n x 64 x 64, without overlap.
        rng: for the noise.

    Returns:
        Pictures, n x 64 x 64 x 3 uint8.
    """
    pictures = background_colours(grounds)
    for item, mask in zip(objects, masks, strict=True):
        paint(pictures, item, mask)
    pictures += NOISE * rng.standard_normal(pictures.shape, dtype=np.float32)
    return np.round(pictures.clip(0, 1) * 255).astype(np.uint8)


def mask_boxes(masks: Masks) -> Ints:
    """Return the boxes of masks, n x 4: x0 y0 x1 y1, 0-based, inclusive."""
    columns: Masks = np.any(masks, axis=1)
    rows: Masks = np.any(masks, axis=2)
    last = SIDE - 1
    return np.stack(
        [
            columns.argmax(axis=1),
            rows.argmax(axis=1),
            last - columns[:, ::-1].argmax(axis=1),
            last - rows[:, ::-1].argmax(axis=1),
        ],
        axis=1,
    )
