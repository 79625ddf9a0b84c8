"""The manifest of a run: shards, their chunks and samples, frozen, hashed and kept as one file.

A chunk is C records of a shard one after another; its bytes are a tar of their own. With 41,456
shards of 9,500 samples and C = 64 there are 6.2 million chunks. Not here: how a shard is walked
(`survey`), in which order samples come (`order`), filters (`filters`).
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lazyclip.base.errors import UserError

from .locate import Located
from .survey import NOT_WHOLE, REMEDIES, Finding, How, Survey, stem_of, survey_all
from .tar import BLOCK

FORMAT = "lazyclip manifest 1"
_ARRAYS = ("sizes", "records", "ends", "factors", "first", "starts", "keep")
# What one look at the report shows of a kind of finding.
_NAMED = 3


class ChunkSpan(NamedTuple):
    """Where a chunk lies: shard's number, offset, length in bytes, first ordinal, its records."""

    shard: int
    offset: int
    length: int
    ordinal: int
    records: int


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
    """What a run trains on.

    Fields: chunk, records in a chunk; names of the shards; for each shard its size in bytes, its
    records, the end of the last, its factor, and the number of its first chunk (with one more entry
    behind); for each chunk its start in blocks of 512 bytes and its bits: a set one for each record
    that counts (high bit first). Filters that were applied. Not hashed: how many records have a
    suffix, and findings.
    """

    chunk: int
    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    records: NDArray[np.int64]
    ends: NDArray[np.int64]
    factors: NDArray[np.int64]
    first: NDArray[np.int64]
    starts: NDArray[np.uint32]
    keep: NDArray[np.uint8]
    filters: tuple[str, ...] = ()
    suffixes: tuple[tuple[str, int], ...] = ()
    findings: tuple[Finding, ...] = ()

    @functools.cached_property
    def counts(self) -> NDArray[np.int64]:
        """Samples of each chunk."""
        ones = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.int64)
        return ones[self.keep].sum(axis=1)

    @functools.cached_property
    def chunk_factors(self) -> NDArray[np.int64]:
        """How often each chunk comes in a pass."""
        return np.repeat(self.factors, np.diff(self.first))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Bytes of each chunk."""
        starts = self.starts.astype(np.int64) * BLOCK
        ends = np.append(starts[1:], 0)
        filled = np.diff(self.first) > 0
        ends[self.first[1:][filled] - 1] = self.ends[filled]
        return ends - starts

    @property
    def samples(self) -> int:
        """Samples of a pass, those of a shard with factor f counted f times."""
        return int((self.counts * self.chunk_factors).sum())

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of everything the order of samples depends on."""
        about = json.dumps([FORMAT, self.chunk, self.names, self.filters], ensure_ascii=True)
        digest = hashlib.sha256(about.encode())
        for name in _ARRAYS:
            array = getattr(self, name)
            digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).data)
        return digest.hexdigest()

    def span(self, chunk: int) -> ChunkSpan:
        """Return where a chunk lies."""
        shard = int(np.searchsorted(self.first, chunk, side="right")) - 1
        place = chunk - int(self.first[shard])
        last = chunk + 1 == int(self.first[shard + 1])
        offset = int(self.starts[chunk]) * BLOCK
        end = int(self.ends[shard]) if last else int(self.starts[chunk + 1]) * BLOCK
        records = int(self.records[shard]) - place * self.chunk if last else self.chunk
        return ChunkSpan(shard, offset, end - offset, place * self.chunk, records)

    def kept(self, chunk: int) -> NDArray[np.int64]:
        """Return the places in the chunk (0..C-1) of the records that count, ascending."""
        return np.flatnonzero(np.unpackbits(self.keep[chunk], count=self.chunk))


def _gaps(shards: Sequence[Located]) -> list[Finding]:
    """Name the numbers that lack in each folder's run of numbered shards."""
    numbers: dict[Path, set[int]] = {}
    for shard in shards:
        stem = stem_of(shard.origin)
        if re.fullmatch(r"\d+", stem.name):
            numbers.setdefault(stem.parent, set()).add(int(stem.name))
    found = []
    for folder, there in numbers.items():
        low, high = min(there), max(there)
        lacking = high - low + 1 - len(there)
        if lacking:
            ordered = sorted(there)
            first = next(a + 1 for a, b in itertools.pairwise(ordered) if b != a + 1)
            detail = f"{lacking} of {high - low + 1} numbers lack, first {first}"
            found.append(Finding("gap", folder.name, detail))
    return found


def _unfinished(shards: Sequence[Located]) -> list[Finding]:
    """Name shards without statistics in folders where others have them."""
    with_stats: dict[Path, set[str]] = {}
    for folder in {shard.origin.parent for shard in shards}:
        names = os.listdir(folder) if folder.is_dir() else []
        with_stats[folder] = {n.removesuffix("_stats.json") for n in names if "_stats.json" in n}
    return [
        Finding("unfinished download", shard.name)
        for shard in shards
        if with_stats[shard.origin.parent]
        and stem_of(shard.origin).name not in with_stats[shard.origin.parent]
    ]


def merge(
    shards: Sequence[Located], surveys: Sequence[Survey], chunk: int, missing: Sequence[Path] = ()
) -> Manifest:
    """Put surveys of shards together.

    Args:
        shards: of the run.
        surveys: one for each.
        chunk: records in a chunk.
        missing: files that the pattern named and that do not exist.
    """
    suffixes: Counter[str] = Counter()
    findings = [Finding("missing", str(path)) for path in missing]
    for survey in surveys:
        suffixes.update(survey.suffixes)
        findings += survey.findings
    chunks = [len(survey.starts) for survey in surveys]
    bits = bytes.fromhex("".join(survey.keep for survey in surveys))
    starts = [np.array(survey.starts, dtype=np.uint32) for survey in surveys]
    return Manifest(
        chunk=chunk,
        names=tuple(shard.name for shard in shards),
        sizes=np.array([survey.size for survey in surveys], dtype=np.int64),
        records=np.array([survey.records for survey in surveys], dtype=np.int64),
        ends=np.array([survey.end for survey in surveys], dtype=np.int64),
        factors=np.array([shard.factor for shard in shards], dtype=np.int64),
        first=np.concatenate([[0], np.cumsum(chunks)]).astype(np.int64),
        starts=np.concatenate([np.empty(0, dtype=np.uint32), *starts]),
        keep=np.frombuffer(bits, dtype=np.uint8).reshape(sum(chunks), (chunk + 7) // 8),
        suffixes=tuple(suffixes.most_common()),
        findings=(*findings, *_gaps(shards), *_unfinished(shards)),
    )


def build(
    shards: Sequence[Located], how: How, folder: Path, missing: Sequence[Path] = (),
    *, strict: bool = False,
) -> Manifest:  # fmt: skip
    """Survey shards and merge the results.

    Args:
        shards: plain tars (see `locate.unpacked`).
        how: of the walk.
        folder: keeps the results of single shards, for a build that is interrupted.
        missing: see `merge`.
        strict: refuse truncated, damaged, empty and missing shards.

    Raises:
        UserError: no sample at all (tells the members seen); or, strict, a shard that is not whole.
    """
    manifest = merge(shards, survey_all(shards, how, folder), how.chunk, missing)
    unread = [f for f in manifest.findings if f.kind == "cannot be read"]
    if unread:
        raise UserError(
            f"{len(unread)} shards cannot be read, first {unread[0].shard} ({unread[0].detail}); "
            f"{REMEDIES['cannot be read']}"
        )
    if strict:
        refuse_broken(manifest.findings)
    if manifest.samples == 0:
        seen = suffix_line(manifest) or "no members at all"
        kinds = ", ".join(sorted({finding.kind for finding in manifest.findings}))
        raise UserError(
            f"the {len(shards)} shards hold no sample with a picture and a caption ({kinds}); "
            f"seen: {seen}; a sample is KEY.jpg and KEY.txt side by side in a tar"
        )
    return manifest


def refuse_broken(findings: Sequence[Finding]) -> None:
    """Refuse shards that are missing or not whole; raises `UserError` with the first of them."""
    broken = [f for f in findings if f.kind == "missing" or f.kind in NOT_WHOLE]
    if broken:
        first = broken[0]
        why = f"{first.kind}: {first.detail}" if first.detail else first.kind
        raise UserError(
            f"{len(broken)} shards are not whole, first {first.shard} ({why}); "
            f"{REMEDIES[first.kind]}"
        )


def save(manifest: Manifest, file: Path) -> None:
    """Write a manifest, whole or not at all.

    Raises:
        OSError: the folder cannot be written, or is full.
    """
    about = {
        "format": FORMAT, "sha256": manifest.sha256, "chunk": manifest.chunk,
        "names": manifest.names, "filters": manifest.filters, "suffixes": manifest.suffixes,
        "findings": [dataclasses.astuple(finding) for finding in manifest.findings],
    }  # fmt: skip
    text = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            np.savez_compressed(
                stream, about=text, **{name: getattr(manifest, name) for name in _ARRAYS}
            )
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(file: Path) -> Manifest:
    """Read a manifest and check its hash.

    Raises:
        UserError: no such file, or not a whole manifest.
    """
    remedy = "build it again: python -m training.index SHARDS --rebuild"
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            about = json.loads(stored["about"].tobytes())
            arrays = {name: stored[name] for name in _ARRAYS}
        manifest = Manifest(
            chunk=about["chunk"], names=tuple(about["names"]), filters=tuple(about["filters"]),
            suffixes=tuple((suffix, n) for suffix, n in about["suffixes"]),
            findings=tuple(Finding(*finding) for finding in about["findings"]), **arrays,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"manifest {file} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"manifest {file} is damaged or none ({error}); {remedy}") from None
    if about["format"] != FORMAT or about["sha256"] != manifest.sha256:
        raise UserError(f"manifest {file} does not fit its own hash; {remedy}")
    return manifest


def verify(manifest: Manifest, shards: Sequence[Located]) -> None:
    """Check that a manifest is that of the shards as they lie on disk, by name, factor and size.

    Raises:
        UserError: the first difference, and how many there are.
    """
    remedy = "build it again: python -m training.index SHARDS --rebuild"
    names = tuple(shard.name for shard in shards)
    if names != manifest.names:
        strange = sorted(set(names) ^ set(manifest.names)) or ["their order"]
        raise UserError(
            f"the manifest is of {len(manifest.names)} shards, the pattern names {len(names)}; "
            f"first difference: {strange[0]}; {remedy}"
        )
    factors = [shard.factor for shard in shards]
    if factors != manifest.factors.tolist():
        raise UserError(f"the manifest was built with other upsampling factors; {remedy}")
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(_size, [shard.path for shard in shards]))
    wrong = [i for i, size in enumerate(sizes) if size != manifest.sizes[i]]
    if wrong:
        i = wrong[0]
        now = "missing" if sizes[i] is None else f"{sizes[i]} bytes"
        raise UserError(
            f"{len(wrong)} shards are not what the manifest says, first {shards[i].path}: {now}, "
            f"was {manifest.sizes[i]} bytes; restore them or {remedy}"
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def default_file(shards: Sequence[Located], chunk: int, fallback: Path) -> Path:
    """Return where the manifest of these shards lies: beside the first, or in `fallback`.

    The name holds a hash of shards, factors and chunk, so that patterns over one folder do not
    disturb each other. `fallback` is taken where the shards' folder is read-only and has none.
    """
    told = json.dumps([chunk, [(shard.name, shard.factor) for shard in shards]])
    name = f"manifest-{hashlib.sha256(told.encode()).hexdigest()[:12]}.npz"
    beside = shards[0].origin.parent / name
    return beside if beside.exists() or writable(beside.parent) else fallback / name


def writable(folder: Path) -> bool:
    """Tell whether a folder may be written; without any write bit it is read-only to root too."""
    try:
        bits = stat.S_IMODE(folder.stat().st_mode) & 0o222
    except OSError:
        return False
    return bool(bits) and os.access(folder, os.W_OK)


def suffix_line(manifest: Manifest) -> str:
    """Phrase the table of member suffixes: `jpg in 165, json in 165 of 165 records`."""
    rows = [f"{suffix} in {n}" for suffix, n in manifest.suffixes[:12]]
    return f"{', '.join(rows)} of {int(manifest.records.sum())} records" if rows else ""


def report(manifest: Manifest) -> list[str]:
    """Say in a few lines what the shards hold, and each kind of finding with its remedy."""
    lines = [
        f"{len(manifest.names)} shards, {int(manifest.sizes.sum()) / 2**30:.2f} GiB, "
        f"{manifest.samples} samples in a pass, {len(manifest.starts)} chunks of "
        f"{manifest.chunk}, manifest {manifest.sha256[:12]}",
        f"members: {suffix_line(manifest)}",
    ]
    kinds: dict[str, list[Finding]] = {}
    for finding in manifest.findings:
        kinds.setdefault(finding.kind, []).append(finding)
    for kind, found in kinds.items():
        named = [f"{f.shard} ({f.detail})" if f.detail else f.shard for f in found[:_NAMED]]
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        lines.append(f"{kind}: {', '.join(named)}{more}; {REMEDIES[kind]}")
    return lines
