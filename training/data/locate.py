"""Which files a pattern means, for the exact loader: sources, factors, names, unpacked copies.

Unlike `lazyclip.shards.expand`, a brace pattern may have gaps (they are listed), and files with
lists of shards are read. Not here: what the shards hold (`survey`).
"""

import dataclasses
import glob
import gzip
import itertools
import logging
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from braceexpand import braceexpand

from lazyclip.base.errors import UserError
from lazyclip.shards import expand, split_sources

log = logging.getLogger(__name__)
LISTS = (".txt", ".list", ".lst")
_GZIP_MAGIC = b"\x1f\x8b"
# Files looked into at the same time: on a network disk each look waits.
_LOOKS = 16


@dataclasses.dataclass(frozen=True)
class Located:
    """A shard of a run.

    Fields: name, what it is called in order, audit and ledger, unique in the run and free of the
    folder that the data lie in; path, the file that is read; origin, the file that was given (it
    differs for a gzipped one), which sidecars lie beside; factor, how often each of its samples
    comes in a pass.
    """

    name: str
    path: Path
    origin: Path
    factor: int = 1


def read_factors(text: str | None, sources: int) -> tuple[int, ...]:
    """Read `--train-data-upsampling-factors`, such as `2::1`: a whole number for each source.

    Raises:
        UserError: another number of factors than sources, or one that is no whole number from 1.
    """
    if text is None:
        return (1,) * sources
    flag = f"--train-data-upsampling-factors {text}"
    words = [word.strip() for word in text.split("::")]
    if len(words) != sources:
        raise UserError(f"{flag}: {len(words)} factors for {sources} sources; give one for each")
    bad = next((word for word in words if not word.isdecimal() or int(word) < 1), None)
    if bad is not None:
        raise UserError(
            f"{flag}: '{bad}' is no whole number from 1; fractions only with --loader sequential"
        )
    return tuple(int(word) for word in words)


def find(
    pattern: str | Sequence[str], factors: str | None = None, flag: str = "--train-data"
) -> tuple[list[Located], list[Path]]:
    """Find the shards of a pattern.

    Args:
        pattern: sources joined by `::` (or a list): files, braces, globs, folders, or a file of
            .txt, .list or .lst with such a pattern in each line.
        factors: see `read_factors`.
        flag: the pattern's flag, for the messages.

    Returns:
        The shards in order of the pattern, one that comes twice once with both factors; the files
        that a brace pattern or a list names and that are missing.

    Raises:
        UserError: nothing found, a pipe or URL, or factors that do not fit.
    """
    sources = split_sources(pattern)
    if not sources:
        raise UserError(f'{flag} is empty; give shards, such as {flag} "data/{{00000..00009}}.tar"')
    found: Counter[Path] = Counter()
    first: dict[str, Path] = {}
    missing: list[Path] = []
    for source, factor in zip(sources, read_factors(factors, len(sources)), strict=True):
        paths, absent = _source(source, flag)
        if not paths and Path(source).is_file():
            raise UserError(f"{flag} {source}: none of the {len(absent)} shards it lists exists")
        if not paths:
            expand(source, flag)  # says what was tried
        for path in paths:
            # One file is one shard, by whatever spelling or link it is named.
            found[first.setdefault(os.path.realpath(path), path)] += factor
        missing += absent
    names = shard_names(list(found))
    shards = [Located(names[path], path, path, factor) for path, factor in found.items()]
    return shards, missing


def _source(source: str, flag: str) -> tuple[list[Path], list[Path]]:
    listed = Path(source)
    if listed.suffix.lower() in LISTS and listed.is_file():
        lines = listed.read_text(encoding="utf-8").splitlines()
        patterns = [line.strip() for line in lines if line.strip() and line[0] != "#"]
        # A relative name counts from the list's own folder.
        names = [line if "://" in line else str(listed.parent / line) for line in patterns]
    else:
        names = [source]
    paths: list[Path] = []
    missing: list[Path] = []
    for name in names:
        if name.startswith("pipe:"):
            raise UserError(
                f"{flag} {name}: only files are read by the exact loader, which goes back and "
                "forth in them; copy the shards, or stream them by --loader sequential --allow-pipe"
            )
        if "://" in name:
            expand(name, flag)  # refuses it
        here, absent = _braces(name, flag)
        paths += here
        missing += absent
    return paths, missing


def _braces(source: str, flag: str) -> tuple[list[Path], list[Path]]:
    try:
        names = list(braceexpand(source))
    except ValueError:  # its own kind, which its stubs do not name
        names = [source]  # refused below
    paths: list[Path] = []
    missing: list[Path] = []
    for name in names:
        if Path(name).exists() or glob.has_magic(name):
            paths += expand(name, flag)
        else:
            missing.append(Path(name))
    return paths, missing


def shard_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Name each file: by its own name, or, where two have the same, from their common folder on."""
    plain = Counter(path.name for path in paths)
    if all(count == 1 for count in plain.values()):
        return {path: path.name for path in paths}
    whole = {path: Path(os.path.abspath(path)) for path in paths}
    root = Path(os.path.commonpath([path.parent for path in whole.values()]))
    return {path: whole[path].relative_to(root).as_posix() for path in paths}


def is_gzip(path: Path) -> bool:
    """Tell by its content whether a file is gzipped; False when it cannot be opened."""
    try:
        with path.open("rb") as stream:
            return stream.read(2) == _GZIP_MAGIC
    except OSError:
        return False


def _gzipped(paths: Sequence[Path]) -> set[Path]:
    """Return the gzipped ones of many files, which are looked into side by side."""

    def look(part: Sequence[Path]) -> list[Path]:
        return [path for path in part if is_gzip(path)]

    with ThreadPoolExecutor(_LOOKS) as pool:
        return set(itertools.chain(*pool.map(look, [paths[i::_LOOKS] for i in range(_LOOKS)])))


def unpacked(shards: Sequence[Located], folder: Path) -> list[Located]:
    """Replace gzipped shards by plain copies, made once; says so in one line.

    Args:
        shards: any.
        folder: where the copies lie and stay; made when needed.

    Returns:
        The shards, paths of gzipped ones pointing to their copy; of a damaged one the copy holds
        what could be unpacked.

    Raises:
        UserError: no room for the copies, or the folder cannot be written.
    """
    packed = _gzipped([shard.path for shard in shards])
    if not packed:
        return list(shards)
    copies = {shard.path: _copy_name(shard, folder) for shard in shards if shard.path in packed}
    todo = [path for path, copy in copies.items() if not copy.exists()]
    if todo:
        size = sum(path.stat().st_size for path in todo)
        log.info(
            "unpacking %d gzipped shards (%.1f GiB packed) once into %s", len(todo), size / 2**30,
            folder,
        )  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in todo:
            _unpack(path, copies[path])
    except OSError as error:
        raise UserError(
            f"gzipped shards cannot be unpacked into {folder} ({error.strerror}); gunzip them "
            "yourself, or give --manifest FILE in a folder with room"
        ) from None
    return [dataclasses.replace(s, path=copies.get(s.path, s.path)) for s in shards]


def _copy_name(shard: Located, folder: Path) -> Path:
    """Name a copy so that another version of the packed file gets another one."""
    about = shard.path.stat()
    mark = zlib.crc32(f"{shard.path.absolute()} {about.st_size} {about.st_mtime_ns}".encode())
    return folder / f"{shard.path.name.split('.')[0]}-{mark:08x}.tar"


def _unpack(path: Path, copy: Path) -> None:
    part = copy.with_name(f"{copy.name}.{os.getpid()}.part")
    try:
        with gzip.open(path, "rb") as source, part.open("wb") as target:
            try:
                # read() would lose what it had unpacked when the damage comes.
                while content := source.read1(1 << 20):
                    target.write(content)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                log.warning(
                    "%s is damaged (%s); what could be unpacked is used; fetch it again",
                    path,
                    error,
                )
        part.replace(copy)
    finally:
        part.unlink(missing_ok=True)
