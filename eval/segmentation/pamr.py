"""PAMR: maps smoothed along the picture's colours (Araslanov & Roth 2020, visinf/1-stage-wseg).

Each pixel of a map becomes a weighted mean of 8 neighbours at each of several distances, again and
again; the weight of a neighbour falls with its colour difference, measured in the local standard
deviation. Not here: where it stands among the steps (`decide`).
"""

import dataclasses
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import upsample

CHUNK_BYTES = 1 << 22
"""Largest stack of maps refined together: larger ones leave a CPU's cache."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How far PAMR reaches.

    Attributes:
        iterations: rounds of averaging.
        dilations: distances of the 8 neighbours, in pixels.
    """

    iterations: int
    dilations: tuple[int, ...]


SETTINGS = {
    "naclip": Setting(10, (8, 16)),
    "original": Setting(10, (1, 2, 4, 8, 12, 24)),
}
"""Published settings: `naclip` is that of SCLIP and NACLIP."""

DIRECTIONS = tuple(itertools.product((-1, 0, 1), repeat=2))
"""The pixel itself and its neighbours, row by row."""


def _shifted(maps: Tensor, dilations: tuple[int, ...], *, centre: bool) -> Iterator[Tensor]:
    """Yield maps ... x H x W as seen from each neighbour; beyond the border the border repeats."""
    height, width = maps.shape[-2:]
    most = max(dilations)
    padded = F.pad(maps, [most] * 4, mode="replicate")
    for dilation in dilations:
        for down, across in DIRECTIONS:
            if centre or (down, across) != (0, 0):
                y, x = most + down * dilation, most + across * dilation
                yield padded[..., y : y + height, x : x + width]


def affinity(image: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """Weigh the neighbours of each pixel by likeness of colour.

    Args:
        image: 3 x H x W, normalised.
        dilations: distances of neighbours.

    Returns:
        neighbours x H x W, distances outside, directions row by row inside; sums to 1 over
        neighbours.
    """
    places = len(dilations) * len(DIRECTIONS)  # the pixel itself counts once a distance
    batch = image[None]  # replicate padding wants a batch
    mean = torch.zeros_like(batch)
    for shifted in _shifted(batch, dilations, centre=True):
        mean += shifted / places
    variance = torch.zeros_like(batch)
    for shifted in _shifted(batch, dilations, centre=True):
        variance += (shifted - mean).square_()
    spread = (variance / (places - 1)).sqrt_().mul_(0.1).add_(1e-8)
    closeness = [
        ((shifted - batch).abs_().div_(spread)).mean(dim=1).neg_()
        for shifted in _shifted(batch, dilations, centre=False)
    ]
    return torch.cat(closeness).softmax(dim=0)


def refine(maps: Tensor, image: Tensor, setting: str) -> Tensor:
    """Refine maps by a picture.

    Args:
        maps: Q x H x W float32, cosines.
        image: 3 x h x w, normalised; resized here to the maps' size.
        setting: a name in `SETTINGS`.

    Returns:
        Q x H x W. A few maps are done at a time, and one neighbour after another: memory beside
        the result is that of the weights and of some maps.
    """
    chosen = SETTINGS[setting]
    size = (maps.shape[-2], maps.shape[-1])
    weights = affinity(upsample(image, size), chosen.dilations)
    chunk = max(CHUNK_BYTES // (size[0] * size[1] * maps.element_size()), 1)
    out = torch.empty_like(maps)
    for start in range(0, len(maps), chunk):
        now = maps[None, start : start + chunk]
        for _ in range(chosen.iterations):
            mean = torch.zeros_like(now)
            around = _shifted(now, chosen.dilations, centre=False)
            for weight, shifted in zip(weights, around, strict=True):
                mean.addcmul_(shifted, weight)
            now = mean
        out[start : start + chunk] = now[0]
    return out
