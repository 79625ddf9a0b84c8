"""A process with all its children: processor time, memory, and running one to its end (Linux).

Not here: what the processes do.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_TICK = os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """List a process and its children, theirs too."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, open_ = list[int](), [pid]
    while open_:
        one = open_.pop()
        found.append(one)
        open_ += children.get(one, [])
    return found


def cpu_seconds(pid: int | None = None) -> float:
    """Return the processor time of a process (default: this one), its living and ended children."""
    total = 0
    for one in family(pid or os.getpid()):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))  # own user and system time, then ended children's
    return total / _TICK


def settle(pause: float = 1.0) -> None:
    """Wait until this process's children stand still: their work would count for another's."""
    before = cpu_seconds()
    while True:
        time.sleep(pause)
        now = cpu_seconds()
        if now - before <= 0.03:  # looking takes some itself
            return
        before = now


def memory_bytes(pid: int | None = None) -> tuple[int, int]:
    """Return resident and proportional bytes of a process and its children.

    Resident (RSS) counts a page once for each process that shares it, proportional (PSS) once.
    """
    rss = pss = 0
    for one in family(pid or os.getpid()):
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        fields = dict(line.split(":") for line in text.splitlines()[1:])
        rss += int(fields["Rss"].split()[0]) * 1024
        pss += int(fields["Pss"].split()[0]) * 1024
    return rss, pss


class Peak:
    """The most memory that a process and its children held, sampled beside it."""

    def __init__(self, pid: int, every: float) -> None:
        """Sample every so many seconds until `stop`."""
        self.rss = self.pss = 0
        self._pid, self._every, self._end = pid, every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(self._every):
            rss, pss = memory_bytes(self._pid)
            self.rss, self.pss = max(self.rss, rss), max(self.pss, pss)

    def stop(self) -> None:
        """End the sampling."""
        self._end.set()
        self._thread.join()


class Child:
    """A script of this folder in a process of its own, one thread, that is asked line by line.

    It stays between two questions, so that two sides can take turns without starting anew.
    """

    def __init__(
        self, python: Path | str, script: str, words: Sequence[object], *, ours: bool,
        watch: float = 0.0,
    ) -> None:  # fmt: skip
        """Start it.

        Args:
            python: that runs it.
            script: its name.
            words: its arguments.
            ours: whether lazyclip and training are to be importable.
            watch: seconds between two looks at its memory, each of which takes time; 0: none.
        """
        paths = [str(ROOT / "src"), str(ROOT)] if ours else []
        self._name = f"{script} {' '.join(map(str, words))}"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `close`)
        self.started, self.load = time.time(), os.getloadavg()[0]
        self.process = subprocess.Popen(
            [str(python), str(ROOT / "benchmarks" / script), *map(str, words)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
                 "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        self.peak = Peak(self.process.pid, watch) if watch else None

    def ask(self, words: Sequence[object] | None = None) -> dict[str, Any]:
        """Send a line of arguments, if any, and return the next line that is a JSON object."""
        if words is not None and self.process.stdin is not None:
            self.process.stdin.write(shlex.join(map(str, words)) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout or ():
            if line.startswith("{"):
                return dict(json.loads(line))
        self._errors.seek(0)
        raise SystemExit(f"{self._name} failed:\n{self._errors.read()[-3000:]}")

    def close(self) -> None:
        """End it, with its children."""
        if self.peak:
            self.peak.stop()
        for pid in family(self.process.pid)[::-1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._errors.close()


def run_child(
    python: Path | str, script: str, words: Sequence[object], *, ours: bool, watch: float = 0.0
) -> dict[str, Any]:
    """Run a script of this folder to its answer; arguments as for `Child`.

    Returns:
        The JSON object that it prints, with `load` before it began, `seconds` it took, `started`,
        the clock's time, and, where it was watched, `peak_rss` and `peak_pss` in bytes.
    """
    child = Child(python, script, words, ours=ours, watch=watch)
    try:
        found = child.ask()
    finally:
        child.close()
    if child.peak:
        found |= {"peak_rss": child.peak.rss, "peak_pss": child.peak.pss}
    seconds = round(time.time() - child.started, 2)
    return {**found, "load": round(child.load, 2), "started": child.started, "seconds": seconds}
