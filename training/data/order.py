"""The order of samples: a pure function of seed, epoch, chunk counts, lanes and window.

All chunks of a pass are permuted and their samples, one after another, cut into L lanes of equal
length (give or take one). Inside a lane M chunks one after another make a window, whose samples
are permuted. A lane's stream is its part of pass 0, then of pass 1, without end; step t of global
batch G takes G/L samples of every lane, so that the state is one number: k, samples consumed of
each lane. World size and loader processes have no say. Not here: what the samples are.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lazyclip.base.errors import UserError

LANES = 384
WINDOW = 8

Ints = NDArray[np.int64]


class Slot(NamedTuple):
    """A place in a lane's stream.

    Fields: epoch; chunk's number; place among the chunk's samples; copy, 0 but where a source
    counts more than once in a pass.
    """

    epoch: int
    chunk: int
    place: int
    copy: int


class Piece(NamedTuple):
    """A lane's part of a chunk: its samples low..high-1; most pieces are whole chunks."""

    chunk: int
    copy: int
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Window:
    """M chunks of a lane, between whose samples is drawn.

    Fields: epoch; number in the lane's pass, from 0; start, the k of its first slot; pieces;
    order, slot -> place among the pieces' samples one after another.
    """

    epoch: int
    number: int
    start: int
    pieces: tuple[Piece, ...]
    order: Ints

    @property
    def stop(self) -> int:
        """The k behind its last slot."""
        return self.start + len(self.order)

    def slots(self) -> list[Slot]:
        """List its slots in order."""
        there = [
            Slot(self.epoch, piece.chunk, place, piece.copy)
            for piece in self.pieces
            for place in range(piece.low, piece.high)
        ]
        return [there[i] for i in self.order]


def _draw(n: int, *key: int) -> Ints:
    """Permute 0..n-1 by Philox.

    Sorted raw numbers and not `permutation`, whose stream numpy does not promise to keep.
    """
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(n)
    return np.argsort(raw, kind="stable")


class _LanePass(NamedTuple):
    """A lane's pieces in one pass: chunk, copy, low, high for each, and running sums of samples."""

    chunk: Ints
    copy: Ints
    low: Ints
    high: Ints
    ends: Ints


class Order:
    """The samples of every lane at every k."""

    def __init__(
        self, counts: Ints, factors: Ints, *, seed: int, lanes: int, window: int = WINDOW,
        serves: Iterable[int] = (),
    ) -> None:  # fmt: skip
        """Prepare; permutations are made when asked for.

        Args:
            counts: samples of each chunk.
            factors: how often each chunk comes in a pass.
            seed: of everything drawn here.
            lanes: L.
            window: M, chunks of a window.
            serves: the lanes that will be asked for; others can be asked for too, slowly.

        Raises:
            UserError: fewer samples than lanes.
        """
        self.seed, self.lanes, self.window = seed, lanes, window
        there = np.flatnonzero(counts > 0)
        times = factors[there]
        # Entry i of a pass is chunk _chunk[i], for the _copy[i]-th time.
        self._chunk = np.repeat(there, times)
        self._copy = np.arange(len(self._chunk)) - np.repeat(np.cumsum(times) - times, times)
        self._counts = counts[self._chunk]
        self.samples = int(self._counts.sum())
        self._serves = tuple(serves)
        self._passes: dict[tuple[int, int], _LanePass] = {}
        if self.samples < lanes:
            raise UserError(
                f"{self.samples} samples < {lanes} lanes (a batch takes one of each at least); use "
                f"a global batch of at most {self.samples}, or more data"
            )

    def serve(self, lanes: Iterable[int]) -> None:
        """Prepare for other lanes than before, from the next pass on."""
        self._serves = tuple(lanes)

    def length(self, lane: int) -> int:
        """Return how many samples of a pass a lane has."""
        return self._cut(lane + 1) - self._cut(lane)

    def _cut(self, lane: int) -> int:
        return lane * self.samples // self.lanes

    def _lane_pass(self, epoch: int, lane: int) -> _LanePass:
        if (epoch, lane) not in self._passes:
            # The table of all chunks is large and made once a pass; only the own lanes' parts stay.
            entries = _draw(len(self._chunk), self.seed, epoch)
            ends = np.cumsum(self._counts[entries])
            kept = {key: one for key, one in self._passes.items() if key[0] >= epoch - 1}
            for each in {lane, *self._serves}:
                kept[epoch, each] = self._part(entries, ends, each)
            self._passes = kept
        return self._passes[epoch, lane]

    def _part(self, entries: Ints, ends: Ints, lane: int) -> _LanePass:
        """Cut a lane's part out of a pass."""
        low, high = self._cut(lane), self._cut(lane + 1)
        a = int(np.searchsorted(ends, low, side="right"))
        b = int(np.searchsorted(ends, high, side="left")) + 1
        mine, mine_ends = entries[a:b], ends[a:b]
        begins = mine_ends - self._counts[mine]
        lows = np.maximum(low - begins, 0)
        highs = np.minimum(high, mine_ends) - begins
        return _LanePass(self._chunk[mine], self._copy[mine], lows, highs, np.cumsum(highs - lows))

    def window_at(self, lane: int, k: int) -> Window:
        """Return the window that holds slot k of a lane; costs the same for every k."""
        epoch, place = divmod(k, self.length(lane))
        part = self._lane_pass(epoch, lane)
        entry = int(np.searchsorted(part.ends, place, side="right"))
        # Each lane's windows begin elsewhere, so that not all are refilled at the same step.
        first = lane % self.window
        if entry < first:
            number, a, b = 0, 0, first
        else:
            number = (entry - first) // self.window + (first > 0)
            a = first + (entry - first) // self.window * self.window
            b = a + self.window
        pieces = tuple(
            Piece(*map(int, row))
            for row in zip(part.chunk[a:b], part.copy[a:b], part.low[a:b], part.high[a:b],
                           strict=True)
        )  # fmt: skip
        before = int(part.ends[a - 1]) if a else 0
        n = int(part.ends[min(b, len(part.ends)) - 1]) - before
        order = _draw(n, self.seed, epoch, lane, number)
        return Window(epoch, number, epoch * self.length(lane) + before, pieces, order)

    def at_border(self, k: int, share: int) -> bool:
        """Tell whether slots k..k+share-1 of all lanes together belong to more than one pass."""
        shortest, rest = divmod(self.samples, self.lanes)
        longest = shortest + (rest > 0)
        return k // longest != (k + share - 1) // shortest

    def stream(self, lane: int, k: int = 0) -> Iterator[Slot]:
        """Yield a lane's slots from k on, without end."""
        while True:
            window = self.window_at(lane, k)
            yield from window.slots()[k - window.start :]
            k = window.stop


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _near(wanted: int, known: Iterable[int], most: int = 4) -> str:
    close = sorted(sorted(known, key=lambda n: (abs(n - wanted), n))[:most])
    return ", ".join(map(str, close))


def lanes_for(global_batch: int, world: int, most: int = LANES) -> int:
    """Choose the number of lanes: the largest that divides the batch and that `world` divides.

    Args:
        global_batch: samples of a step, all ranks together.
        world: ranks.
        most: lanes at most, unless `world` itself is more.

    Raises:
        UserError: the world size does not divide the global batch; names the nearest that do.
    """
    if global_batch % world:
        below = global_batch // world * world
        fits = [n for n in (below, below + world) if n]
        raise UserError(
            f"a global batch of {global_batch} cannot be shared by {world} ranks; use "
            f"{' or '.join(map(str, fits))}, or a world size of "
            f"{_near(world, _divisors(global_batch))}"
        )
    fitting = [lanes for lanes in _divisors(global_batch) if lanes % world == 0]
    return max((lanes for lanes in fitting if lanes <= most), default=fitting[0])


def fewer_lanes(global_batch: int, world: int, lanes: int) -> list[int]:
    """List the smaller numbers of lanes that batch and ranks allow too, largest first."""
    fitting = [n for n in _divisors(global_batch) if n % world == 0 and n < lanes]
    return fitting[::-1]


def check_lanes(global_batch: int, lanes: int, world: int) -> None:
    """Check numbers that were not chosen together, such as those of a run that is resumed.

    Raises:
        UserError: lanes do not divide the batch, or ranks do not divide the lanes; names the
            nearest numbers that fit.
    """
    if global_batch % lanes:
        below = global_batch // lanes * lanes
        fits = [n for n in (below, below + lanes) if n]
        raise UserError(
            f"a global batch of {global_batch} does not divide among {lanes} lanes; use "
            f"{' or '.join(map(str, fits))}, or lanes {_near(lanes, _divisors(global_batch))}"
        )
    if lanes % world:
        raise UserError(
            f"{lanes} lanes do not divide among {world} ranks; use a world size of "
            f"{_near(world, _divisors(lanes))}"
        )
