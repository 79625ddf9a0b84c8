"""Windows of several pictures through the tower in full batches, each picture decided when whole.

The tower comes in as a function from windows to cosine maps, so that the steps can be tested
without one. Not here: reading (`loading`), the steps on one picture (`windows`, `separable`),
counting (`job`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lazyclip.base.errors import UserError
from lazyclip.dense import encode_dense

from .loading import Item, make_item
from .protocol import Protocol
from .separable import postprocess

CosineMaps = Callable[[Tensor], Tensor]
WAITING = 4  # batches of windows held at most, for pictures that share no size


def cosine_maps(
    model: nn.Module,
    queries: Tensor,
    *,
    method: str = "vanilla",
    positions: str = "offset",
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> CosineMaps:
    """Make the function windows n x 3 x h x w -> cosine maps n x Q x h/patch x w/patch.

    Args:
        model: an open_clip model in eval mode on `device`.
        queries: text features Q x E, unit length.
        method: dense method of `lazyclip.dense`.
        positions: how positions are interpolated to another grid, see `encode_dense`.
        device: where the model is.
        precision: `fp32`, or `amp_bf16` for the tower (cosines are float32 in both).

    Raises:
        UserError: (the function) features that are not finite.
    """
    where = torch.device(device)
    text = queries.to(where, torch.float32)

    @torch.no_grad()
    def maps(windows: Tensor) -> Tensor:
        on_device = windows.to(where, non_blocking=True)
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == "amp_bf16"):
            features = encode_dense(model, on_device, method, positions)  # n x E x h x w
        unit = F.normalize(features.float(), dim=1)
        found = torch.einsum("nehw,qe->nqhw", unit, text)
        if not bool(torch.isfinite(found).all()):
            # NaN would still win or lose every comparison and give a label map.
            raise UserError(
                "dense features are not finite: the weights are broken, or --precision does not "
                "suit them; try --precision fp32"
            )
        return found

    return maps


class _Pending:
    """A picture whose windows are on their way: maps come in, one window at a time."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.maps: list[Tensor] = []

    @property
    def whole(self) -> bool:
        return len(self.maps) == len(self.item.windows)


def batched_maps(
    items: Iterable[Item], maps: CosineMaps, batch_size: int
) -> Iterator[tuple[Item, Tensor]]:
    """Run the windows of many pictures in batches of one size.

    Args:
        items: pictures with their windows; windows of unlike sizes never share a batch.
        maps: see `cosine_maps`.
        batch_size: windows in one call of `maps`.

    Yields:
        A picture and its maps n x Q x h x w, as soon as all its windows are through; each picture
        once, not always in the order given.
    """
    waiting: dict[tuple[int, ...], list[tuple[_Pending, Tensor]]] = {}

    def run(size: tuple[int, ...]) -> Iterator[tuple[Item, Tensor]]:
        queue = waiting[size]
        batch, waiting[size] = queue[:batch_size], queue[batch_size:]
        found = maps(torch.stack([window for _, window in batch]))
        for (picture, _), one in zip(batch, found, strict=True):
            picture.maps.append(one)
            if picture.whole:
                yield picture.item, torch.stack(picture.maps)

    for item in items:
        size = tuple(item.windows.shape[1:])
        picture = _Pending(item)
        waiting.setdefault(size, []).extend((picture, window) for window in item.windows)
        while len(waiting[size]) >= batch_size:
            yield from run(size)
        # Sizes that fill no batch of their own must not pile up: the oldest goes first.
        while sum(map(len, waiting.values())) > WAITING * batch_size:
            yield from run(next(key for key, queue in waiting.items() if queue))
        waiting = {key: queue for key, queue in waiting.items() if queue}
    for size in list(waiting):
        while waiting[size]:
            yield from run(size)


def predict(
    items: Iterable[Item],
    maps: CosineMaps,
    protocol: Protocol,
    query_class: Sequence[int],
    batch_size: int = 32,
) -> Iterator[tuple[Item, Tensor]]:
    """Predict a class at each pixel of many pictures.

    Args:
        items: pictures with their windows.
        maps: windows -> cosine maps, see `cosine_maps`.
        protocol: sizes, windows and decision.
        query_class: class id of each of the Q queries.
        batch_size: windows in one call of `maps`.

    Yields:
        A picture and its label map H x W uint8, ids 0..C-1, on the maps' device.
    """
    for item, found in batched_maps(items, maps, batch_size):
        yield item, postprocess(found, item.plan, protocol, query_class, item.image)


def segment(
    image: npt.NDArray[np.uint8],
    maps: CosineMaps,
    protocol: Protocol,
    query_class: Sequence[int],
    *,
    patch: int,
    batch_size: int = 32,
) -> npt.NDArray[Any]:
    """Predict a class at each pixel of one picture H x W x 3; returns H x W uint8 on the CPU.

    Raises:
        UserError: a picture too narrow for the protocol or the patch.
    """
    item = make_item("picture", image, None, protocol, patch)
    ((_, labels),) = predict([item], maps, protocol, query_class, batch_size)
    return labels.cpu().numpy()
