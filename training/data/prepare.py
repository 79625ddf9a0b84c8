"""From a pattern to a manifest that fits the disk: find, unpack, load or build, filter, keep.

Not here: flags, and the batches that are made of it (`exact`).
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lazyclip.base.errors import UserError

from . import filters as conditions
from .locate import Located, find, unpacked
from .manifest import (
    Manifest,
    build,
    default_file,
    load,
    refuse_broken,
    save,
    verify,
    writable,
)
from .survey import Finding, How

log = logging.getLogger(__name__)
# Seconds between looks for a manifest that another machine wrote, before it counts as not there.
APPEARS = (0.1, 0.4, 1.0, 2.0, 4.0, 8.0)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a run asks for.

    Fields: pattern and factors (see `locate.find`); filters, conditions as text; file of the
    manifest, None: beside the shards; fallback, the folder for it where the shards' is read-only;
    strict, refuse shards that are not whole; rebuild, take no manifest that is there.
    """

    pattern: str | Sequence[str]
    fallback: Path
    factors: str | None = None
    filters: tuple[str, ...] = ()
    file: Path | None = None
    how: How = dataclasses.field(default_factory=How)
    strict: bool = False
    rebuild: bool = False


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Manifest, its shards as they lie on disk, and the file it is kept in."""

    manifest: Manifest
    shards: tuple[Located, ...]
    file: Path


def prepare(wanted: Wanted) -> Prepared:
    """Find the shards and their manifest; builds it where there is none.

    One process of a run does this; the others `take_over` what it found.

    Raises:
        UserError: see `find`, `unpacked`, `build`, `verify` and `filtered`.
    """
    given = tuple(conditions.read_filter(text) for text in wanted.filters)
    shards, missing = find(wanted.pattern, wanted.factors)
    file = wanted.file or default_file(shards, wanted.how.chunk, wanted.fallback)
    plain = tuple(unpacked(shards, _copies_folder(wanted, file)))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        manifest = _base(wanted, plain, missing, file)
        if not given:
            return Prepared(manifest, plain, file)
        return _filtered(wanted, manifest, plain, given, file)
    except OSError as error:
        raise UserError(
            f"the manifest {file} cannot be written ({error.strerror or error}); give --manifest "
            "FILE in a folder that can be"
        ) from None


def _copies_folder(wanted: Wanted, file: Path) -> Path:
    """Return where gzipped shards are unpacked: beside the manifest, unless that is read-only."""
    beside = file.parent / "unpacked"
    # An index that lies in a read-only folder is used there; new files go elsewhere.
    stays = wanted.file is not None or not file.exists() or beside.exists()
    return beside if stays or writable(file.parent) else wanted.fallback / "unpacked"


def told(prepared: Prepared) -> dict[str, Any]:
    """Return, as plain types, what another rank needs in place of looking at the shards itself."""
    shards = [(s.name, str(s.path), str(s.origin), s.factor) for s in prepared.shards]
    return {"file": str(prepared.file), "sha256": prepared.manifest.sha256, "shards": shards}


def take_over(wanted: Wanted, found: Mapping[str, Any], first: bool) -> Prepared:
    """Take what rank 0 found; no shard is opened.

    Args:
        wanted: what rank 0 was asked for too.
        found: from `told`.
        first: of the ranks of a machine. It alone compares the shards' sizes with the manifest, and
            indexes them where this machine has a disk of its own; the others come after it.

    Raises:
        UserError: the manifest here is another one, or not to be seen; or see `verify`.
    """
    file = Path(found["file"])
    if not _appears(file):
        if first:
            return prepare(wanted)
        raise UserError(
            f"the manifest {file} is not to be seen on {platform.node()}, where another rank has "
            "it; start again, or give --manifest FILE on a disk that all ranks see"
        )
    manifest = load(file)
    if manifest.sha256 != found["sha256"]:
        raise UserError(
            f"the manifest {file} is another one on {platform.node()} than on rank 0's machine: "
            "the shards differ; copy them again"
        )
    shards = tuple(Located(n, Path(p), Path(o), factor) for n, p, o, factor in found["shards"])
    if first:
        verify(manifest, shards)
    return Prepared(manifest, shards, file)


def _appears(file: Path) -> bool:
    """Wait for a file that another machine has just written; a network disk may show it late."""
    for wait in (*APPEARS, None):
        # Listing a folder makes the system ask the server for it again; so does it for one that is
        # not there itself.
        for folder in file.parents:
            with contextlib.suppress(OSError):
                os.listdir(folder)
                break
        if file.exists():
            return True
        if wait is not None:
            time.sleep(wait)
    return False


def _base(
    wanted: Wanted, shards: Sequence[Located], missing: Sequence[Path], file: Path
) -> Manifest:
    if not file.exists() or wanted.rebuild:
        with _alone(file):
            # Another run may have built it meanwhile.
            if not file.exists() or wanted.rebuild:
                return _build(wanted, shards, missing, file)
    if file.exists():
        manifest = load(file)
        verify(manifest, shards)
        if manifest.filters:
            raise UserError(f"{file} is a manifest with filters; name the one without")
        if manifest.chunk != wanted.how.chunk and wanted.how.chunk != How().chunk:
            raise UserError(
                f"{file} has chunks of {manifest.chunk}, asked for are {wanted.how.chunk}; name "
                "another file"
            )
        if wanted.strict:
            # The pattern may name other missing files than it did when the manifest was built.
            absent = [Finding("missing", str(path)) for path in missing]
            refuse_broken([*absent, *(f for f in manifest.findings if f.kind != "missing")])
        return manifest
    raise UserError(f"the manifest {file} went away while it was built; start again")


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Keep other runs from building the same manifest at the same time, where the disk can."""
    lock = file.with_suffix(".lock")
    with lock.open("a") as stream:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _build(
    wanted: Wanted, shards: Sequence[Located], missing: Sequence[Path], file: Path
) -> Manifest:
    folder = file.with_suffix(".parts")
    manifest = build(shards, wanted.how, folder, missing, strict=wanted.strict)
    save(manifest, file)
    shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _filtered(
    wanted: Wanted, base: Manifest, shards: tuple[Located, ...],
    given: tuple[conditions.Filter, ...], file: Path,
) -> Prepared:  # fmt: skip
    mark = hashlib.sha256("\n".join(sorted(one.text for one in given)).encode()).hexdigest()[:8]
    beside = file.with_name(f"{file.stem}.filter-{mark}{file.suffix}")
    stays = wanted.file is not None or writable(file.parent)
    elsewhere = beside if stays else wanted.fallback / beside.name
    for kept in dict.fromkeys((beside, elsewhere)):
        if not kept.exists():
            continue
        manifest = load(kept)
        if dataclasses.replace(manifest, keep=base.keep, filters=()).sha256 == base.sha256:
            return Prepared(manifest, shards, kept)
        log.info("%s is of another manifest; the filters are applied again", kept)
    manifest = conditions.filtered(base, shards, given, wanted.how.processes)
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    save(manifest, elsewhere)
    return Prepared(manifest, shards, elsewhere)
