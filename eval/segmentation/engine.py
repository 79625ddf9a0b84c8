"""One picture through the protocol: resize, windows, cosine maps, stitch, decide.

The tower comes in as a function from windows to cosine maps, so that the steps can be tested
without one. Not here: data sets, counting, flags.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lazyclip.base.errors import UserError
from lazyclip.dense import encode_dense

from .decide import decide
from .protocol import Protocol
from .windows import (
    cut_windows,
    drop_remainder,
    normalise,
    resize_image,
    stitch,
    target_size,
    upsample,
    window_boxes,
)

CosineMaps = Callable[[Tensor], Tensor]


def cosine_maps(
    model: nn.Module,
    queries: Tensor,
    *,
    patch: int,
    method: str = "vanilla",
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> CosineMaps:
    """Make the function windows n x 3 x h x w -> cosine maps n x Q x h/patch x w/patch.

    Args:
        model: an open_clip model in eval mode on `device`.
        queries: text features Q x E, unit length.
        patch: patch side in pixels; window pixels beyond whole patches are cut off.
        method: dense method of `lazyclip.dense`.
        device: where the model is.
        precision: `fp32`, or `amp_bf16` for the tower (cosines are float32 in both).
    """
    where = torch.device(device)
    text = queries.to(where, torch.float32)

    @torch.no_grad()
    def maps(windows: Tensor) -> Tensor:
        whole = drop_remainder(windows, patch).to(where)
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == "amp_bf16"):
            features = encode_dense(model, whole, method=method)  # n x E x h x w
        unit = F.normalize(features.float(), dim=1)
        return torch.einsum("nehw,qe->nqhw", unit, text)

    return maps


def _batched(windows: Tensor, maps: CosineMaps, batch_size: int) -> Iterator[Tensor]:
    for batch in windows.split(batch_size):
        yield from maps(batch)


def segment(
    image: npt.NDArray[np.uint8],
    maps: CosineMaps,
    protocol: Protocol,
    query_class: Sequence[int],
    batch_size: int = 16,
) -> npt.NDArray[np.int64]:
    """Predict a class at each pixel of a picture.

    Args:
        image: H x W x 3 uint8.
        maps: windows n x 3 x h x w -> cosine maps n x Q x h' x w', see `cosine_maps`.
        protocol: sizes, windows and decision.
        query_class: class id of each of the Q queries.
        batch_size: windows per call of `maps`.

    Returns:
        H x W int64, ids 0..C-1, of the picture's own size.

    Raises:
        UserError: the picture is so narrow that a window holds no whole patch, or no pixel.
    """
    original = (image.shape[0], image.shape[1])
    size = target_size(*original, protocol.short, protocol.cap)
    if min(size) == 0:
        raise UserError(
            f"{original[1]}x{original[0]} pixels shrink to {size[1]}x{size[0]} at a long side of "
            f"{protocol.cap}; the picture is too narrow, leave it out of the split's list"
        )
    pixels = normalise(resize_image(image, size), protocol.mean, protocol.std)
    boxes = window_boxes(*size, protocol.window, protocol.stride)
    windows = cut_windows(pixels, boxes)
    canvas = stitch(_batched(windows, maps, batch_size), boxes, size)
    labels = decide(
        upsample(canvas, original),
        query_class,
        protocol.classes,
        logit_scale=protocol.logit_scale,
        threshold=protocol.threshold,
        area=protocol.area,
    )
    return labels.cpu().numpy()
