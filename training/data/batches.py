"""Samples to batches: shuffle, transform, tokenise, collate, in loader processes or in place.

The stages are plain generator functions, strung together by webdataset's pipeline. Every random
choice follows from the seed, the lane and the sample's own name, so that two runs of one seed see
the same batches. A lane shuffles within a pass, so that a pass holds each sample once; drawn shards
have no passes. Not here: what is done with a batch.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import webdataset
from torch import Tensor

from lazyclip.shards import Sample

from .children import settle
from .samples import Dropped, Pair, decode, read_shard
from .sources import Source, Turn

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

    def pin_memory(self) -> "Batch":
        """Return a copy in page-locked memory; DataLoader's pinning thread calls this."""
        return Batch(self.images.pin_memory(), self.texts.pin_memory(), self.dropped)


@dataclasses.dataclass(frozen=True)
class Loading:
    """How a rank loads.

    Fields: batch_size per rank; transform picture -> 3 x H x W; tokenizer texts -> B x context;
    rank and world; workers, loader processes of this rank (0: in place); pin the loader processes'
    batches for copies to a GPU.
    """

    batch_size: int
    transform: Callable[[Any], Tensor]
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

    def lane(self) -> int:
        """Return the lane of the process that asks."""
        worker = torch.utils.data.get_worker_info()
        return self.rank * max(self.workers, 1) + (worker.id if worker else 0)


@contextlib.contextmanager
def seeded(name: str) -> Iterator[None]:
    """Draw torch's CPU random numbers from a seed made of a name; the state before is put back."""
    before = torch.get_rng_state()
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    # Not torch.manual_seed, which would seed the GPUs too.
    torch.default_generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(before)


Record = tuple[Turn, Sample | Dropped]


def _records(source: Source, loading: Loading) -> Iterator[Record]:
    """Yield a lane's records with their shard's turn, without end."""
    for turn in source.lane(loading.seed, loading.lane(), loading.lanes):
        for record in read_shard(turn.shard, source.commands.get(turn.shard)):
            yield turn, record


def _shuffled(
    records: Iterable[Record], loading: Loading, resampled: bool, most: int, start: int
) -> Iterator[Record]:
    """Shuffle a lane's records among `most`, within a pass where there are passes."""
    lane = f"{loading.seed} shuffle {loading.lane()} of {loading.lanes}"
    passes = itertools.groupby(records, lambda record: 0 if resampled else record[0].number)
    for number, one_pass in passes:
        yield from webdataset.shuffle(most, initial=start, seed=f"{lane} {number}")(one_pass)


def _decoded(records: Iterable[Record]) -> Iterator[Pair | Dropped]:
    for turn, record in records:
        yield record if isinstance(record, Dropped) else decode(record, turn)


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


def _pipeline(source: Source, loading: Loading) -> webdataset.DataPipeline:
    """String the stages together; no lambdas, since loader processes may get it by pickle."""
    return webdataset.DataPipeline(
        functools.partial(_records, source, loading),
        functools.partial(
            _shuffled, loading=loading, resampled=source.resampled, most=SHUFFLE,
            start=SHUFFLE_START,
        ),
        _decoded,
        functools.partial(_batched, loading=loading),
    )  # fmt: skip


def batches(source: Source, loading: Loading) -> Iterator[Batch]:
    """Yield this rank's batches without end; each is whole.

    A batch without pictures says that thousands of records in a row gave no sample.
    """
    pipeline = _pipeline(source, loading)
    if not loading.workers:
        yield from pipeline
        return
    options: dict[str, Any] = {"prefetch_factor": 2, "pin_memory": loading.pin}
    # A generator of its own: DataLoader would draw its workers' seeds from the global one.
    options["generator"] = torch.Generator()
    yield from torch.utils.data.DataLoader(
        pipeline, batch_size=None, num_workers=loading.workers, worker_init_fn=settle, **options
    )
