"""One run in a folder at a time: `run.lock`, which a run holds while it lives and a dead one loses.

The lock is a file with host, process and job in it, made whole by a hard link, which network disks
make once only. Whoever holds it touches it every half minute. A lock does not count when its
process is gone (same machine), when it is of an earlier start of the same SLURM job, or when
nobody has touched it for some minutes. Not here: what is done in the folder.
"""

import contextlib
import dataclasses
import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lazyclip.base.errors import UserError
from lazyclip.base.record import utc_now

from .distributed import Place, first_alone

log = logging.getLogger(__name__)
FILE = "run.lock"
BEAT_SECONDS = 30.0
# So many seconds without a beat and a run on another machine counts as dead.
STALE_SECONDS = 300.0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process began, in the kernel's own clock; empty where it is gone.

    A number may be given to another process later, which began at another time.
    """
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _machine() -> str:
    """Name the space in which process numbers mean something: this start of the machine, and the
    container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{_read('/proc/sys/kernel/random/boot_id')} {space}"


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Fields: host; pid; started, see `_started`; machine, see `_machine`; job, SLURM's number, empty
    without; token, of this one lock; since.
    """

    host: str
    pid: int
    started: str
    machine: str
    job: str
    token: str
    since: str

    @classmethod
    def here(cls) -> "Owner":
        """Describe this process."""
        return cls(
            platform.node(), os.getpid(), _started(os.getpid()), _machine(),
            os.environ.get("SLURM_JOB_ID", ""), secrets.token_hex(8), utc_now(),
        )  # fmt: skip

    @classmethod
    def of(cls, text: str) -> "Owner | None":
        """Read a lock's content; None where it is none of ours."""
        try:
            values = json.loads(text)
            return cls(**values) if isinstance(values, Mapping) else None
        except (ValueError, TypeError):
            return None

    def lives(self, asking: "Owner", silent: float) -> bool:
        """Tell whether the owner is still there.

        Args:
            asking: this process.
            silent: seconds since the lock was touched last.
        """
        if self.machine == asking.machine and self.started:
            return _started(self.pid) == self.started
        if self.job and self.job == asking.job:
            # The job was started again, here or elsewhere: this is what its end left.
            return False
        return silent < STALE_SECONDS


class RunLock:
    """A lock on a run's folder; nothing is held until `take`."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._file: Path | None = None
        self._me = Owner.here()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether the lock is held."""
        return self._file is not None

    def take(self, folder: Path) -> None:
        """Take the lock of a folder that exists, and keep it alive from now on.

        Where the disk takes no file at all (it is full, say) the run goes on without.

        Raises:
            UserError: a living run holds it.
        """
        if self.held:
            return
        file = folder / FILE
        mine = folder / f"{FILE}.{self._me.token}"
        try:
            mine.write_text(json.dumps(dataclasses.asdict(self._me)) + "\n", encoding="utf-8")
            while not _put(mine, file):
                self._displace(file, mine.stat().st_mtime)
        except OSError as error:
            log.warning(
                "%s cannot be made (%s): nothing keeps a second run out of %s", FILE,
                error.strerror or error, folder,
            )  # fmt: skip
            return
        finally:
            with contextlib.suppress(OSError):
                mine.unlink(missing_ok=True)
        self._file = file
        self._thread = threading.Thread(target=self._keep_alive, name="lock", daemon=True)
        self._thread.start()

    def _displace(self, file: Path, now: float) -> None:
        """Take a dead run's lock away; raises `UserError` where its run lives.

        Args:
            file: the lock.
            now: by the clock of the disk, which may differ from that of this machine.
        """
        try:
            text, silent = file.read_text(encoding="utf-8"), now - file.stat().st_mtime
        except FileNotFoundError:
            return
        owner = Owner.of(text)
        if owner.lives(self._me, silent) if owner else silent < STALE_SECONDS:
            raise UserError(_refusal(file, owner, silent, self._me))
        aside = file.with_name(f"{FILE}.{self._me.token}.old")
        with contextlib.suppress(FileNotFoundError):
            file.rename(aside)
            if aside.read_text(encoding="utf-8") != text:
                # Another start was quicker and this is its lock: give it back.
                with contextlib.suppress(FileExistsError):
                    os.link(aside, file)
            elif owner:
                log.info("the run of process %d on %s is gone", owner.pid, owner.host)
            aside.unlink(missing_ok=True)

    def _keep_alive(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self.beat()

    def beat(self, end: Callable[[int], Any] = os._exit) -> None:
        """Touch the lock; ends the process where another run has taken it.

        That happens to a run that was stopped, or cut off from its disk, for minutes: it must not
        go on writing beside its successor.
        """
        if self._file is None:
            return
        try:
            owner = Owner.of(self._file.read_text(encoding="utf-8"))
            if owner is not None and owner.token != self._me.token:
                log.error("%s is held by %s, process %d: this run ends without saving",
                          self._file, owner.host, owner.pid)  # fmt: skip
                end(1)
                return
            os.utime(self._file)
        except OSError:
            return  # the disk is away for a while: the next beat tries again

    def release(self) -> None:
        """Give the lock back."""
        self._over.set()
        file, self._file = self._file, None
        if file is None:
            return
        with contextlib.suppress(OSError):
            owner = Owner.of(file.read_text(encoding="utf-8"))
            if owner is not None and owner.token == self._me.token:
                file.unlink()


def in_use(folder: Path) -> bool:
    """Tell whether a run's folder holds anything but an index of shards and a lock."""
    if not folder.is_dir():
        return folder.exists()
    return any(not p.name.startswith(("manifest-", "unpacked", FILE)) for p in folder.iterdir())


def claim(folder: Path | None, place: Place, lock: RunLock) -> Path | None:
    """Lock the folder of a run that goes on before anything is made of what lies in it.

    Args:
        folder: of the run; None for a new one.
        place: of this rank; rank 0 takes the lock.
        lock: to take.

    Returns:
        The folder, on every rank; None where there is no such run yet.

    Raises:
        UserError: the run is alive.
    """

    def take() -> bool:
        if folder is None or not in_use(folder):
            return False
        lock.take(folder)
        return True

    return folder if first_alone(take, place) else None


def _put(mine: Path, file: Path) -> bool:
    """Put a whole file in place under a name; False where there is one of that name."""
    try:
        os.link(mine, file)
    except FileExistsError:
        return False
    except OSError:
        # A disk without hard links: others may see it half written, which counts as held.
        try:
            with file.open("x", encoding="utf-8") as stream:
                stream.write(mine.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def living(folder: Path) -> str | None:
    """Phrase by whom a folder is being trained; None where no living run holds it."""
    file, me = folder / FILE, Owner.here()
    try:
        owner = Owner.of(file.read_text(encoding="utf-8"))
        silent = time.time() - file.stat().st_mtime
    except OSError:
        return None
    lives = owner.lives(me, silent) if owner else silent < STALE_SECONDS
    return _refusal(file, owner, silent, me) if lives else None


def _refusal(file: Path, owner: Owner | None, silent: float, me: Owner) -> str:
    who = f"process {owner.pid} on {owner.host}, since {owner.since}" if owner else "another start"
    said = f"{file.parent} is being trained by {who}; end that run, or give another --name"
    if owner and owner.machine == me.machine:
        return said
    wait = max(1, round((STALE_SECONDS - silent) / 60))
    return f"{said}; if its machine is dead, try again in {wait} min"


@contextlib.contextmanager
def run_lock() -> Iterator[RunLock]:
    """Hold what is taken until the context ends."""
    lock = RunLock()
    try:
        yield lock
    finally:
        lock.release()
