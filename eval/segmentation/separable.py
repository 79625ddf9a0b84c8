"""From the windows' cosine maps to a label map without a canvas.

Resizing a map to its window, adding windows, dividing by their number and resizing to the picture
are linear and act on rows and columns apart: the maps G of a query, laid side by side, give its
scores at all pixels as Ay G Ax^T, where Ay and Ax follow from sizes alone. So no Q x H x W array is
made: a strip of rows at a time, each query's scores are compared with the best so far. Softmax
keeps the order of the queries of a pixel and is left out; a threshold needs only its denominator, a
running sum. Not here: the same step by step (`windows.stitch`, `decide`), the tower.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazyclip.base.errors import UserError

from .decide import by_canvas, small_classes
from .protocol import Protocol
from .windows import Plan

MAX_CLASSES = 255
"""Ids are bytes, and 255 is the ignored label."""

COLUMN_BYTES = 16 << 20
"""Largest array of maps stretched along x; wider pictures are done in blocks of columns."""

STRIP_PIXELS = 1 << 15
"""Pixels of a strip on a CPU: its buffers of 4 bytes a pixel stay in the second-level cache."""

BLOCK_BYTES = 1 << 27
"""Largest array of scores of a strip on other devices."""

FLOAT32_RANGE, FLOAT64_RANGE = 120.0, 1000.0
"""Largest spread of binary exponents whose powers of two are normal numbers, sums included."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the way from window maps to the picture.

    Attributes:
        matrix: pixels x cells float32; rows sum to 1. Its columns are sorted by the pixels they
            reach, so that those a strip of rows needs lie together.
        order: the cells in that order, counted window by window.
        first: per pixel, the first cell with a weight.
        last: per pixel, the last one.
    """

    matrix: Tensor
    order: Tensor
    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]


def _taps(new: int, old: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Lower cell and weight of the upper one for each of `new` places, half-pixel centres."""
    centre = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    low = np.floor(centre).astype(np.int64)
    return low, centre - low


def _interpolate(rows: npt.NDArray[np.float64], new: int) -> npt.NDArray[np.float64]:
    """Resize the first axis of a matrix bilinearly to `new`."""
    low, share = _taps(new, len(rows))
    high = np.minimum(low + 1, len(rows) - 1)
    return rows[low] * (1 - share)[:, None] + rows[high] * share[:, None]


@functools.lru_cache(maxsize=64)
def make_axis(
    pixels: int,
    side: int,
    starts: tuple[int, ...],
    window: int,
    stretched: int,
    pad: int,
    cells: int,
) -> Axis:
    """Make the matrix from the cells of all windows of an axis to the picture's pixels.

    Args:
        pixels: of the picture.
        side: pixels after resizing.
        starts: where the windows begin in it.
        window: pixels of a window.
        stretched: pixels that a window's cells are stretched over.
        pad: where the window begins in these.
        cells: of one window.
    """
    one = _interpolate(np.eye(cells), stretched)[pad : pad + window]
    canvas = np.zeros((side, len(starts) * cells))
    for i, start in enumerate(starts):
        canvas[start : start + window, i * cells : (i + 1) * cells] = one
    canvas /= canvas.sum(axis=1, keepdims=True)  # the number of windows over each pixel
    matrix = _interpolate(canvas, pixels)
    used = matrix > 0
    order = np.argsort(used.argmax(axis=0), kind="stable")
    used = used[:, order]
    first = used.argmax(axis=1)
    last = used.shape[1] - 1 - used[:, ::-1].argmax(axis=1)
    weights = torch.from_numpy(matrix[:, order]).float()
    return Axis(weights, torch.from_numpy(order), first, last)


def _axes(plan: Plan, grid: tuple[int, int]) -> tuple[Axis, Axis]:
    starts = (
        tuple(sorted({box.y0 for box in plan.boxes})),
        tuple(sorted({box.x0 for box in plan.boxes})),
    )
    y, x = (
        make_axis(
            plan.original[i], plan.size[i], starts[i], plan.window[i], plan.stretched[i],
            plan.pad[i], grid[i],
        )
        for i in (0, 1)
    )  # fmt: skip
    return y, x


@dataclasses.dataclass(frozen=True)
class Strips:
    """The picture's scores as products still to be made.

    Attributes:
        y: row axis.
        x: column axis.
        cells: Q x rows x columns, all windows side by side, in the order of the axes.
        classes: class of each query, not falling.
        threshold: see `Protocol`; above 0, cells are binary exponents of the softmax.
    """

    y: Axis
    x: Axis
    cells: Tensor
    classes: tuple[int, ...]
    threshold: float

    def tiles(self) -> Iterator[tuple[Tensor, slice, slice]]:
        """Yield tiles of the picture: maps Q x rows x W stretched along x, rows, columns."""
        queries, rows, columns = self.cells.shape
        height, pixels = len(self.y.matrix), len(self.x.matrix)
        blocks = math.ceil(pixels * queries * rows * self.cells.element_size() / COLUMN_BYTES)
        width = math.ceil(pixels / blocks)
        size = STRIP_PIXELS if self.cells.device.type == "cpu" else BLOCK_BYTES // (4 * queries)
        step = max(size // width, 1)
        for x0 in range(0, pixels, width):
            across = self.x.matrix[x0 : x0 + width].to(self.cells)
            wide = (self.cells.view(-1, columns) @ across.T).view(queries, rows, -1)
            for y0 in range(0, height, step):
                yield wide, slice(y0, min(y0 + step, height)), slice(x0, x0 + wide.shape[2])

    def down(self, rows: slice) -> tuple[Tensor, slice]:
        """Return the weights of rows of the picture and the cells that they refer to."""
        used = slice(int(self.y.first[rows].min()), int(self.y.last[rows].max()) + 1)
        return self.y.matrix[rows, used].to(self.cells), used


Decision = tuple[Tensor, Tensor | None]
"""Best classes of a tile (uint8), and where their probability is below the threshold."""


def by_query(strips: Strips, wide: Tensor, rows: slice, dropped: frozenset[int]) -> Decision:
    """Decide a tile query by query, on a CPU: best score and class so far stay in cache.

    Args:
        strips: what is decided.
        wide: Q x rows of cells x W, from `Strips.tiles`.
        rows: of the picture.
        dropped: classes that count in the softmax and cannot be chosen.
    """
    down, used = strips.down(rows)
    shape = (len(down), wide.shape[2])
    scores = torch.empty(shape, dtype=wide.dtype)
    # numpy compares bytes and floats with vector instructions where torch 2.14 does not.
    here = scores.numpy()
    best, total = np.full_like(here, -np.inf), np.zeros_like(here)
    higher, chosen = np.empty(shape, np.bool_), np.zeros(shape, np.uint8)
    owner = higher.view(np.uint8)
    for maps, group in zip(wide[:, used], strips.classes, strict=True):
        torch.mm(down, maps, out=scores)
        if group not in dropped:
            np.greater(here, best, out=higher)
            np.maximum(here, best, out=best)
            np.multiply(owner, np.uint8(group), out=owner)
            np.maximum(owner, chosen, out=chosen)  # classes never fall: the last to win is highest
        if strips.threshold > 0:
            torch.exp2(scores, out=scores)
            np.add(here, total, out=total)
    low = np.exp2(best) / total < strips.threshold if strips.threshold > 0 else None
    return torch.from_numpy(chosen), None if low is None else torch.from_numpy(low)


def by_block(strips: Strips, wide: Tensor, rows: slice, dropped: frozenset[int]) -> Decision:
    """Decide a tile for all queries at once, as `by_query`: few launches, on any device."""
    down, used = strips.down(rows)
    scores = torch.matmul(down, wide[:, used])
    kept = [q for q, group in enumerate(strips.classes) if group not in dropped]
    best, query = (scores[kept] if dropped else scores).max(dim=0)
    owners = [strips.classes[q] for q in kept]
    chosen = torch.tensor(owners, dtype=torch.uint8, device=wide.device)[query]
    if strips.threshold == 0:
        return chosen, None
    total = scores.sub_(best).exp2_().sum(dim=0)
    return chosen, total.reciprocal() < strips.threshold


def run(strips: Strips, area: float, way: Callable[..., Decision]) -> Tensor:
    """Decide all tiles; with an area rule, those that hold a removed class once more.

    Args:
        strips: what is decided.
        area: see `Protocol`.
        way: `by_query` or `by_block`.

    Returns:
        H x W uint8 on the device of the maps.
    """
    out = torch.empty(
        len(strips.y.matrix), len(strips.x.matrix), dtype=torch.uint8, device=strips.cells.device
    )

    def decide_tile(wide: Tensor, rows: slice, columns: slice, dropped: frozenset[int]) -> Tensor:
        chosen, low = way(strips, wide, rows, dropped)
        out[rows, columns] = chosen if low is None else chosen.masked_fill(low, 0)
        return chosen

    counts = []
    for wide, rows, columns in strips.tiles():
        chosen = decide_tile(wide, rows, columns, frozenset())
        if area > 0:
            counts.append(torch.bincount(chosen.flatten(), minlength=strips.classes[-1] + 1))
    if not counts:
        return out
    dropped = small_classes(torch.stack(counts).sum(dim=0).tolist(), area)
    if dropped:
        touched = torch.stack(counts)[:, sorted(dropped)].any(dim=1).tolist()
        for again, tile in zip(touched, strips.tiles(), strict=True):
            if again:
                decide_tile(*tile, dropped)
    return out


def _exponents(protocol: Protocol) -> float:
    """Factor from cosines to the binary exponents of the softmax."""
    return protocol.logit_scale * math.log2(math.e)


def _strips(
    maps: Tensor, plan: Plan, protocol: Protocol, query_class: Sequence[int], spread: float
) -> Strips:
    """Lay the maps side by side in the order of the axes, queries in the order of classes."""
    y, x = _axes(plan, (maps.shape[2], maps.shape[3]))
    down = len({box.y0 for box in plan.boxes})
    queries = sorted(range(len(query_class)), key=query_class.__getitem__)
    grid = maps.unflatten(0, (down, -1))[:, :, queries]
    cells = grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    cells = cells[:, y.order.to(maps.device)][:, :, x.order.to(maps.device)]
    if protocol.threshold > 0:
        # Powers of two of scores below the largest: none overflows, the best of a pixel is normal.
        dtype = torch.float32 if spread < FLOAT32_RANGE else torch.float64
        cells = cells.to(dtype) * _exponents(protocol)
        cells -= cells.max()
    elif protocol.logit_scale < 0:
        cells = -cells
    return Strips(
        y, x, cells.contiguous(), tuple(query_class[q] for q in queries), protocol.threshold
    )


def _check(maps: Tensor, plan: Plan, protocol: Protocol, query_class: Sequence[int]) -> None:
    if maps.dim() != 4 or maps.shape[:2] != (len(plan.boxes), len(query_class)):
        raise ValueError(
            f"maps {tuple(maps.shape)} for {len(plan.boxes)} windows and {len(query_class)} queries"
        )
    if set(query_class) != set(range(protocol.classes)) or protocol.classes > MAX_CLASSES:
        raise ValueError(
            f"queries for {len(set(query_class))} of {protocol.classes} classes; each class needs "
            f"one, and ids must lie below {MAX_CLASSES}"
        )


def postprocess(
    maps: Tensor,
    plan: Plan,
    protocol: Protocol,
    query_class: Sequence[int],
    image: npt.NDArray[np.uint8] | None = None,
) -> Tensor:
    """Make the label map of a picture from the cosine maps of its windows.

    Equal to `decide.by_canvas` but for rounding, where two classes are as good as equal. Among
    equals the lowest class wins.

    Args:
        maps: n x Q x h x w float32, in the order of the plan's windows.
        plan: sizes and windows.
        protocol: decision, and refinement by the picture.
        query_class: class id of each query.
        image: the picture, H x W x 3 uint8; only a protocol with PAMR needs it.

    Returns:
        H x W uint8, ids 0..C-1, on the device of the maps.

    Raises:
        UserError: the maps are not finite.
        ValueError: shapes that do not fit, or a class without a query.
    """
    _check(maps, plan, protocol, query_class)
    low, high = (float(v) for v in maps.aminmax())
    if not math.isfinite(high - low):
        raise UserError(
            "the model's cosine maps hold numbers that are not finite; check its weights, or use "
            "--precision fp32"
        )
    spread = abs(_exponents(protocol)) * (high - low)
    with torch.no_grad(), torch.autocast(maps.device.type, enabled=False):
        if protocol.pamr != "off" or protocol.logit_scale == 0 or spread > FLOAT64_RANGE:
            return by_canvas(maps, plan, protocol, query_class, image)
        strips = _strips(maps.float(), plan, protocol, query_class, spread)
        way = by_query if maps.device.type == "cpu" else by_block
        return run(strips, protocol.area, way)
