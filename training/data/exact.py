"""The exact loader: lanes' streams to batches, each sample once in a pass, any number of workers.

A sample that cannot be decoded keeps its slot: another one of the same window stands in for it,
one that is not in the same step of the lane, or, where there is none, the slot is masked. It is
masked too in a step that holds slots of two passes: what could stand in may be there already, in
another lane. Reading errors end the run. Not here: the order (`order`), reading (`chunks`), memory
(`memory`), transforms.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .ahead import one_ahead
from .batches import Loading, seeded
from .children import settle
from .chunks import Chunk, Reader, Shared
from .memory import most_bytes
from .order import LANES, WINDOW, Order, Slot, Window, check_lanes
from .samples import Dropped, Pair, decode
from .sources import Turn

Decode = Callable[[Any, Turn], Pair | Dropped]
# Places (chunk, sample of it) that a lane has in a step.
Taken = Callable[[], set[tuple[int, int]]]
# Threads of a process that read windows ahead; reading waits, it does not compute.
READERS = 4


@dataclasses.dataclass(frozen=True)
class Fault:
    """A line of the ledger: a sample that could not be used in its slot.

    Fields: shard's name; ordinal; reason, one of a few words to count by; detail; substitute, the
    `shard:ordinal` that stands in, None where the slot is masked.
    """

    shard: str
    ordinal: int
    reason: str
    detail: str
    substitute: str | None


@dataclasses.dataclass(frozen=True)
class Step:
    """What a rank trains on in one step.

    Fields: number, counted from where the loader began; images B x 3 x H x W; texts B x context;
    ids B x 2, number of the shard and ordinal of each slot's own sample; masked B, true where a
    slot holds no sample and must not count in the loss; faults of this step.
    """

    number: int
    images: Tensor
    texts: Tensor
    ids: Tensor
    masked: Tensor
    faults: tuple[Fault, ...]

    def pin_memory(self) -> "Step":
        """Return a copy with the large tensors in page-locked memory."""
        return dataclasses.replace(
            self, images=self.images.pin_memory(), texts=self.texts.pin_memory()
        )


@dataclasses.dataclass(frozen=True)
class Exact:
    """What the order of a run follows from.

    Fields: reader, with manifest and shards; lanes; window, chunks between which is drawn; decode,
    sample and turn -> pair or why not. Workers, loader processes of a rank (0: in place), have no
    say in the order; memory depends on them.
    """

    reader: Reader
    lanes: int = LANES
    window: int = WINDOW
    decode: Decode = decode
    workers: int = 0

    def order(self, seed: int, serves: Iterable[int] = ()) -> Order:
        """Return the order of the samples; `serves` names the lanes that will be asked for."""
        manifest = self.reader.manifest
        return Order(
            manifest.counts, manifest.chunk_factors, seed=seed, lanes=self.lanes,
            window=self.window, serves=serves,
        )  # fmt: skip

    def window_bytes(self, world: int) -> int:
        """Return the most bytes that a rank's windows take, in all its processes."""
        own = self.lanes // world
        processes = min(max(self.workers, 1), own)
        return most_bytes(self.reader.manifest, self.lanes, self.window, own, processes)

    def within(self, most: float, world: int) -> "Exact | None":
        """Lower the window, which changes the order, until a rank's windows take `most` bytes.

        Returns:
            This one where it fits; None where a window of one chunk does not.
        """
        if self.window_bytes(world) <= most:
            return self
        smaller = [dataclasses.replace(self, window=n) for n in range(1, self.window)]
        fitting = bisect.bisect_right(smaller, most, key=lambda one: one.window_bytes(world))
        return smaller[fitting - 1] if fitting else None


@contextlib.contextmanager
def _drawing(name: str) -> Iterator[None]:
    """Draw torch's and Python's random numbers from a name; both states are put back."""
    before = random.getstate()
    random.seed(name)
    try:
        with seeded(name):
            yield
    finally:
        random.setstate(before)


class _Opened(NamedTuple):
    """A window with its chunks, and its samples that are known not to decode."""

    window: Window
    slots: list[Slot]
    chunks: dict[int, Chunk]
    bad: dict[tuple[int, int], Dropped]


class _Filled(NamedTuple):
    """A slot's content; no image: masked."""

    image: Tensor | None
    caption: str
    shard: int
    ordinal: int
    fault: Fault | None


class _Lane:
    """One lane's stream from k on."""

    def __init__(self, worker: "_Worker", lane: int, k: int) -> None:
        self._worker, self._lane, self._k = worker, lane, k
        self._coming: Future[_Opened] = self._open(k)
        self._now: _Opened | None = None

    def _open(self, k: int) -> "Future[_Opened]":
        window = self._worker.order.window_at(self._lane, k)
        return self._worker.pool.submit(_opened, window, self._worker.chunks)

    def _next(self) -> tuple[_Opened, Slot]:
        if self._now is None or self._k == self._now.window.stop:
            self._now = self._coming.result()
            self._coming = self._open(self._now.window.stop)
        slot = self._now.slots[self._k - self._now.window.start]
        self._k += 1
        return self._now, slot

    def take(self, number: int, border: bool) -> list[_Filled]:
        """Return the lane's share of a step; `border`: the step holds slots of two passes."""
        first = self._k

        @functools.cache  # few steps ask
        def taken() -> set[tuple[int, int]]:
            slots = itertools.islice(self._worker.order.stream(self._lane, first), number)
            return {(slot.chunk, slot.place) for slot in slots}

        # One after another: a window is let go before the one after the next is read.
        return [self._fill(*self._next(), None if border else taken) for _ in range(number)]

    def _fill(self, opened: _Opened, slot: Slot, taken: Taken | None) -> _Filled:
        chunk = opened.chunks[slot.chunk]
        shard, ordinal = chunk.span.shard, chunk.ordinal(slot.place)
        name = f"{self._worker.seed} {slot.epoch} {chunk.shard.name} {ordinal} {slot.copy}"
        found = self._decode(opened, slot.chunk, slot.place, slot.epoch)
        if isinstance(found, Pair):
            return _Filled(self._augment(found, name), found.caption, shard, ordinal, None)
        fault = Fault(chunk.shard.name, ordinal, found.reason, found.detail, None)
        stand_in = self._stand_in(opened, slot, taken()) if taken is not None else None
        if stand_in is None:
            return _Filled(None, "", shard, ordinal, fault)
        other, label = stand_in
        fault = dataclasses.replace(fault, substitute=label)
        return _Filled(self._augment(other, name), other.caption, shard, ordinal, fault)

    def _stand_in(
        self, opened: _Opened, slot: Slot, taken: set[tuple[int, int]]
    ) -> tuple[Pair, str] | None:
        """Find another sample for a slot, and its label; it is then one of those taken."""
        for place in _candidates(opened.window, slot):
            if place in taken or place in opened.bad or self._worker.factors[place[0]] > 1:
                continue  # another copy of what comes more than once may stand in this very batch
            other = self._decode(opened, *place, slot.epoch)
            if isinstance(other, Dropped):
                continue
            taken.add(place)  # or it could stand in for two slots of a step
            chunk = opened.chunks[place[0]]
            return other, f"{chunk.shard.name}:{chunk.ordinal(place[1])}"
        return None

    def _decode(self, opened: _Opened, number: int, index: int, epoch: int) -> Pair | Dropped:
        if (number, index) in opened.bad:
            return opened.bad[number, index]
        chunk = opened.chunks[number]
        found: Any = chunk.sample(index)
        if not isinstance(found, Dropped):
            turn = Turn(epoch, chunk.span.shard, chunk.shard.path)
            found = self._worker.decode(found, turn)
        if isinstance(found, Dropped):
            opened.bad[number, index] = found
        return found

    def _augment(self, pair: Pair, name: str) -> Tensor:
        with _drawing(name):
            return self._worker.transform(pair.picture)


def _opened(window: Window, chunks: Shared) -> _Opened:
    held = {piece.chunk: chunks.get(piece.chunk) for piece in window.pieces}
    return _Opened(window, window.slots(), held, {})


def _candidates(window: Window, slot: Slot) -> Iterator[tuple[int, int]]:
    """Yield what may stand in for a slot: what follows it in its chunk, then the window's others.

    Only the lane's own part of a chunk: of the rest the lane does not know when it comes.
    """
    own = next(
        piece
        for piece in window.pieces
        if (piece.chunk, piece.copy) == (slot.chunk, slot.copy)
        and piece.low <= slot.place < piece.high
    )
    after = itertools.chain(range(slot.place + 1, own.high), range(own.low, slot.place))
    yield from ((own.chunk, place) for place in after)
    for piece in window.pieces:
        if piece is not own:
            yield from ((piece.chunk, place) for place in range(piece.low, piece.high))


class _Worker:
    """What one process does: some lanes of a rank, step by step."""

    def __init__(
        self, exact: Exact, order: Order, loading: Loading, lanes: Sequence[int], start: int
    ) -> None:
        self.order = order
        self.seed, self.decode, self.transform = loading.seed, exact.decode, loading.transform
        self.chunks = Shared(exact.reader)
        self.factors = exact.reader.manifest.chunk_factors
        self.pool = ThreadPoolExecutor(READERS, "read")
        self._tokenizer = loading.tokenizer
        self._share = loading.batch_size * loading.world // exact.lanes
        self._lanes, self._start = lanes, start

    def steps(self) -> Iterator[Step]:
        """Yield this process's part of every step."""
        try:
            lanes = [_Lane(self, lane, self._start) for lane in self._lanes]
            for number in itertools.count():
                border = self.order.at_border(self._start + number * self._share, self._share)
                filled = [slot for lane in lanes for slot in lane.take(self._share, border)]
                yield self._collate(number, filled)
        finally:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def _blank(self) -> Tensor:
        with _drawing("blank"):
            return self.transform(Image.new("RGB", (64, 64), (128, 128, 128)))

    def _collate(self, number: int, filled: Sequence[_Filled]) -> Step:
        images = [self._blank() if slot.image is None else slot.image for slot in filled]
        return Step(
            number,
            torch.stack(images),
            self._tokenizer([slot.caption for slot in filled]),
            torch.tensor([(slot.shard, slot.ordinal) for slot in filled], dtype=torch.long),
            torch.tensor([slot.image is None for slot in filled]),
            tuple(slot.fault for slot in filled if slot.fault is not None),
        )


class _Stream(torch.utils.data.IterableDataset[Step]):
    """The parts of one loader process, told by its number."""

    def __init__(
        self, exact: Exact, order: Order, loading: Loading, lanes: Sequence[int], start: int
    ) -> None:
        self._about = exact, order, loading, lanes, start

    def __iter__(self) -> Iterator[Step]:
        exact, order, loading, lanes, start = self._about
        info = torch.utils.data.get_worker_info()
        if info is not None:
            lanes = _split(lanes, info.num_workers)[info.id]
            order.serve(lanes)
        return _Worker(exact, order, loading, lanes, start).steps()


def _split(lanes: Sequence[int], parts: int) -> list[list[int]]:
    """Cut lanes into runs, so that parts one after another stand in the order of lanes."""
    return [list(map(int, part)) for part in np.array_split(np.array(lanes), parts)]


def _joined(parts: Sequence[Step]) -> Step:
    if len({part.number for part in parts}) != 1:
        raise RuntimeError(f"loader processes are out of step: {[p.number for p in parts]}")
    if len(parts) == 1:
        return parts[0]
    return Step(
        parts[0].number,
        torch.cat([part.images for part in parts]),
        torch.cat([part.texts for part in parts]),
        torch.cat([part.ids for part in parts]),
        torch.cat([part.masked for part in parts]),
        tuple(fault for part in parts for fault in part.faults),
    )


def steps(exact: Exact, loading: Loading, start: int = 0) -> Iterator[Step]:
    """Yield this rank's steps without end.

    The global batch of a step is the same set for every world size that divides the lanes; a rank's
    own batch is the same, bit for bit, for any number of workers.

    Args:
        exact: what is read and in which order.
        loading: `batch_size * world` is the global batch.
        start: samples of each lane that were consumed before.

    Raises:
        UserError: lanes, batch and ranks do not divide; fewer samples than lanes.
        ReadFailed: a shard cannot be read.
    """
    check_lanes(loading.batch_size * loading.world, exact.lanes, loading.world)
    lanes = range(loading.rank, exact.lanes, loading.world)
    order = exact.order(loading.seed, lanes)
    # The first pass is drawn here once, not in every loader process.
    order.window_at(lanes[0], start)
    stream = _Stream(exact, order, loading, lanes, start)
    # A process without a lane would have nothing to give.
    workers = min(loading.workers, len(lanes))
    if not workers:
        yield from (step.pin_memory() if loading.pin else step for step in stream)
        return
    loader = torch.utils.data.DataLoader(
        stream, batch_size=None, num_workers=workers, prefetch_factor=2, worker_init_fn=settle,
        generator=torch.Generator(),
    )  # fmt: skip
    parts = iter(loader)
    # A thread begins on the first GPU, whatever the trainer uses; a number below 0 changes nothing.
    gpu = torch.cuda.current_device() if loading.pin else -1

    def part() -> Step:
        try:
            return next(parts)
        except (EOFError, ConnectionError) as error:
            # What it gave away was not yet fetched when it ended.
            raise RuntimeError(
                "a loader process exited unexpectedly; where memory ran out, use fewer --workers"
            ) from error

    def joined() -> Iterator[Step]:
        while True:
            step = _joined([part() for _ in range(workers)])
            yield step.pin_memory() if loading.pin else step

    yield from one_ahead(joined(), lambda: torch.cuda.set_device(gpu))


def digest(ids: Iterable[tuple[str, int]]) -> str:
    """Return the SHA-256 of a step's samples: sorted `shard:ordinal` lines joined by line feeds."""
    lines = sorted(f"{shard}:{ordinal}" for shard, ordinal in ids)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
