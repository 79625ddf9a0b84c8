"""What the loop is fed, whichever loader reads it: batches, what was bad, whose samples they are.

Not here: reading and order (`data`).
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

from torch import Tensor

from .data.batches import Loading, batches
from .data.exact import Exact, steps
from .data.order import check_lanes
from .data.sources import Source


@dataclasses.dataclass(frozen=True)
class Bad:
    """A sample that could not be used.

    Fields: label, shard and place; reason, one of a few words to count by; detail, for the log;
    substitute, the sample that stands in its slot (None: nobody does).
    """

    label: str
    reason: str
    detail: str = ""
    substitute: str | None = None

    def phrase(self) -> str:
        """Say it in one line."""
        why = f"{self.reason}: {self.detail}" if self.detail else self.reason
        return f"{self.label}: {why}"

    def line(self) -> dict[str, Any]:
        """Return its line of the ledger."""
        shard, _, ordinal = self.label.rpartition(":")
        place: dict[str, Any] = {"label": self.label}
        if ordinal.isdecimal():
            place = {"shard": shard, "ordinal": int(ordinal)}
        about = {"reason": self.reason, "detail": self.detail, "substitute": self.substitute}
        return {**place, **about}


def reasons_of(counts: Counter[str]) -> str:
    """Phrase counts of reasons, most frequent first."""
    return ", ".join(f"{n} {reason}" for reason, n in counts.most_common())


@dataclasses.dataclass(frozen=True)
class Fed:
    """What a rank trains on in one step.

    Fields: images B x 3 x H x W; texts B x context; bad samples met; masked B, true where a slot
    holds no sample, or None where slots are never masked; ids B x 2, shard's number and ordinal of
    each slot's own sample, or None.
    """

    images: Tensor
    texts: Tensor
    bad: tuple[Bad, ...] = ()
    masked: Tensor | None = None
    ids: Tensor | None = None

    @property
    def read(self) -> int:
        """Samples that were read for it, bad ones too."""
        # The exact loader's bad samples stand in slots of their own; the other's lie between.
        return len(self.images) + (len(self.bad) if self.ids is None else 0)


class Feed(Protocol):
    """A loader, ready to begin at any step it can."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the shards that ids count by."""

    def samples_per_lane(self, step: int) -> int:
        """The data state at a step."""

    def steps(self, start: int) -> Generator[Fed, None, None]:
        """Yield this rank's batches from a step on, without end."""


@dataclasses.dataclass(frozen=True)
class ExactFeed:
    """The loader that reads each sample once in a pass and begins anywhere."""

    exact: Exact
    loading: Loading

    @property
    def names(self) -> Sequence[str]:
        """Names of the shards."""
        return self.exact.reader.manifest.names

    def samples_per_lane(self, step: int) -> int:
        """Return k, the samples of each lane that are consumed before a step."""
        return step * (self.loading.batch_size * self.loading.world // self.exact.lanes)

    def steps(self, start: int) -> Generator[Fed, None, None]:
        """Yield this rank's batches from a step on."""
        check_lanes(
            self.loading.batch_size * self.loading.world, self.exact.lanes, self.loading.world
        )
        for step in steps(self.exact, self.loading, self.samples_per_lane(start)):
            bad = tuple(
                Bad(f"{fault.shard}:{fault.ordinal}", fault.reason, fault.detail, fault.substitute)
                for fault in step.faults
            )
            yield Fed(step.images, step.texts, bad, step.masked, step.ids)


@dataclasses.dataclass(frozen=True)
class SequentialFeed:
    """The streaming loader; it begins at its beginning only."""

    source: Source
    loading: Loading
    names: Sequence[str] = ()

    def samples_per_lane(self, step: int) -> int:
        """Return 0: a stream has no place to go back to."""
        del step
        return 0

    def steps(self, start: int) -> Generator[Fed, None, None]:
        """Yield this rank's batches from the first on."""
        if start:
            raise ValueError("a stream begins at step 0")
        for batch in batches(self.source, self.loading):
            bad = tuple(Bad(d.label, d.reason, d.detail) for d in batch.dropped)
            yield Fed(batch.images, batch.texts, bad)


def fixed(make: Callable[[], Generator[Fed, None, None]]) -> Feed:
    """Make a feed of a plain generator, that begins wherever it is told to."""
    return _Fixed(make)


@dataclasses.dataclass(frozen=True)
class _Fixed:
    make: Callable[[], Generator[Fed, None, None]]
    names: Sequence[str] = ()

    def samples_per_lane(self, step: int) -> int:
        return step

    def steps(self, start: int) -> Generator[Fed, None, None]:
        fed = self.make()
        for _ in range(start):
            next(fed)
        yield from fed


def labels(ids: Tensor, names: Sequence[str]) -> list[str]:
    """Name samples as `shard:ordinal`.

    Args:
        ids: B x 2, shard's number and ordinal.
        names: of the shards.
    """
    return [f"{names[shard]}:{ordinal}" for shard, ordinal in ids.tolist()]
