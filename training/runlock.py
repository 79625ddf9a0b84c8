"""One run in a folder at a time: `run.lock`, which a run holds while it lives and a dead one loses.

The lock is a file with host, process and job in it, made whole by a hard link, which network disks
make once only. Whoever holds it touches it every half minute. A lock does not count when its
process is gone (same machine), when its SLURM job was started again since, or when nobody has
touched it for some minutes.

What a lock says changes in one way only: whoever wants to write over it, or to remove it, first
makes the file `run.lock.dead-HASH`, whose name follows from what the lock says. It is made once
only, as the lock is, and a dead maker loses it in the same way. So of many starts that find a dead
lock one writes over it, and there is no moment without a lock.

Not here: who is alive (`owner`), what is done in the folder.
"""

import contextlib
import hashlib
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lazyclip.base.errors import UserError

from .distributed import Place, first_alone, from_first
from .owner import STALE_SECONDS, Owner, lives

log = logging.getLogger(__name__)
FILE = "run.lock"
BEAT_SECONDS = 30.0
# Two beats missed: perhaps dead.
QUIET_SECONDS = 2 * BEAT_SECONDS
# Between looks at a lock that is waited for.
LOOK_SECONDS = 10.0
# Displacing a lock takes milliseconds; another start that is at it is given a second.
_TRIES, _TRY_SECONDS = 50, 0.02
_numbers = itertools.count()


class _InUse(Exception):
    """A living start holds the name."""

    def __init__(self, file: Path, text: str, silent: float) -> None:
        """Take what was seen: the file, what it says, the seconds since it was touched."""
        super().__init__(file)
        self.file, self.owner, self.silent = file, Owner.of(text), silent


class Hold:
    """A start's claim to its folder, as each of its ranks can check it.

    Another start may have taken the folder from one that was stopped, or cut off from its disk, for
    minutes; the first must not go on writing beside its successor, also when that has ended.
    """

    def __init__(self, file: Path | None = None, token: str = "") -> None:
        """Take the lock and its token; without a file there is nothing to check."""
        self._file, self._token = file, token
        self._looked = time.monotonic()

    def stands(self) -> bool:
        """Tell whether the lock is still this start's; a disk that is away is given time."""
        if self._file is None:
            return True
        try:
            owner = Owner.of(_seen(self._file))
        except FileNotFoundError:
            # Nobody but a successor removes it.
            return not self._file.parent.is_dir()
        except OSError:
            return True
        return owner is None or owner.token == self._token

    def keep(self, seconds: float = 0.0) -> None:
        """End this process at once where the lock is another start's.

        Args:
            seconds: a look so recent is enough; a process that was stopped meanwhile looks again.
        """
        now = time.monotonic()
        if self._file is None or now - self._looked < seconds:
            return
        self._looked = now
        if not self.stands():
            log.error("%s was taken by another start: this run ends without saving", self._file)
            os._exit(1)


class RunLock:
    """A lock on a run's folder; nothing is held until `take`."""

    def __init__(self, sleep: Callable[[float], Any] = time.sleep) -> None:
        """Hold nothing; `sleep` waits for the lock of a run that may be dead."""
        self._file: Path | None = None
        self._me = Owner.here()
        self._sleep = sleep
        self._now = time.time()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether the lock is held."""
        return self._file is not None

    @property
    def token(self) -> str:
        """What tells this start's lock from others."""
        return self._me.token

    @property
    def hold(self) -> Hold:
        """What ranks check: file and token; nothing where no lock could be made."""
        return Hold(self._file, self._me.token)

    def take(self, folder: Path, wait: bool = False) -> None:
        """Take the lock of a folder that exists, and keep it alive from now on.

        Where the disk takes no file at all (it is full, say) the run goes on without.

        Args:
            folder: of the run.
            wait: where a run on another machine holds it, wait until that run is heard, or counts
                as dead: it may have been killed a moment ago.

        Raises:
            UserError: a living run holds it.
        """
        if self.held:
            return
        file = folder / FILE
        said, before = -1, math.inf
        while True:
            try:
                self._acquire(file)
                break
            except _InUse as use:
                heard = before < math.inf and use.silent < before
                if not wait or heard or near(use.owner, self._me):
                    raise UserError(_refusal(folder, use.owner, use.silent, self._me)) from None
                before = use.silent
                said = _tell_waiting(folder, use, said)
                self._sleep(LOOK_SECONDS)
            except OSError as error:
                self._go_without(folder, error)
                return
        self._file = file
        with contextlib.suppress(OSError):
            # They guard what older locks said, and no lock says that again.
            for claim in set(folder.glob(f"{FILE}.dead-*")) - {_claim(file, self._me.text)}:
                claim.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._keep_alive, name="lock", daemon=True)
        self._thread.start()

    def _go_without(self, folder: Path, error: OSError) -> None:
        refused = living(folder)
        if refused is not None:
            raise UserError(refused)
        log.warning(
            "%s cannot be made (%s): nothing keeps a second run out of %s", FILE,
            error.strerror or error, folder,
        )  # fmt: skip

    # --- names that one start alone can have -----------------------------------------------------

    def _acquire(self, file: Path) -> None:
        """Make a file that says who this start is, be the name free or a dead start's.

        Raises:
            _InUse: a living start has it.
        """
        while not (self._put(file) or self._displace(file)):
            pass

    @contextlib.contextmanager
    def _written(self, file: Path) -> Iterator[Path]:
        """Yield a file of our own beside another, whole; it is gone afterwards."""
        mine = file.with_name(f"{FILE}.{self._me.token}.{next(_numbers)}")
        try:
            mine.write_text(self._me.text, encoding="utf-8")
            # By the clock of the disk, which may differ from that of this machine.
            self._now = mine.stat().st_mtime
            yield mine
        finally:
            with contextlib.suppress(OSError):
                mine.unlink(missing_ok=True)

    def _put(self, file: Path) -> bool:
        """Make a file whole under a name; False where there is one of that name."""
        with self._written(file) as mine:
            try:
                os.link(mine, file)
            except FileExistsError:
                # A network disk may do it, lose the answer, and be asked again.
                return mine.stat().st_nlink == 2 or _seen(file, "") == self._me.text
            except OSError:
                # A disk without hard links: others may see it half written, which counts as held.
                try:
                    with file.open("x", encoding="utf-8") as stream:
                        stream.write(self._me.text)
                except FileExistsError:
                    return False
        return True

    def _displace(self, file: Path) -> bool:
        """Write over a dead start's file; False where it is to be tried again.

        Raises:
            _InUse: the start lives, or another living one is about to do the same.
        """
        try:
            text, silent = _seen(file), self._now - file.stat().st_mtime
        except FileNotFoundError:
            return False
        if lives(text, self._me, silent):
            raise _InUse(file, text, silent)
        claim = _claim(file, text)
        for left in reversed(range(_TRIES)):
            try:
                self._acquire(claim)
                break
            except _InUse:
                if not left:
                    raise
            time.sleep(_TRY_SECONDS)
            if _seen(file, "") != text:
                return False
        try:
            if _seen(file, "") != text:
                return False
            with self._written(file) as mine:
                os.replace(mine, file)
        except FileNotFoundError:
            pass  # asked again by a network disk, as above: what the file says decides
        finally:
            self._drop(claim)
        owner = Owner.of(text)
        if owner and file.name == FILE:
            log.info("the run of process %d on %s is gone", owner.pid, owner.host)
        return _seen(file, "") == self._me.text

    def _drop(self, file: Path) -> None:
        """Remove a file, if it is ours."""
        with contextlib.suppress(OSError):
            if _seen(file) == self._me.text:
                file.unlink()

    # --- while it is held ------------------------------------------------------------------------

    def _keep_alive(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self.beat()

    def beat(self, end: Callable[[int], Any] = os._exit) -> None:
        """Touch the lock; ends the process where the lock is no longer this start's."""
        file = self._file
        if file is None:
            return
        if not self.hold.stands():
            if self._file is None:
                return  # given back this moment
            log.error("%s was taken by another start: this run ends without saving", file)
            end(1)
            return
        with contextlib.suppress(OSError):  # the disk is away: the next beat tries again
            os.utime(file)

    def release(self) -> None:
        """Give the lock back."""
        self._over.set()
        file, self._file = self._file, None
        if file is None:
            return
        with contextlib.suppress(OSError):
            claim = _claim(file, self._me.text)
            if self._put(claim):  # else another start is writing over it
                self._drop(file)
                self._drop(claim)


def _seen(file: Path, missing: str | None = None) -> str:
    """Read what a lock says; `missing` where there is none, or FileNotFoundError."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if missing is None:
            raise
        return missing


def _claim(file: Path, text: str) -> Path:
    """Name the file that allows to change another one that says `text`."""
    digest = hashlib.sha256(f"{file.name}\n{text}".encode()).hexdigest()
    return file.with_name(f"{FILE}.dead-{digest[:16]}")


def near(owner: Owner | None, me: Owner) -> bool:
    """Tell whether an owner is of this machine, where its process can be looked for."""
    return owner is not None and owner.machine == me.machine and bool(owner.started)


def _tell_waiting(folder: Path, use: _InUse, said: int) -> int:
    """Say at first and each minute for what is waited; returns the minutes told last."""
    minutes = max(1, math.ceil((STALE_SECONDS - use.silent) / 60))
    if minutes == said:
        return said
    who = f"process {use.owner.pid} on {use.owner.host}" if use.owner else "another start"
    log.info(
        "%s is held by %s, silent for %.0f s: waits, %d min at most, until that run is heard or "
        "counts as dead",
        folder, who, use.silent, minutes,
    )  # fmt: skip
    return minutes


def in_use(folder: Path) -> bool:
    """Tell whether a run's folder holds anything but an index of shards and a lock."""
    if not folder.is_dir():
        return folder.exists()
    return any(not p.name.startswith(("manifest-", "unpacked", FILE)) for p in folder.iterdir())


def claim(folder: Path | None, place: Place, lock: RunLock) -> Path | None:
    """Lock the folder of a run that goes on before anything is made of what lies in it.

    Waits where the run before may be dead on another machine; see `RunLock.take`.

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
        lock.take(folder, wait=True)
        return True

    return folder if first_alone(take, place) else None


def share(folder: Path, place: Place, lock: RunLock) -> Hold:
    """Return on every rank what rank 0 holds of a folder.

    A rank that does not see the lock, its disk being another one, has nothing to check.
    """
    token = from_first(lock.token if lock.held else None, place)
    owner = None
    with contextlib.suppress(OSError):
        owner = Owner.of(_seen(folder / FILE))
    return Hold(folder / FILE, token) if owner and owner.token == token else Hold()


def living(folder: Path) -> str | None:
    """Phrase by whom a folder is being trained; None where no living run holds it."""
    file, me = folder / FILE, Owner.here()
    try:
        text, silent = _seen(file), time.time() - file.stat().st_mtime
    except OSError:
        return None
    return _refusal(folder, Owner.of(text), silent, me) if lives(text, me, silent) else None


def _refusal(folder: Path, owner: Owner | None, silent: float, me: Owner) -> str:
    who = f"process {owner.pid} on {owner.host}, since {owner.since}" if owner else "another start"
    said = f"{folder} is being trained by {who}; end that run, or give another --name"
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
