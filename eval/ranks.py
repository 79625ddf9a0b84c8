"""Several processes of one evaluation (torchrun): who is who, and what they tell each other.

Rank and world come from torchrun's environment; a plain process is rank 0 of 1. Not here: what is
shared out among them.
"""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from lazyclip.base.errors import UserError

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=1)  # ranks wait for the slowest, which may score for hours


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process's rank of `world`, and its rank on its node."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this rank writes the results and the lines."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        found: list[T | None] = [None] * self.world
        dist.all_gather_object(found, value)
        return [item for item in found if item is not None]

    def from_first(self, make: Callable[[], T]) -> T:
        """Let rank 0 make a value, and return it on every rank; its `UserError` is every rank's."""
        if self.world == 1:
            return make()
        held: list[tuple[str | None, T | None]] = [(None, None)]
        if self.first:
            try:
                held = [(None, make())]
            except UserError as error:
                # The others must hear of it: they wait here.
                held = [(str(error), None)]
        dist.broadcast_object_list(held, src=0)
        mistake, value = held[0]
        if mistake is not None:
            raise UserError(mistake)
        if value is None:
            raise RuntimeError("rank 0 sent nothing")
        return value


def find_ranks() -> Ranks:
    """Read this process's place from torchrun's environment."""

    def number(name: str, default: int) -> int:
        text = os.environ.get(name, "")
        return int(text) if text.isdigit() else default

    return Ranks(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0))


def own_device(ranks: Ranks, device: str | None) -> str | None:
    """Name the device of this rank: with several ranks on CUDA, one GPU each.

    Raises:
        UserError: more ranks on a node than GPUs.
    """
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if ranks.world == 1 or wanted != "cuda" or not torch.cuda.is_available():
        return device
    if ranks.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {ranks.local_rank} of this node has no GPU, {torch.cuda.device_count()} are "
            "visible; lower --nproc_per_node"
        )
    return f"cuda:{ranks.local_rank}"


@contextlib.contextmanager
def process_group(ranks: Ranks) -> Iterator[None]:
    """Hold a process group where there are several ranks; they exchange Python values only."""
    if ranks.world == 1:
        yield
        return
    dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
