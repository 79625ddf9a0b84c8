"""Run commands as processes, a few at a time, with progress lines and an end at the first failure.

Not here: which commands (`run`), what they print (a file each).
"""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
LANES = 2  # processes at a time, one thread each
_TAIL = 15  # lines shown of a command that failed
_SINGLE = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


class JobError(RuntimeError):
    """A command that failed, with its last lines."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        title: for the progress lines.
        module: run as `python -m`.
        words: its arguments; paths are relative to the checkout.
        log: file that gets what it prints.
        metrics: a metrics.jsonl that grows meanwhile, shown as progress.
    """

    title: str
    module: str
    words: tuple[str, ...]
    log: Path
    metrics: Path | None = None

    @property
    def command(self) -> str:
        """The command as a person would type it."""
        return shlex.join(["python", "-m", self.module, *self.words])


@dataclasses.dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    stream: IO[bytes]
    start: float
    shown: int = 0

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        self.stream.close()


def last_metrics(path: Path | None) -> Mapping[str, object]:
    """Return the last whole line of a metrics.jsonl; empty where there is none yet."""
    if path is None or not path.is_file():
        return {}
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        try:
            loaded = json.loads(line)
        except ValueError:
            continue  # the trainer is writing this line
        return loaded if isinstance(loaded, dict) else {}
    return {}


def _start(job: Job) -> _Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    stream = job.log.open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", job.module, *job.words],
        cwd=ROOT,
        env={**os.environ, **_SINGLE},
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
    )
    return _Running(job, process, stream, time.monotonic())


def _show_steps(running: _Running, say: Callable[[str], None], every: int = 20) -> None:
    line = last_metrics(running.job.metrics)
    step, loss = line.get("step"), line.get("train/loss")
    if isinstance(step, int) and step >= running.shown + every and isinstance(loss, float):
        running.shown = step
        say(f"{running.job.title}: step {step}, loss {loss:.2f}")


def _failure(job: Job, code: int) -> JobError:
    lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = "\n".join(f"  {line}" for line in lines[-_TAIL:])
    return JobError(f"{job.title} failed with exit code {code}: {job.command}\n{tail}")


def run_jobs(
    jobs: Sequence[Job], say: Callable[[str], None], lanes: int = LANES, poll: float = 0.2
) -> dict[str, float]:
    """Run all jobs, `lanes` at a time, in the order given.

    Args:
        jobs: independent of each other.
        say: gets each progress line.
        lanes: processes at a time.
        poll: seconds between looks.

    Returns:
        Title -> seconds.

    Raises:
        JobError: a command failed; the others are stopped.
    """
    waiting, active = list(jobs), list[_Running]()
    seconds: dict[str, float] = {}
    try:
        while waiting or active:
            while waiting and len(active) < lanes:
                active.append(_start(waiting.pop(0)))
            time.sleep(poll)
            for running in list(active):
                _show_steps(running, say)
                code = running.process.poll()
                if code is None:
                    continue
                active.remove(running)
                running.stop()
                if code:
                    raise _failure(running.job, code)
                took = time.monotonic() - running.start
                seconds[running.job.title] = round(took, 1)
                say(f"{running.job.title}: done in {took:.0f} s")
    finally:
        for running in active:
            running.stop()
    return seconds
