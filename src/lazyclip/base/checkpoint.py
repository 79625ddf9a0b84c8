"""Folders that are written whole or not at all, and known to be whole when they are read.

A folder is filled under another name, each file is forced to disk and hashed, and only then is it
renamed; a crash at any moment leaves either the whole folder or a `.part` that nothing reads. Not
here: what the files hold.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PART = ".part"
STEP = "step_"
_CHUNK = 1 << 22


class NotWholeError(ValueError):
    """A folder that is not what was written: one line that names the file and what is wrong."""


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def force_to_disk(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def with_usual_mode(file: Path) -> Iterator[None]:
    """Let a file that is written inside have the mode of any new one, 0o666 less the umask.

    Safetensors writes files that only their owner may read.

    Args:
        file: replaced when it is there.
    """
    file.unlink(missing_ok=True)
    # Asked of a file made beside: reading the umask means changing it, for all threads.
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    yield
    if stat.S_IMODE(file.stat().st_mode) != mode:
        with contextlib.suppress(PermissionError):  # some mounts know no modes
            file.chmod(mode)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def seal(part: Path) -> None:
    """Force a folder's files to disk and write down their names, sizes and hashes."""
    rows: dict[str, Any] = {}
    for file in _files(part):
        force_to_disk(file)
        rows[str(file.relative_to(part))] = {"bytes": file.stat().st_size, "sha256": _hash(file)}
    target = part / MANIFEST
    target.write_text(json.dumps({"files": rows}, indent=1) + "\n", encoding="utf-8")
    force_to_disk(target)
    for folder in {file.parent for file in _files(part)} | {part}:
        force_to_disk(folder)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Fill a folder: yields the place to write into, and puts it in place at the end.

    An exception inside, or a disk that is full, leaves nothing behind. A folder of that name is
    replaced.

    Args:
        folder: its final name.

    Raises:
        OSError: it cannot be written.
        NotWholeError: what was read back is not what was written.
    """
    part = folder.with_name(folder.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        seal(part)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
        force_to_disk(folder.parent)
        verify(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def verify(folder: Path) -> None:
    """Check a folder against its manifest, by size first and then by hash.

    Raises:
        NotWholeError: no manifest, or a file that is missing, of another size or changed.
    """
    manifest = folder / MANIFEST
    try:
        rows = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        wanted = {name: (int(row["bytes"]), str(row["sha256"])) for name, row in rows.items()}
    except FileNotFoundError:
        raise NotWholeError(f"{folder} has no {MANIFEST}: it was not finished") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotWholeError(f"{manifest} cannot be read ({error!r})") from None
    for name, (size, _) in wanted.items():
        file = folder / name
        if not file.is_file():
            raise NotWholeError(f"{file} is missing")
        if file.stat().st_size != size:
            raise NotWholeError(f"{file} has {file.stat().st_size} bytes, {size} were written")
    for name, (_, digest) in wanted.items():
        if _hash(folder / name) != digest:
            raise NotWholeError(f"{folder / name} was changed after it was written")


def _step_of(folder: Path) -> int | None:
    digits = folder.name.removeprefix(STEP)
    return int(digits) if folder.name.startswith(STEP) and digits.isdigit() else None


def list_steps(parent: Path) -> list[tuple[int, Path]]:
    """List the folders `step_00000100` of a parent by step, oldest first, unverified."""
    if not parent.is_dir():
        return []
    found = [(_step_of(p), p) for p in parent.iterdir() if p.is_dir()]
    return sorted((step, path) for step, path in found if step is not None)


def newest_whole(parent: Path) -> Path | None:
    """Find the newest step that is whole; newer ones that are not are named in a warning."""
    for _, folder in reversed(list_steps(parent)):
        try:
            verify(folder)
        except NotWholeError as error:
            log.warning("passed over: %s", error)
            continue
        return folder
    return None


def first_of_spans(steps: Iterable[int], every: int) -> set[int]:
    """Choose the steps that stay for good: of each `every` steps the first, from `every` on.

    Saves by the clock or on request seldom fall on round numbers. The choice follows from the steps
    alone, and removing others does not change it.

    Args:
        steps: that are there.
        every: length of a span; the first is left out, being a run's beginning.
    """
    found: dict[int, int] = {}
    for step in sorted(steps):
        found.setdefault(step // every, step)
    return {step for span, step in found.items() if span}


def prune(parent: Path, keep: int, every: int | None = None, spare: Sequence[Path] = ()) -> None:
    """Remove old steps, and parts of steps that were never finished.

    Args:
        parent: folder of the steps.
        keep: how many of the newest stay; 0 keeps all.
        every: the first of each so many steps stays too; see `first_of_spans`.
        spare: folders that stay in any case.
    """
    for part in parent.glob(f"{STEP}*{PART}"):
        shutil.rmtree(part, ignore_errors=True)
    if keep <= 0:
        return
    there = list_steps(parent)
    for_good = first_of_spans((step for step, _ in there), every) if every else set()
    for step, folder in there[:-keep]:
        if folder in spare or step in for_good:
            continue
        # Out of sight first: a removal cut short must not leave a step that looks whole.
        doomed = folder.with_name(folder.name + PART)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
