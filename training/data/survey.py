"""What a shard holds, found by walking its headers: records, chunks, and everything odd about it.

Shards are walked in several processes; each result is kept in a small file, so that a survey that
was interrupted goes on where it was. Not here: the manifest that results are merged to.
"""

import dataclasses
import json
import logging
import multiprocessing
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from lazyclip.base.config import write_json
from lazyclip.base.logs import Progress
from lazyclip.shards import IMAGE_SUFFIXES

from .locate import Located
from .reading import range_of
from .records import Record, group
from .tar import BLOCK, Damage, ReadRange, members

log = logging.getLogger(__name__)
J = TypeVar("J")
R = TypeVar("R")
VERSION = 1
# Shards from which on processes are started; fewer are walked in place.
PARALLEL_FROM = 8


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something odd about a shard: kind, one of `REMEDIES`; shard's name; detail."""

    kind: str
    shard: str
    detail: str = ""


REMEDIES = {
    "missing": "fetch the shard, or shorten the range",
    "gap": "nothing to do where the downloads failed as a whole; else fetch the shard",
    "empty file": "fetch the shard again, or leave it out",
    "cannot be read": "mend the file's access rights, or leave it out",
    "truncated": "its whole samples are used; fetch the shard again to have all of them",
    "damaged": "its samples before the damage are used; fetch the shard again to have all of them",
    "goes on after its end": "only the first of joined tars is read; split them into shards",
    "interleaved keys": "write the members of a sample side by side: tar --sort=name",
    "repeated keys": "nothing to do: samples are told apart by their place",
    "no captions": "a sample is KEY.jpg and KEY.txt side by side; add the txt members",
    "no pictures": f"a sample has KEY.txt and one of KEY.{', KEY.'.join(IMAGE_SUFFIXES)}",
    "no samples": "leave the shard out",
    "incomplete samples": "samples without picture or caption are left out",
    "other members": "members without KEY.SUFFIX name, links and devices are left out",
    "statistics differ": "fetch the shard again if its own numbers are right",
    "unfinished download": "others have a _stats.json, this has none: fetch the shard again",
    "parquet differs": "fetch the shard and its parquet file again",
    "filtered": "as asked for",
    "parquet not checked": "pip install pyarrow to compare the parquet files too",
}

# Kinds of findings by which samples are lost that the shard should hold.
NOT_WHOLE = ("empty file", "truncated", "damaged")


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one shard holds.

    Fields: size in bytes; records, complete or not; complete ones; end, where the last record ends;
    starts, where each chunk begins, in blocks of 512 bytes; keep, hex of its chunks' bits, a set
    one for each complete record; suffixes, how many records have each; findings.
    """

    size: int
    records: int
    complete: int
    end: int
    starts: tuple[int, ...]
    keep: str
    suffixes: dict[str, int]
    findings: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True)
class How:
    """How to walk: chunk, records in a chunk; window, bytes read at once; processes."""

    chunk: int = 64
    window: int = 1 << 18
    processes: int = 1


class _Tally:
    """Counts over a shard's records."""

    def __init__(self, name: str, chunk: int) -> None:
        self.name, self.chunk = name, chunk
        self.starts: list[int] = []
        self.bits: list[bool] = []
        self.suffixes: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()
        self.partial: Counter[str] = Counter()
        self.end = 0

    def add(self, record: Record) -> None:
        if record.ordinal % self.chunk == 0:
            self.starts.append(record.start // BLOCK)
        self.bits.append(record.complete)
        (self.whole if record.complete else self.partial)[record.key] += 1
        self.suffixes.update(record.spans.keys())
        self.end = record.end

    def keep(self) -> str:
        padded = np.zeros((len(self.starts), self.chunk), dtype=bool)
        padded.reshape(-1)[: len(self.bits)] = self.bits
        return np.packbits(padded, axis=1).tobytes().hex()

    def findings(self) -> Iterator[Finding]:
        """Yield what the records themselves show."""
        apart = sum(count > 1 for count in self.partial.values())
        if apart:
            yield Finding("interleaved keys", self.name, f"{apart} samples")
        repeated = sum(count > 1 for count in self.whole.values())
        if repeated:
            yield Finding("repeated keys", self.name, f"{repeated} keys")
        complete, partial = sum(self.whole.values()), sum(self.partial.values())
        if partial and complete:
            yield Finding("incomplete samples", self.name, f"{partial} of {len(self.bits)}")
        if not self.bits:
            yield Finding("no samples", self.name)
        elif not self.suffixes["txt"]:
            yield Finding("no captions", self.name, _listed(self.suffixes))
        elif not any(self.suffixes[suffix] for suffix in IMAGE_SUFFIXES):
            yield Finding("no pictures", self.name, _listed(self.suffixes))


def _listed(suffixes: Counter[str]) -> str:
    return "has " + ", ".join(f"{suffix} in {n}" for suffix, n in suffixes.most_common(8))


def walk(shard: Located, how: How) -> Survey:
    """Survey one shard; never raises for what is wrong with it."""
    tally, passed = _Tally(shard.name, how.chunk), list[str]()
    findings: list[Finding] = []
    size = 0
    read = range_of(shard.path)
    try:
        size = shard.path.stat().st_size
        if size == 0:
            findings.append(Finding("empty file", shard.name))
        else:
            last = 0
            walked = members(read, size, window=how.window)
            for record in group(walked, passed=passed):
                tally.add(record)
                last = record.end
            if _goes_on(read, last, size):
                findings.append(Finding("goes on after its end", shard.name))
    except Damage as damage:
        kind = "truncated" if damage.cut else "damaged"
        detail = f"{damage}; {sum(tally.bits)} whole samples before it"
        findings.append(Finding(kind, shard.name, detail))
    except FileNotFoundError:
        findings.append(Finding("missing", shard.name))
    except OSError as error:
        # What was read before the error would be a guess at the shard; take nothing of it.
        tally = _Tally(shard.name, how.chunk)
        findings.append(Finding("cannot be read", shard.name, str(error.strerror or error)))
    if size:
        findings += tally.findings()
    if passed:
        findings.append(Finding("other members", shard.name, f"{len(passed)}, first {passed[0]!r}"))
    complete = sum(tally.bits)
    return Survey(
        size=size,
        records=len(tally.bits),
        complete=complete,
        end=min(tally.end, size),  # the last member's padding may be cut off
        starts=tuple(tally.starts),
        keep=tally.keep(),
        suffixes=dict(tally.suffixes),
        findings=(*findings, *_sidecars(shard, complete)),
    )


def _goes_on(read: ReadRange, last: int, size: int) -> bool:
    """Tell whether anything but zeros follows the archive's end within the next blocks."""
    # Folders and such may stand after the last record: only what comes after zeros counts.
    tail = bytes(read(last, min(size - last, 1 << 20)))
    mark = tail.find(bytes(BLOCK))
    return mark >= 0 and bool(tail[mark:].strip(b"\0"))


def stem_of(path: Path) -> Path:
    """Return a shard's path without .tar, .tar.gz or .tgz, from which sidecars are named."""
    name = path.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
    return path.with_name(name)


def _sidecars(shard: Located, complete: int) -> Iterator[Finding]:
    """Compare with `NNNNN_stats.json` and `NNNNN.parquet` where they lie beside."""
    stem = stem_of(shard.origin)
    stats = stem.with_name(f"{stem.name}_stats.json")
    if stats.is_file():
        try:
            told = json.loads(stats.read_text(encoding="utf-8"))["successes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield Finding("statistics differ", shard.name, f"{stats.name} is unreadable: {error!r}")
        else:
            if told != complete:
                detail = f"{complete} samples, {stats.name} says {told}"
                yield Finding("statistics differ", shard.name, detail)
    table = stem.with_name(f"{stem.name}.parquet")
    if table.is_file():
        yield from _parquet(shard.name, table, complete)


def _parquet(name: str, table: Path, complete: int) -> Iterator[Finding]:
    import pandas

    try:
        rows = pandas.read_parquet(table, columns=["status"])
    except ImportError:
        yield Finding("parquet not checked", name)
        return
    except (OSError, ValueError, KeyError) as error:
        # The engine's own messages go over many lines, its whole schema among them.
        why = (str(error).splitlines() or [""])[0]
        yield Finding("parquet differs", name, f"{table.name} is unreadable: {why}")
        return
    told = int((rows["status"] == "success").sum())
    if told != complete:
        yield Finding("parquet differs", name, f"{complete} samples, {table.name} says {told}")


def _kept_file(shard: Located, how: How, folder: Path) -> Path:
    """Name the file of a shard's survey, so that another version of the shard gets another one."""
    try:
        about = shard.path.stat()
        version = f"{about.st_size} {about.st_mtime_ns}"
    except OSError:
        version = "missing"
    mark = zlib.crc32(f"{VERSION} {how.chunk} {shard.name} {version}".encode())
    return folder / f"{stem_of(Path(shard.name)).name}-{mark:08x}.json"


def _kept(file: Path) -> Survey | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        findings = tuple(Finding(**finding) for finding in values.pop("findings"))
        return Survey(**{**values, "starts": tuple(values["starts"]), "findings": findings})
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or of an interrupted write: walk again


def _walk_and_keep(job: tuple[Located, How, Path]) -> Survey:
    shard, how, file = job
    survey = walk(shard, how)
    kinds = {finding.kind for finding in survey.findings}
    if not kinds & {"missing", "cannot be read"}:
        write_json(file, dataclasses.asdict(survey))
    return survey


def run_jobs(work: Callable[[J], R], jobs: Sequence[J], processes: int) -> Iterator[R]:
    """Yield the result of each job in order, from processes where there are many jobs."""
    # A process that may have no children of its own (a daemon) does it all itself.
    alone = multiprocessing.current_process().daemon
    if processes <= 1 or len(jobs) < PARALLEL_FROM or alone:
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(min(processes, len(jobs))) as pool:
        yield from pool.map(work, jobs, chunksize=max(1, min(16, len(jobs) // (4 * processes))))


def survey_all(shards: Sequence[Located], how: How, folder: Path) -> list[Survey]:
    """Survey shards in several processes, going on where an interrupted survey was.

    Args:
        shards: plain tars.
        how: see `How`.
        folder: where results are kept; made when needed.

    Returns:
        One survey for each shard, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [_kept_file(shard, how, folder) for shard in shards]
    surveys = [_kept(file) for file in files]
    jobs = [
        (shard, how, file)
        for shard, file, survey in zip(shards, files, surveys, strict=True)
        if survey is None
    ]
    if len(jobs) < len(shards):
        log.info("%d of %d shards were surveyed before", len(shards) - len(jobs), len(shards))
    progress = Progress(len(jobs), "shards surveyed")
    fresh: list[Survey] = []
    for survey in run_jobs(_walk_and_keep, jobs, how.processes):
        fresh.append(survey)
        progress.update()
    left = iter(fresh)
    return [survey if survey is not None else next(left) for survey in surveys]
