"""Resize, normalise, cut into windows, stitch window maps: pure functions on one image.

The procedure is that of wangf3014/SCLIP (on mmcv and mmsegmentation), without either. Not here: the
tower between cutting and stitching (`engine`), the decision (`decide`), and the fast way from
window maps to it (`separable`).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lazyclip.base.errors import UserError

from .protocol import Protocol


class Box(NamedTuple):
    """A window in pixels, half open."""

    y0: int
    y1: int
    x0: int
    x1: int


def target_size(height: int, width: int, short: int, cap: int) -> tuple[int, int]:
    """Return height and width after resizing, aspect kept.

    The short side becomes `short`, unless the long one would exceed `cap`; both sides are rounded
    half up (mmcv `rescale_size`).

    Args:
        height: pixels.
        width: pixels.
        short: target short side.
        cap: largest long side.
    """
    factor = min(cap / max(height, width), short / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps ... x h x w to `size` bilinearly: half-pixel centres, no antialias."""
    lead = maps.shape[:-2]
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    out = F.interpolate(flat, size=size, mode="bilinear", align_corners=False, antialias=False)
    return out.reshape(*lead, *size)


def resize_image(image: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Resize a picture as `cv2.resize` with INTER_LINEAR does, to within one grey level.

    Args:
        image: H x W x 3 uint8.
        size: new height and width.

    Returns:
        uint8 of the new size; the rounding to whole grey levels is part of the protocol.
    """
    if image.shape[:2] == size:
        return image
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()  # a copy: writable
    # Halves go up, as in OpenCV: equal to it where the factor is exactly a half.
    resized = (upsample(planes, size) + 0.5).floor().clamp(0, 255).to(torch.uint8)
    return resized.permute(1, 2, 0).contiguous().numpy()


def normalise(image: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (image - mean) / std, 3 x H x W float32; mean and std in grey levels 0..255."""
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    centre = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
    spread = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
    return (planes - centre) / spread


def _starts(side: int, window: int, stride: int) -> list[tuple[int, int]]:
    count = max(side - window + stride - 1, 0) // stride + 1
    ends = [min(i * stride + window, side) for i in range(count)]
    return [(max(end - window, 0), end) for end in ends]


def window_boxes(height: int, width: int, window: int, stride: int) -> list[Box]:
    """List the windows over an image, row by row.

    The last window of a row or column is moved back to end at the border. All windows of an image
    have one size; a side shorter than the window gives one window of that side.

    Args:
        height: pixels.
        width: pixels.
        window: side in pixels; 0 for one window over the whole image.
        stride: step in pixels.
    """
    if window == 0:
        return [Box(0, height, 0, width)]
    rows = _starts(height, window, stride)
    columns = _starts(width, window, stride)
    return [Box(y0, y1, x0, x1) for y0, y1 in rows for x0, x1 in columns]


def cut_windows(image: Tensor, boxes: Sequence[Box]) -> Tensor:
    """Cut the windows out of an image 3 x H x W; returns n x 3 x h x w."""
    return torch.stack([image[:, b.y0 : b.y1, b.x0 : b.x1] for b in boxes])


def whole_patches(height: int, width: int, patch: int) -> tuple[int, int]:
    """Round a window's size down to whole patches.

    Raises:
        UserError: a side holds no whole patch.
    """
    if min(height, width) < patch:
        raise UserError(
            f"a window of {width}x{height} pixels holds no patch of {patch}; the picture is too "
            "narrow for this model, leave it out"
        )
    return height // patch * patch, width // patch * patch


def drop_remainder(windows: Tensor, patch: int) -> Tensor:
    """Cut windows n x 3 x h x w at the right and bottom to whole patches (SCLIP, NACLIP).

    Raises:
        UserError: a side holds no whole patch.
    """
    height, width = whole_patches(windows.shape[-2], windows.shape[-1], patch)
    return windows[..., :height, :width]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one picture is cut: sizes in pixels, height first; known before a pixel is read.

    Attributes:
        original: size of the picture.
        size: size after resizing.
        boxes: the windows over the resized picture, row by row.
        window: size of each window.
        inner: size given to the tower, whole patches: below `window` where the remainder is
            dropped, above where it is padded.
        pad: rows of zeros above and columns of zeros left of each window.
    """

    original: tuple[int, int]
    size: tuple[int, int]
    boxes: tuple[Box, ...]
    window: tuple[int, int]
    inner: tuple[int, int]
    pad: tuple[int, int]

    @property
    def stretched(self) -> tuple[int, int]:
        """Size a window's map is resized to; the window lies at `pad` in it.

        A dropped remainder is covered by stretching the map over it (SCLIP, NACLIP); a padded
        window's map covers the padding too, which is cut off again (ClearCLIP).
        """
        return max(self.window[0], self.inner[0]), max(self.window[1], self.inner[1])


def make_plan(height: int, width: int, protocol: Protocol, patch: int) -> Plan:
    """Lay out the windows of a picture.

    Args:
        height: of the picture, pixels.
        width: pixels.
        protocol: sizes, windows and what happens to remainders.
        patch: patch side of the tower in pixels.

    Raises:
        UserError: the picture is so narrow that a window holds no whole patch, or no pixel.
    """
    size = target_size(height, width, protocol.short, protocol.cap)
    if min(size) == 0:
        raise UserError(
            f"{width}x{height} pixels shrink to {size[1]}x{size[0]} at a long side of "
            f"{protocol.cap}; the picture is too narrow, leave it out"
        )
    boxes = tuple(window_boxes(*size, protocol.window, protocol.stride))
    window = boxes[0].y1 - boxes[0].y0, boxes[0].x1 - boxes[0].x0
    if protocol.remainder == "pad":
        inner = -(-window[0] // patch) * patch, -(-window[1] // patch) * patch
        pad = (inner[0] - window[0]) // 2, (inner[1] - window[1]) // 2
    else:
        inner, pad = whole_patches(*window, patch), (0, 0)
    return Plan((height, width), size, boxes, window, inner, pad)


def cut(image: npt.NDArray[np.uint8], plan: Plan, protocol: Protocol) -> Tensor:
    """Make the tower's input from a picture: resized, normalised, cut, remainders mended.

    Args:
        image: H x W x 3 uint8 of the plan's original size.
        plan: sizes and windows.
        protocol: mean and std.

    Returns:
        n x 3 x h x w float32, h x w the plan's inner size.

    Raises:
        ValueError: the picture has another size than the plan.
    """
    if image.shape[:2] != plan.original:
        raise ValueError(f"picture {image.shape[:2]}, plan for {plan.original}")
    pixels = normalise(resize_image(image, plan.size), protocol.mean, protocol.std)
    windows = pixels.new_zeros(len(plan.boxes), 3, *plan.inner)
    (top, left), (height, width) = plan.pad, plan.inner
    for window, box in zip(windows, plan.boxes, strict=True):
        part = pixels[:, box.y0 : box.y1, box.x0 : box.x1][:, :height, :width]
        window[:, top : top + part.shape[1], left : left + part.shape[2]] = part
    return windows


def stitch(
    maps: Iterable[Tensor],
    boxes: Sequence[Box],
    size: tuple[int, int],
    stretched: tuple[int, int] | None = None,
    pad: tuple[int, int] = (0, 0),
) -> Tensor:
    """Average window maps into one canvas.

    Args:
        maps: one Q x h x w map per window, in the order of the boxes, resized here to its window.
        boxes: the windows; together they cover the canvas.
        size: height and width of the canvas.
        stretched: size a map is resized to before its window is cut from it, see `Plan`; None for
            the size of the window.
        pad: where the window lies in a stretched map, top and left.

    Returns:
        Q x H x W float32: at each pixel the mean over the windows that hold it. Averaged are the
        maps as given (cosines), before any softmax.
    """
    canvas: Tensor | None = None
    count = torch.zeros(size)
    for window, box in zip(maps, boxes, strict=True):
        if canvas is None:
            canvas = torch.zeros(window.shape[0], *size, device=window.device)
            count = count.to(window.device)
        area = (..., slice(box.y0, box.y1), slice(box.x0, box.x1))
        height, width = box.y1 - box.y0, box.x1 - box.x0
        grown = upsample(window.float(), stretched or (height, width))
        canvas[area] += grown[..., pad[0] : pad[0] + height, pad[1] : pad[1] + width]
        count[area] += 1
    if canvas is None or bool((count == 0).any()):
        raise ValueError(f"{len(boxes)} windows do not cover a canvas of {size}")
    return canvas / count
