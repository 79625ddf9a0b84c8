"""Read LAION-form shards: which files a pattern means, and the samples of one tar.

Interface, needs no torch:
    expand(pattern, flag="--train-data") -> list[Path]     braces, globs, folders, `::` or a list
    iterate_samples(path) -> Iterator[Sample]              Sample(key, parts, shard, ordinal)
    Sample.parts: suffix without its dot, lower case ("jpg", "txt", "json", "seg.png") -> bytes
    read_json_part(sample) -> dict                         the sample's json; ShardError names it
    class_index_of(sample) -> int | None                   json `class_index`, or a `cls` member
    image_part(sample) -> bytes | None                     its picture, undecoded
A damaged or truncated tar raises `ShardError` (a `UserError`) after the samples before the damage.
Not here: decoding, shuffling, the split over workers, the rule for bad samples (training), and
which suffixes are wanted.
"""

import glob
import gzip
import io
import json
import logging
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from braceexpand import braceexpand

from lazyclip.base.errors import UserError

log = logging.getLogger(__name__)
ENDINGS = (".tar", ".tar.gz", ".tgz")
TABLES = (".csv", ".tsv", ".parquet", ".json", ".jsonl", ".txt")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512  # tar's unit; an archive ends with blocks of zeros
_GZIP_MAGIC = b"\x1f\x8b"
_DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error)


class ShardError(UserError):
    """A shard that cannot be read to its end, or a member that is not what its suffix says."""


class Sample(NamedTuple):
    """One record of a shard.

    Fields: key, the members' common name (unique in a shard at best, never across shards); parts,
    suffix without dot -> content; shard; ordinal, its place in the shard from 0.
    """

    key: str
    parts: Mapping[str, bytes]
    shard: Path
    ordinal: int

    @property
    def label(self) -> str:
        """Name the sample for messages: `00003.tar:17 (key 000030017)`."""
        return f"{self.shard.name}:{self.ordinal} (key {self.key})"


def split_sources(pattern: str | Sequence[str]) -> list[str]:
    """Split `a::b` (or a list of such) into its sources, in order, without expanding them."""
    given = [pattern] if isinstance(pattern, str) else list(pattern)
    return [part.strip() for text in given for part in text.split("::") if part.strip()]


def expand(pattern: str | Sequence[str], flag: str = "--train-data") -> list[Path]:
    """Find the shards a pattern names.

    Args:
        pattern: paths joined by `::`, or a list of them. Each may hold braces (`{00000..00009}`,
            kept in their order), glob characters (`*`, `?`, `[`; sorted), or be a folder (its .tar,
            .tar.gz and .tgz files, sorted).
        flag: the command-line flag the pattern came from, for the messages.

    Returns:
        Existing files, at least one; a shard named twice stands twice.

    Raises:
        UserError: a pipe or URL, nothing found (says what was tried first), or a file that a brace
            pattern names and that is missing.
    """
    sources = split_sources(pattern)
    if not sources:
        raise UserError(f'{flag} is empty; give shards, such as {flag} "data/{{00000..00009}}.tar"')
    return [path for source in sources for path in _expand_source(source, flag)]


def _expand_source(source: str, flag: str) -> list[Path]:
    if source.startswith("pipe:") or "://" in source:
        raise UserError(f"{flag} {source}: only files are read; copy the shards to a local folder")
    try:
        names = list(braceexpand(source))
    except ValueError:  # its own kind, which its stubs do not name
        raise UserError(f"{flag} {source}: unbalanced braces; write {{00000..00009}}") from None
    found: list[Path] = []
    missing: list[str] = []
    for name in names:
        here = _one_name(name)
        found += here
        if not here:
            missing.append(name)
    if not found:
        raise UserError(
            f"{flag} {source} names 0 existing shards; first tried: {missing[0]}"
            f"{_why_empty(Path(missing[0]))}. Quote the pattern, such as "
            f'{flag} "dir/{{00000..00009}}.tar"'
        )
    if missing:
        raise UserError(
            f"{flag} {source}: {len(missing)} of {len(names)} shards do not exist, first: "
            f"{missing[0]}; shorten the range"
        )
    return found


def _one_name(name: str) -> list[Path]:
    """Return the shards behind one brace-free name: itself, a folder's shards, or a glob's."""
    path = Path(name)
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(ENDINGS))
    if path.exists():
        if path.suffix.lower() in TABLES:
            raise UserError(
                f"{path} looks like a table, and only tar shards are read; pack KEY.jpg and "
                "KEY.txt of each row into tars, or give the folder of the shards"
            )
        return [path]
    if glob.has_magic(name):
        hits = sorted(Path(hit) for hit in glob.glob(name, recursive=True))
        return [p for p in hits if p.is_file()]
    return []


def _why_empty(path: Path) -> str:
    if path.is_dir():
        return f" (a folder without {', '.join(ENDINGS)} files)"
    if not path.parent.is_dir() and not glob.has_magic(str(path)):
        return f" (no folder {path.parent})"
    return ""


def split_member(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and suffix at the first dot of its last part.

    Returns:
        (key with folders, suffix in lower case without dot), or None when it lacks either.
    """
    folder, _, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    if not (stem and dot and suffix):
        return None
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def iterate_samples(path: Path, stream: io.BufferedReader | None = None) -> Iterator[Sample]:
    """Read one shard front to back and yield its samples.

    Members next to each other with the same key make one sample; a suffix that comes again starts
    a new one, and so does another key. Grouping never goes beyond the shard. Members without key or
    suffix, links and devices are passed over and counted in one warning.

    Args:
        path: a tar, gzipped or not (told by its content, not by its name).
        stream: read in place of the file, front to back; `path` names it in labels and messages.

    Raises:
        ShardError: missing, truncated or damaged; samples before the damage were yielded, the one
            just before it was not (its members may be lost).
    """
    key: str | None = None
    parts: dict[str, bytes] = {}
    count = 0
    passed: list[str] = []
    try:
        for name, content in _members(path, passed, stream):
            split = split_member(name)
            if split is None:
                passed.append(name)
                continue
            if parts and (split[0] != key or split[1] in parts):
                yield Sample(cast(str, key), parts, path, count)
                count += 1
                parts = {}
            key = split[0]
            parts[split[1]] = content
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ShardError(f"shard {path} cannot be opened ({error.strerror})") from error
    except _DAMAGE as error:
        raise ShardError(
            f"shard {path} is truncated or damaged after {count} whole samples ({error}); "
            "fetch it again or leave it out of the pattern"
        ) from error
    if parts:
        yield Sample(cast(str, key), parts, path, count)
    if passed:
        log.warning(
            "%s: %d members are no part of a sample, first: %s", path, len(passed), passed[0]
        )


def _members(
    path: Path, passed: list[str], given: io.BufferedReader | None
) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file; names of links and devices go to `passed`."""
    with _open(path) if given is None else _unzipped(given) as plain:
        stream = _Watched(plain)
        # tarfile asks a stream for nothing but read().
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                if member.isdir():
                    continue
                opened = tar.extractfile(member) if member.isfile() else None
                if opened is None:
                    passed.append(member.name)
                    continue
                content = opened.read()
                if len(content) != member.size:
                    raise tarfile.ReadError(f"{member.name} ends early")
                yield member.name, content
            _check_end(stream, tar.offset, path)


class _Watched:
    """A stream that keeps its last chunk, to look at the block where tarfile stopped."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._chunk = b""
        self._start = 0

    def read(self, size: int) -> bytes:
        self._start += len(self._chunk)
        self._chunk = self._stream.read(size)
        return self._chunk

    def rest(self, offset: int) -> bytes:
        """Return what was read from `offset` on; empty when that lies before the last chunk."""
        at = offset - self._start
        return self._chunk[at:] if at >= 0 else b""


def _check_end(stream: _Watched, offset: int, path: Path) -> None:
    """Read on to the end; raises `ReadError` when no end-of-archive mark stands at `offset`.

    tarfile ends in silence at a file cut between two members and at a damaged header. Reading to
    the end makes gzip check its own sum.
    """
    rest = stream.rest(offset)
    if rest[:_BLOCK] != bytes(_BLOCK):
        reason = "a damaged header" if len(rest) >= _BLOCK else "no end-of-archive mark"
        raise tarfile.ReadError(f"{reason} at byte {offset}")
    more = bool(rest.strip(b"\0"))
    while chunk := stream.read(1 << 20):
        more = more or bool(chunk.strip(b"\0"))
    if more:
        log.warning(
            "%s goes on after its end-of-archive mark; what follows is not read (joined tars?)",
            path,
        )


def _open(path: Path) -> IO[bytes]:
    stream = path.open("rb")
    magic = stream.read(2)
    stream.seek(0)
    if magic != _GZIP_MAGIC:
        return stream
    stream.close()
    return cast(IO[bytes], gzip.open(path, "rb"))


def _unzipped(stream: io.BufferedReader) -> IO[bytes]:
    if stream.peek(2)[:2] != _GZIP_MAGIC:
        return stream
    return cast(IO[bytes], gzip.open(stream, "rb"))


def read_json_part(sample: Sample) -> dict[str, Any]:
    """Return the sample's json member as a mapping; an empty one where it has none.

    Raises:
        ShardError: the member is no JSON object.
    """
    content = sample.parts.get("json")
    if content is None:
        return {}
    try:
        loaded = json.loads(content)
    except ValueError as error:
        raise ShardError(f"{sample.label}: its json cannot be read ({error})") from None
    if not isinstance(loaded, dict):
        raise ShardError(f"{sample.label}: its json is a {type(loaded).__name__}, not an object")
    return loaded


def image_part(sample: Sample) -> bytes | None:
    """Return the content of the sample's picture (jpg, jpeg, png, webp); None without one."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample.parts:
            return sample.parts[suffix]
    return None


def class_index_of(sample: Sample) -> int | None:
    """Return the sample's class: its json's `class_index`, or its `cls` member's number.

    Returns:
        The index from 0; None where the sample names no class. The upper limit is the caller's.

    Raises:
        ShardError: a value that is no whole number from 0 on, two that differ, or an unreadable
            json.
    """
    given = read_json_part(sample).get("class_index")
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 0):
        raise ShardError(f"{sample.label}: class_index is {given!r}, not a whole number from 0 on")
    content = sample.parts.get("cls")
    if content is None:
        return given
    text = content.decode("ascii", "replace").strip()
    if not (text.isascii() and text.isdigit()):
        raise ShardError(f"{sample.label}: its cls is '{text[:40]}', not a whole number from 0 on")
    if given is not None and int(text) != given:
        raise ShardError(f"{sample.label}: class_index is {given}, and its cls member says {text}")
    return int(text)
