"""Chunks in memory: a chunk's bytes, its records and their contents.

Not here: which chunks come when (`order`), decoding (`samples`).
"""

import dataclasses
import functools
import threading
import weakref
from collections.abc import Sequence

from lazyclip.shards import Sample

from .locate import Located
from .manifest import ChunkSpan, Manifest
from .reading import Patience, ReadFailed, read_surely
from .records import Caps, Record, group, read_parts
from .samples import Dropped
from .tar import Damage, ReadRange, members_in
from .tar import memory as in_memory

# A chunk with a huge member (not seen in earnest) is not taken to memory as a whole.
WHOLE_UP_TO = 512 << 20


class Chunk:
    """A chunk that was read; samples are found by their index among those that count."""

    def __init__(
        self,
        shard: Located,
        span: ChunkSpan,
        records: Sequence[Record],
        read: ReadRange,
        caps: Caps,
    ) -> None:
        """Hold `records`, those that count, and the reader of their contents."""
        self.shard, self.span, self.records = shard, span, records
        self._read, self._caps = read, caps

    def ordinal(self, index: int) -> int:
        """Return the place in the shard of a sample of the chunk."""
        return self.records[index].ordinal

    def sample(self, index: int) -> Sample | Dropped:
        """Return a sample's contents, or, where a member is larger than its cap, why not."""
        record = self.records[index]
        parts, fault = read_parts(record, self._read, self._caps)
        if fault:
            return Dropped(f"{self.shard.name}:{record.ordinal}", fault)
        return Sample(record.key, parts, self.shard.path, record.ordinal)


# A chunk's memory is at most this much larger than the chunk, so that it fits others after it.
SLACK = 1.125


class Buffers:
    """Memory of chunks that are no longer held, used again: new pages cost more than reading.

    What is free and what is in use are together never more than what was in use at once.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._free: list[bytearray] = []
        self._used = self._idle = self._peak = 0
        # A chunk that goes away while this thread is inside gives its memory back at once.
        self._lock = threading.RLock()

    @property
    def held(self) -> int:
        """Bytes in use and free."""
        return self._used + self._idle

    def take(self, length: int) -> bytearray:
        """Return memory for `length` bytes at least; what is in it is of no meaning."""
        with self._lock:
            fits = [i for i, b in enumerate(self._free) if length <= len(b) <= SLACK * length]
            if fits:
                buffer = self._free.pop(fits[-1])
                self._idle -= len(buffer)
                self._used += len(buffer)
            else:
                size = length + length // 16
                self._used += size
            self._peak = max(self._peak, self._used)
            while self._free and self._used + self._idle > self._peak:
                self._idle -= len(self._free.pop(0))
        return buffer if fits else bytearray(size)

    def give(self, buffer: bytearray) -> None:
        """Take memory back."""
        with self._lock:
            self._used -= len(buffer)
            self._idle += len(buffer)
            self._free.append(buffer)


@dataclasses.dataclass(frozen=True)
class Reader:
    """How chunks are read: manifest, its shards as they lie on disk, patience, caps."""

    manifest: Manifest
    shards: tuple[Located, ...]
    patience: Patience = dataclasses.field(default_factory=Patience)
    caps: Caps = dataclasses.field(default_factory=Caps)

    def read(self, number: int, buffers: "Buffers") -> Chunk:
        """Read a chunk.

        Args:
            number: of the chunk.
            buffers: where its memory comes from, and where it goes when nobody holds it.

        Raises:
            ReadFailed: it cannot be read, or the shard no longer holds what the manifest says.
        """
        span = self.manifest.span(number)
        shard = self.shards[span.shard]
        held = span.length <= WHOLE_UP_TO
        memory = buffers.take(span.length) if held else bytearray()
        content = memoryview(memory)[:0]
        read: ReadRange = functools.partial(self._far, shard, span.offset)
        if held:
            content = read_surely(shard.path, span.offset, span.length, self.patience, memory)
            read = in_memory(content)
        try:
            members = members_in(read, span.length, content)
            records = list(group(members, first=span.ordinal))
        except Damage as damage:
            raise self._changed(shard, f"{damage} of the part from {span.offset}") from None
        if len(records) != span.records:
            raise self._changed(shard, f"{len(records)} records in place of {span.records}")
        kept = [records[place] for place in self.manifest.kept(number)]
        if not all(record.complete for record in kept):
            raise self._changed(shard, f"a record without picture or caption from {span.offset}")
        chunk = Chunk(shard, span, kept, read, self.caps)
        if held:
            weakref.finalize(chunk, buffers.give, memory).atexit = False
        return chunk

    def _far(self, shard: Located, base: int, offset: int, length: int) -> memoryview:
        # Windows of headers may reach beyond the shard's end.
        size = int(self.manifest.sizes[self.shards.index(shard)])
        length = min(length, size - base - offset)
        return read_surely(shard.path, base + offset, length, self.patience)

    @staticmethod
    def _changed(shard: Located, what: str) -> ReadFailed:
        return ReadFailed(
            f"shard {shard.path} changed since its manifest was built: {what}; restore the file, "
            "or build the manifest again and start a new run"
        )


class Shared:
    """Chunks that are in use somewhere in this process, so that two lanes share one copy."""

    def __init__(self, reader: Reader) -> None:
        """Start with none."""
        self._reader, self._buffers = reader, Buffers()
        self._used: weakref.WeakValueDictionary[int, Chunk] = weakref.WeakValueDictionary()
        self._coming: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes of memory that chunks take, or took and will take again."""
        return self._buffers.held

    def get(self, number: int) -> Chunk:
        """Return a chunk, read now unless somebody holds it; called from several threads."""
        with self._lock:
            coming = self._coming.setdefault(number, threading.Lock())
        # Threads that ask for one chunk at once wait for the first: it is never there twice.
        with coming:
            with self._lock:
                chunk = self._used.get(number)
            if chunk is None:
                chunk = self._reader.read(number, self._buffers)
            with self._lock:
                self._used[number] = chunk
                self._coming.pop(number, None)
        return chunk
