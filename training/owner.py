"""Who holds a lock, and whether that process is still there. Not here: the lock (`runlock`)."""

import dataclasses
import json
import os
import platform
import secrets
from collections.abc import Mapping
from pathlib import Path

from lazyclip.base.record import utc_now

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


def _hidden(pid: int) -> bool:
    """Tell whether a process is another user's that the system shows to nobody else."""
    if _read(f"/proc/{pid}/stat"):
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _machine() -> str:
    """Name the space in which process numbers mean something: this start of the machine, and the
    container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{_read('/proc/sys/kernel/random/boot_id')} {space}"


def _restarts() -> int:
    """Return how often SLURM has started this job again."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Fields: host; pid; started, see `_started`; machine, see `_machine`; job, SLURM's number, empty
    without; token, of this one lock; since; restarts of the job before this start of it.
    """

    host: str
    pid: int
    started: str
    machine: str
    job: str
    token: str
    since: str
    restarts: int = 0

    @classmethod
    def here(cls) -> "Owner":
        """Describe this process."""
        return cls(
            platform.node(), os.getpid(), _started(os.getpid()), _machine(),
            os.environ.get("SLURM_JOB_ID", ""), secrets.token_hex(8), utc_now(), _restarts(),
        )  # fmt: skip

    @classmethod
    def of(cls, text: str) -> "Owner | None":
        """Read a lock's content; None where it is none of ours."""
        try:
            values = json.loads(text)
            return cls(**values) if isinstance(values, Mapping) else None
        except (ValueError, TypeError):
            return None

    @property
    def text(self) -> str:
        """What a lock holds."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    def lives(self, asking: "Owner", silent: float) -> bool:
        """Tell whether the owner is still there.

        Args:
            asking: this process.
            silent: seconds since the lock was touched last.
        """
        if self.machine == asking.machine and self.started:
            return _started(self.pid) == self.started or _hidden(self.pid)
        if self.job and self.job == asking.job and self.restarts < asking.restarts:
            # SLURM ends all of a job before it starts it again: this is what that end left.
            return False
        return silent < STALE_SECONDS


def lives(text: str, asking: Owner, silent: float) -> bool:
    """Tell whether whoever wrote a lock is still there; one that does not read counts a while."""
    owner = Owner.of(text)
    return owner.lives(asking, silent) if owner else silent < STALE_SECONDS
