"""Members of a tar, by a small parser that says where each begins and ends.

Reads what img2dataset, webdataset, GNU tar and Python write: ustar, pax (own and global) and GNU
long names, octal and base-256 sizes. It can begin at any member's first header, so that a part of
a shard is a stream of its own. Where Python's `tarfile` stops in silence (a damaged header, a
missing end) this one raises. Not here: which members make a sample (`records`), compression,
reading files (`reading`).
"""

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
# Read at once while walking headers: on a network file system a round trip costs more than bytes.
WINDOW = 1 << 20
# A header's own data: no path and no pax record is longer in earnest.
EXTRA_LIMIT = 1 << 20

ReadRange = Callable[[int, int], memoryview]
"""(offset, length) -> the bytes there, fewer at the end."""

_ZERO = bytes(BLOCK)
_NOTHING = memoryview(b"")
# Copied out of a window at once: the headers of a member, mostly those of the small ones behind.
_NEAR = 8 * BLOCK
# A pax header of one block, what it says, and the member's own header.
_USUAL = 3 * BLOCK
_HALF = BLOCK // 2
_KNOWN = 16
# Types of one byte each, looked up in one go.
_REGULAR = b"0\x007"  # file, old file, contiguous file
_PLAIN = ord("0")
# Types that have no content whatever their size field says: links, devices, folders, pipes.
_WITHOUT_CONTENT = b"123456"
_ABOUT_NEXT = b"xXLKg"
_SPARSE = b"S"


class Damage(ValueError):
    """A tar that cannot be read on: `offset` says from where, `cut` whether it just ends early."""

    def __init__(self, reason: str, offset: int, *, cut: bool = False) -> None:
        """Say what is wrong and where."""
        super().__init__(f"{reason} at byte {offset}")
        self.offset, self.cut = offset, cut


class Member(NamedTuple):
    """A member of a tar.

    Fields: name; start, where its first header begins (a pax or long-name header counts); data,
    where its content begins; size in bytes; regular, whether it is a plain file.
    """

    name: str
    start: int
    data: int
    size: int
    regular: bool

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.data + _padded(self.size)


def _padded(size: int) -> int:
    return (size + BLOCK - 1) & -BLOCK


def _number(field: bytes, offset: int) -> int:
    """Read a numeric field: octal, or base 256 where its first byte says so."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0]
    try:
        value = int(text, 8)
    except ValueError:
        value = -1 if text.strip() else 0
    if value < 0:  # base 256 can be negative too: first byte 0xFF
        raise Damage(f"no number in a header ({field!r})", offset)
    return value


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _check_sum(header: bytes, offset: int) -> None:
    # Adler-32 holds the plain sum in its low half, exact up to 256 bytes: many times faster than
    # sum(). The field itself counts as eight blanks.
    low = zlib.adler32(header[:_HALF]) & 0xFFFF
    high = zlib.adler32(header[_HALF:]) & 0xFFFF
    total = low + high - 2 - sum(header[148:156]) + 256
    if header[148:156] == b"%06o\0 " % total:  # as nearly everybody writes it
        return
    wanted = _number(header[148:156], offset)
    if total == wanted:
        return
    signed = total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if signed != wanted:  # some old writers summed signed bytes
        raise Damage("a damaged header", offset)


def _pax_records(raw: bytes, offset: int) -> dict[str, str]:
    """Read pax records, `LENGTH KEY=VALUE` and a line feed each."""
    records: dict[str, str] = {}
    place = 0
    while place < len(raw) and raw[place] != 0:
        head, blank, _ = raw[place : place + 21].partition(b" ")
        length = int(head) if blank and head.isdigit() else 0
        line = raw[place + len(head) + 1 : place + length]
        key, equals, value = line[:-1].partition(b"=")
        if not equals or line[-1:] != b"\n" or len(line) != length - len(head) - 1:
            raise Damage("a damaged pax header", offset)
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        place += length
    return records


class _Walk:
    """Headers one after another, read through a window.

    Fields: offset, where the next header begins; first, where the headers of the member to come
    began; own, what they say of it (of two that speak, the first wins, as in `tarfile`).
    """

    def __init__(self, read: ReadRange, offset: int, held: memoryview, window: int) -> None:
        """Start at `offset`; `held` are the bytes from there on that are in memory already."""
        self.read, self.window = read, window
        self.offset = self.first = offset
        self.own: dict[str, str] = {}
        self._held, self._base = held, offset
        self._near, self._near_base = b"", offset
        # Pax headers that were checked, and whether what they announce fits one block: most
        # writers write the same few before every member.
        self._known: dict[bytes, bool] = {}

    def take(self, length: int) -> bytes:
        """Return `length` bytes at `offset` (fewer at the end) and stay there."""
        at = self.offset - self._near_base
        found = self._near[at : at + length]
        return found if len(found) == length else self._come_near(length)

    def _come_near(self, length: int) -> bytes:
        wanted = max(length, _NEAR)
        at = self.offset - self._base
        near = bytes(self._held[at : at + wanted])
        if len(near) < length:
            self._held = self.read(self.offset, max(wanted, self.window))
            self._base = self.offset
            near = bytes(self._held[:wanted])
        self._near, self._near_base = near, self.offset
        return near[:length]

    def header(self, end: int | None) -> bytes | None:
        """Return the header at `offset`, checked; None at the end of the archive."""
        pending = self.first != self.offset
        if end is not None and self.offset >= end:
            if pending:
                raise Damage("a header without its member", self.first)
            return None
        header = self.take(BLOCK)
        if header in self._known:
            return header
        if len(header) < BLOCK:
            reason = "a cut header" if header or pending else "no end-of-archive mark"
            raise Damage(reason, self.first, cut=True)
        if header == _ZERO:
            if pending or end is not None:
                raise Damage("an end-of-archive mark too early", self.offset)
            return None
        _check_sum(header, self.offset)
        if header[156:157] == b"x" and len(self._known) < _KNOWN:
            self._known[header] = 0 < _number(header[124:136], self.offset) <= BLOCK
        return header

    def usual(self, end: int | None) -> Member | None:
        """Return the next member if it is written as most are, in half the time.

        That is: the known pax header, which says times or owners only, before a plain file with a
        short name. None: it may be anything; `next` finds out.
        """
        start = self.offset
        at = start - self._base
        near = bytes(self._held[at : at + _USUAL])
        if not self._known.get(near[:BLOCK], False) or len(near) < _USUAL:
            return None
        if end is not None and start + _USUAL > end:
            return None
        said, header = near[BLOCK : 2 * BLOCK], near[2 * BLOCK :]
        stop = said.find(0)
        records = said[:stop]
        if stop < 0 or not said.endswith(_ZERO[stop:]):
            return None
        if b"path=" in records or b"size=" in records or b"sparse" in records:
            return None
        if header[156] != _PLAIN or header[345] or header[135] or not header.isascii():
            return None
        # The sum of 512 ASCII bytes does not wrap round in Adler-32's low half.
        field = header[148:156]
        if field != b"%06o\0 " % ((zlib.adler32(header) & 0xFFFF) - sum(field) + 255):
            return None
        try:
            size = int(header[124:135], 8)
        except ValueError:
            return None
        if size < 0:
            return None
        data = start + _USUAL
        self.offset = data + ((size + BLOCK - 1) & -BLOCK)
        name = header[:100].partition(b"\0")[0].decode("ascii")
        # The same as Member(...), at a fifth of its price.
        return tuple.__new__(Member, (name, start, data, size, True))

    def next(self, end: int | None) -> Member | None:
        """Return the next member, or None at the end of the archive."""
        self.first, self.own = self.offset, {}
        while True:
            header = self.header(end)
            if header is None:
                return None
            kind = header[156:157]
            if kind not in _ABOUT_NEXT:
                return self._member(header, kind)
            self._note(header, kind)

    def _note(self, header: bytes, kind: bytes) -> None:
        """Keep what a header says of the member to come, and pass it."""
        at, length = self.offset, _number(header[124:136], self.offset)
        if length > EXTRA_LIMIT:
            raise Damage(f"a header of {length} bytes", at)
        self.offset += BLOCK
        # All of the last block, as tarfile takes it: texts end at their first zero.
        whole = _padded(length)
        raw = self.take(whole)
        if len(raw) < length:
            raise Damage("a cut header", self.first, cut=True)
        self.offset += whole
        if kind == b"L":
            self.own.setdefault("path", _text(raw))
        elif kind != b"K" and (b"path=" in raw or b"size=" in raw or b"sparse" in raw):
            # Times and owners, the usual content, change neither what nor where a member is.
            records = _pax_records(raw, at)
            if kind == b"g" and ("path" in records or "size" in records):
                # A part of the shard read by itself would not know of it.
                raise Damage("a global pax header that names or sizes members", at)
            for key, value in records.items():
                self.own.setdefault(key, value)
        if kind == b"g" and self.first == at:
            self.first = self.offset  # it speaks of the archive

    def _member(self, header: bytes, kind: bytes) -> Member:
        at, own = self.offset, self.own
        name, size = _text(header[:100]), _number(header[124:136], at)
        folder = kind == b"\0" and name.endswith("/")
        if header[345]:
            name = f"{_text(header[345:500])}/{name}"
        if own:
            if kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in own):
                raise Damage("a sparse member", at)
            name = own.get("path", name)
            if "size" in own:
                if not (own["size"].isascii() and own["size"].isdigit()):
                    raise Damage("a damaged pax header", at)
                size = int(own["size"])
        elif kind == _SPARSE:
            raise Damage("a sparse member", at)
        if kind != b"0" and (folder or kind in _WITHOUT_CONTENT):
            size = 0
        self.offset = at + BLOCK + _padded(size)
        return Member(name, self.first, at + BLOCK, size, kind in _REGULAR and not folder)


def members(read: ReadRange, size: int, *, window: int = WINDOW) -> Iterator[Member]:
    """Walk a whole tar's headers.

    Args:
        read: (offset, length) -> bytes.
        size: bytes there are.
        window: bytes to read at once; small where jumping over contents is cheap.

    Yields:
        Every member whose content is there wholly, without the headers that speak of another.

    Raises:
        Damage: it cannot be read on, or no end-of-archive mark stands where it ends; all members
            before were yielded.
    """
    walk = _Walk(read, 0, _NOTHING, window)
    while (member := walk.usual(None) or walk.next(None)) is not None:
        if member.data + member.size > size:
            raise Damage(f"{member.name} ends early", member.start, cut=True)
        yield member


def members_in(read: ReadRange, size: int, held: memoryview = _NOTHING) -> Iterator[Member]:
    """Walk a part of a tar that begins with a member's first header and ends after a member.

    Args:
        read: (offset, length) -> bytes; offsets count from the part's start, those of the members
            too.
        size: of the part in bytes.
        held: the part, or its beginning, where it is in memory.

    Yields:
        Its members.

    Raises:
        Damage: it cannot be read to its end; all members before were yielded.
    """
    walk = _Walk(read, 0, held, WINDOW)
    while (member := walk.usual(size) or walk.next(size)) is not None:
        if member.data + member.size > size:
            raise Damage(f"{member.name} ends early", member.start, cut=True)
        yield member


def memory(content: bytes | memoryview) -> ReadRange:
    """Return a reader of bytes in memory."""
    view = memoryview(content)
    return lambda offset, length: view[offset : offset + length]
