"""Members to records: what belongs together in a shard, which records count, what of them is read.

A record is found by (shard, ordinal); its key is only unique at best. Its rules are those of
`lazyclip.shards.iterate_samples`, without reading contents. Names of members are compared, never
used as paths. Not here: decoding (`samples`), what a shard as a whole is like (`survey`).
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lazyclip.shards import IMAGE_SUFFIXES, split_member

from .tar import Damage, Member, ReadRange

# Members that are read at all; nothing else of a shard reaches a decoder.
SUFFIXES = (*IMAGE_SUFFIXES, "txt", "json", "cls")


class Span(NamedTuple):
    """Where a member's content lies: offset and size in bytes."""

    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Caps:
    """The largest members that are read, in bytes; a larger one makes its sample a bad one."""

    image: int = 64 << 20
    text: int = 64 << 10
    json: int = 1 << 20

    def limit(self, suffix: str) -> int:
        """Return the most bytes a member of this suffix may have."""
        if suffix in IMAGE_SUFFIXES:
            return self.image
        return self.json if suffix == "json" else self.text


@dataclasses.dataclass(slots=True)
class Record:
    """A record of a shard.

    Fields: key, its members' common name; ordinal, its place in the shard from 0, complete or not;
    start, where its first header begins; end, where its last member ends; spans, suffix (lower
    case) -> content.
    """

    key: str
    ordinal: int
    start: int
    end: int
    spans: dict[str, Span]

    @property
    def complete(self) -> bool:
        """Tell whether it has a picture and a caption, whatever is in them."""
        spans = self.spans
        return "txt" in spans and any(suffix in spans for suffix in IMAGE_SUFFIXES)


def group(
    members: Iterable[Member], *, first: int = 0, passed: list[str] | None = None
) -> Iterator[Record]:
    """Group members to records.

    Members next to each other with one key make a record; a suffix that comes again starts a new
    one, and so does another key. Folders, links and names without key or suffix are passed over.

    Args:
        members: of one shard, or of a part that begins with a record.
        first: ordinal of the first record.
        passed: takes the names of members that are in no record, folders apart.

    Yields:
        The records in order. Before a `Damage` of `members` goes on to the caller the record that
        was being put together is yielded too, if it is complete.
    """
    record: Record | None = None
    try:
        for name, start, data, size, regular in members:
            split = split_member(name) if regular else None
            if split is None:
                if passed is not None and not name.endswith("/"):
                    passed.append(name)
                continue
            key, suffix = split
            if record is None or key != record.key or suffix in record.spans:
                if record is not None:
                    yield record
                    first += 1
                record = Record(key, first, start, data, {})
            record.spans[suffix] = Span(data, size)
            record.end = data + ((size + 511) & -512)
    except Damage:
        if record is not None and record.complete:
            yield record
        raise
    if record is not None:
        yield record


def read_parts(record: Record, read: ReadRange, caps: Caps) -> tuple[dict[str, bytes], str | None]:
    """Read what of a record may be decoded.

    Args:
        record: of the stream that `read` reads.
        read: (offset, length) -> bytes.
        caps: the largest members.

    Returns:
        Contents by suffix, and None; or, where a member is too large, what is left and why:
        `caption too long`, `picture too large` or `json too large`.
    """
    parts: dict[str, bytes] = {}
    fault = None
    for suffix, (offset, size) in record.spans.items():
        if suffix not in SUFFIXES:
            continue
        if size > caps.limit(suffix):
            fault = fault or _too_large(suffix)
            continue
        parts[suffix] = bytes(read(offset, size))
    return parts, fault


def _too_large(suffix: str) -> str:
    if suffix in IMAGE_SUFFIXES:
        return "picture too large"
    return "json too large" if suffix == "json" else "caption too long"
