"""Samples to batches: shuffle, transform, tokenise, collate, in loader processes or in place.

The stages are plain generator functions, strung together by webdataset's pipeline. Every random
choice follows from the seed, the lane and the sample's own name, so that two runs of one seed see
the same batches. Not here: what is done with a batch.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import webdataset
from PIL import Image
from torch import Tensor

from lazyclip.shards import Sample

from .samples import Dropped, Pair, decode, read_shard
from .sources import Source

# Records (still compressed) among which a lane draws; filled to START before the first is drawn.
SHUFFLE, SHUFFLE_START = 5000, 1000


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a rank trains on in one step.

    Fields: images B x 3 x H x W; texts B x context, token ids; dropped, the records met on the way
    that gave no sample.
    """

    images: Tensor
    texts: Tensor
    dropped: tuple[Dropped, ...]


@dataclasses.dataclass(frozen=True)
class Loading:
    """How a rank loads.

    Fields: batch_size per rank; transform PIL -> 3 x H x W; tokenizer texts -> B x context; rank
    and world; workers, loader processes of this rank (0: in place); pin for copies to a GPU.
    """

    batch_size: int
    transform: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    seed: int
    rank: int
    world: int
    workers: int
    pin: bool

    @property
    def lanes(self) -> int:
        """Loader processes of all ranks together."""
        return self.world * max(self.workers, 1)


@contextlib.contextmanager
def seeded(name: str) -> Iterator[None]:
    """Draw torch's random numbers from a seed made of a name; the state before is put back."""
    before = torch.get_rng_state()
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(before)


Record = tuple[int, Sample | Dropped]


def _records(source: Source, loading: Loading) -> Iterator[Record]:
    """Yield a lane's records with their pass number, without end."""
    worker = torch.utils.data.get_worker_info()
    lane = loading.rank * max(loading.workers, 1) + (worker.id if worker else 0)
    for number, shard in source.lane(loading.seed, lane, loading.lanes):
        for record in read_shard(shard):
            yield number, record


def _decoded(records: Iterable[Record]) -> Iterator[Pair | Dropped]:
    for number, record in records:
        yield record if isinstance(record, Dropped) else decode(record, number)


def _batched(items: Iterable[Pair | Dropped], loading: Loading) -> Iterator[Batch]:
    images: list[Tensor] = []
    captions: list[str] = []
    dropped: list[Dropped] = []
    for item in items:
        if isinstance(item, Dropped):
            dropped.append(item)
            # A lane that finds nothing must speak up instead of searching for ever.
            if len(dropped) >= SHUFFLE and not images:
                yield _collate([], [], dropped, loading)
                dropped = []
            continue
        with seeded(f"{loading.seed} {item.identity}"):
            images.append(loading.transform(item.picture))
        captions.append(item.caption)
        if len(images) == loading.batch_size:
            yield _collate(images, captions, dropped, loading)
            images, captions, dropped = [], [], []


def _collate(
    images: list[Tensor], captions: list[str], dropped: list[Dropped], loading: Loading
) -> Batch:
    if not images:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), tuple(dropped))
    return Batch(torch.stack(images), loading.tokenizer(captions), tuple(dropped))


class _Pinned:
    """Copy a batch into page-locked memory, which DataLoader does for its own types only."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def __call__(self, batch: Batch) -> Batch:
        if not self.on:
            return batch
        return Batch(batch.images.pin_memory(), batch.texts.pin_memory(), batch.dropped)


def batches(source: Source, loading: Loading) -> Iterator[Batch]:
    """Yield this rank's batches without end; each is whole.

    A batch without pictures says that thousands of records in a row gave no sample.
    """
    pipeline = webdataset.DataPipeline(
        # No lambdas: loader processes that are spawned get these by pickle.
        functools.partial(_records, source, loading),
        webdataset.shuffle(SHUFFLE, initial=SHUFFLE_START, seed=f"{loading.seed} shuffle"),
        _decoded,
        functools.partial(_batched, loading=loading),
    )
    if not loading.workers:
        yield from map(_Pinned(loading.pin), pipeline)
        return
    options: dict[str, Any] = {"prefetch_factor": 2, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(
        pipeline, batch_size=None, num_workers=loading.workers, **options
    )
    yield from map(_Pinned(loading.pin), loader)
