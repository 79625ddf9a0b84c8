"""Pictures and labels from disk to windows, in worker processes; what cannot be read is named.

Not here: the tower, and what is made of its output (`engine`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol as TypingProtocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lazyclip.base.errors import UserError

from .protocol import Protocol
from .windows import Plan, cut, make_plan


class Source(TypingProtocol):
    """Where pictures come from: read by id, the file of an id for messages."""

    def read(self, name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]:
        """Read image H x W x 3 and label H x W (None where there is none)."""

    def image_file(self, name: str) -> Path:
        """Return the picture's file."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A picture ready for the tower.

    Fields: its id; image H x W x 3 uint8; label H x W int64 with ids 0..C-1 and 255, None where
    there is none; plan of its windows; windows n x 3 x h x w float32, normalised.
    """

    name: str
    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.int64] | None
    plan: Plan
    windows: Tensor


@dataclasses.dataclass(frozen=True)
class Broken:
    """A picture that cannot be scored, and why (one line with the file)."""

    name: str
    reason: str


def make_item(
    name: str,
    image: npt.NDArray[np.uint8],
    label: npt.NDArray[np.int64] | None,
    protocol: Protocol,
    patch: int,
) -> Item:
    """Cut a picture into windows by a protocol.

    Raises:
        UserError: a picture too narrow for the protocol or the patch.
    """
    plan = make_plan(image.shape[0], image.shape[1], protocol, patch)
    return Item(name, image, label, plan, cut(image, plan, protocol))


class Pictures(Dataset[Item | Broken]):
    """Pictures by position, each read, checked and cut when asked for."""

    def __init__(
        self, names: Sequence[str], source: Source, protocol: Protocol, patch: int
    ) -> None:
        """Hold what a worker needs; all of it must travel to another process."""
        self.names, self.source = list(names), source
        self.protocol, self.patch = protocol, patch

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.names)

    def __getitem__(self, index: int) -> Item | Broken:
        """Read, check and cut one picture."""
        name = self.names[index]
        try:
            image, label = self.source.read(name)
        except UserError as error:
            return Broken(name, str(error))
        try:
            return make_item(name, image, label, self.protocol, self.patch)
        except UserError as error:
            return Broken(name, f"{self.source.image_file(name)}: {error}")


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def stream(pictures: Pictures, workers: int) -> Iterator[Item | Broken]:
    """Yield all pictures in order, read ahead by `workers` processes (0: read here)."""
    yield from DataLoader(
        pictures,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_one_thread,
        prefetch_factor=4 if workers else None,
    )
