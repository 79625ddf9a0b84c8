"""Boxes through a picture's geometry, and the patches a box holds.

Inside the code a box is half open in pixels: x0 <= x < x1. Shards write 0-based inclusive
corners; `from_inclusive` converts on reading. Sizes follow torchvision's Resize and CenterCrop, so
that a box and its picture move alike. Not here: pictures, files, what a hit is worth (`scores`).

Letters: B images, N = h * w patches of the grid, H, W pixels of the view the tower sees.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lazyclip.base.registry import Registry


class Box(NamedTuple):
    """A box in pixels, half open; x to the right, y down."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """The area in square pixels, 0 for an empty box."""
        return max(0.0, self.x1 - self.x0) * max(0.0, self.y1 - self.y0)


class View(NamedTuple):
    """How a picture becomes what the tower sees: scaled, then a window cut out.

    Fields: scale_x, scale_y; left, top, the window's corner in the scaled picture; width and height
    of the window. All but the scales in pixels.
    """

    scale_x: float
    scale_y: float
    left: int
    top: int
    width: int
    height: int


def from_inclusive(corners: Sequence[float]) -> Box:
    """Convert [x0, y0, x1, y1] with 0-based inclusive corners to a half-open box.

    Equal corners are one pixel, not an empty box.

    Raises:
        ValueError: not four finite numbers, or corners in the wrong order.
    """
    numbers = [float(v) for v in corners if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(corners) != 4 or len(numbers) != 4 or not all(abs(v) < 1e9 for v in numbers):
        raise ValueError(f"a box is [x0, y0, x1, y1] in pixels; got {list(corners)}")
    x0, y0, x1, y1 = numbers
    if x1 < x0 or y1 < y0:
        raise ValueError(f"box {list(corners)} has its second corner before its first")
    return Box(x0, y0, x1 + 1, y1 + 1)


def resized_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Return (width, height) after scaling the shorter side; the longer one is rounded down."""
    short, long = min(width, height), max(width, height)
    new_long = int(shorter * long / short)
    return (shorter, new_long) if width <= height else (new_long, shorter)


def crop_view(width: int, height: int, resize: int, crop: int) -> View:
    """Map a picture through Resize(resize) of its shorter side and CenterCrop(crop).

    The offset is rounded as torchvision rounds it: half to even.

    Raises:
        ValueError: resize < crop, which would pad.
    """
    if not 0 < crop <= resize or min(width, height) < 1:
        raise ValueError(
            f"resize {resize} and crop {crop} of a {width} x {height} picture: need resize >= crop"
        )
    new_width, new_height = resized_size(width, height, resize)
    return View(
        scale_x=new_width / width,
        scale_y=new_height / height,
        left=round((new_width - crop) / 2.0),
        top=round((new_height - crop) / 2.0),
        width=crop,
        height=crop,
    )


def squash_view(width: int, height: int, view_width: int, view_height: int) -> View:
    """Map a picture that is resized to the view whatever its shape: nothing is cut off."""
    return View(view_width / width, view_height / height, 0, 0, view_width, view_height)


def to_view(box: Box, view: View) -> Box:
    """Carry a box into a view and clip it; one outside comes back empty (area 0)."""

    def carry(value: float, scale: float, offset: int, limit: int) -> float:
        return min(max(value * scale - offset, 0.0), float(limit))

    return Box(
        carry(box.x0, view.scale_x, view.left, view.width),
        carry(box.y0, view.scale_y, view.top, view.height),
        carry(box.x1, view.scale_x, view.left, view.width),
        carry(box.y1, view.scale_y, view.top, view.height),
    )


# A rule, along one axis: (start B x 1, end B x 1, index of each patch n, patch side) -> B x n.
Rule = Callable[[Tensor, Tensor, Tensor, int], Tensor]
RULES: Registry[Rule] = Registry("rule")


@RULES.add("centre")
def _centre(start: Tensor, end: Tensor, index: Tensor, side: int) -> Tensor:
    """Take a patch whose centre lies in the box: chance equals the box's share of the view."""
    middle = (index + 0.5) * side
    return (start <= middle) & (middle < end)


@RULES.add("overlap")
def _overlap(start: Tensor, end: Tensor, index: Tensor, side: int) -> Tensor:
    """Take a patch that shares a positive area with the box."""
    return (start < (index + 1) * side) & (index * side < end)


@RULES.add("repo")
def _repo(start: Tensor, end: Tensor, index: Tensor, side: int) -> Tensor:
    """Take patches start // side to end // side, both inclusive, of whole pixel values.

    The released script's rule: a box that ends on a patch border claims the next patch too.
    """
    first = torch.div(start.floor(), side, rounding_mode="floor")
    final = torch.div(end.floor(), side, rounding_mode="floor")
    return (first <= index) & (index <= final)


def patch_hits(
    boxes: Tensor | Sequence[Box], grid: tuple[int, int], size: tuple[int, int], rule: str
) -> Tensor:
    """Mark the patches that a box holds.

    Args:
        boxes: B x 4, x0 y0 x1 y1 in the view's pixels, half open.
        grid: (h, w).
        size: the view's (H, W), whole multiples of the grid.
        rule: `centre` (patch centre in the box), `overlap` (a shared area above 0) or `repo` (as
            the released script: rows y0 // p to y1 // p inclusive, columns alike, with y1 the
            half-open end).

    Returns:
        Patches, B x N bool, row by row. An empty box holds none under any rule; the released script
        grants one to the left of the view column 0.

    Raises:
        ValueError: another shape, or a view the grid does not divide.
        UserError: an unknown rule.
    """
    corners = torch.as_tensor(boxes, dtype=torch.float64)
    (h, w), (H, W) = grid, size
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise ValueError(f"boxes must be B x 4; got {tuple(corners.shape)}")
    if H % h or W % w:
        raise ValueError(f"a view of {H} x {W} pixels does not divide into {h} x {w} patches")
    holds = RULES[rule]
    rows, columns = (torch.arange(n, dtype=torch.float64, device=corners.device) for n in (h, w))
    x0, y0, x1, y1 = corners[:, :, None].unbind(dim=1)  # each B x 1
    inside = holds(y0, y1, rows, H // h)[:, :, None] & holds(x0, x1, columns, W // w)[:, None, :]
    full = ((x0 < x1) & (y0 < y1))[:, :, None]
    return (inside & full).flatten(1)
