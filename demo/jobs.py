"""Run commands as processes, a few at a time, with progress lines and an end at the first failure.

Not here: which commands (`run`), what they print (a file each).
"""

import dataclasses
import json
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

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


class _Process(Protocol):
    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


class _Fork:
    """`python -m MODULE WORDS` in a copy of this process, which has imported torch already.

    Importing torch and open_clip takes longer than most of the demo's scores; a copy has them.
    """

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("fork")
        self._child = context.Process(target=_run_module, args=(job,), daemon=True)
        self._child.start()

    def poll(self) -> int | None:
        return self._child.exitcode

    def terminate(self) -> None:
        self._child.terminate()

    def wait(self) -> int:
        self._child.join()
        return self._child.exitcode or 0


def _run_module(job: Job) -> None:
    os.chdir(ROOT)
    os.environ.update(_SINGLE)
    with job.log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    # They outlive this function, as the process's own streams do.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.argv = [job.module, *job.words]
    runpy.run_module(job.module, run_name="__main__", alter_sys=True)


def _spawn(job: Job) -> _Process:
    with job.log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", job.module, *job.words],
            cwd=ROOT,
            env={**os.environ, **_SINGLE},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


@dataclasses.dataclass
class _Running:
    job: Job
    process: _Process
    start: float
    shown: int = 0

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


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
    # Forking is safe on Linux, where this process has no threads of its own.
    process = _Fork(job) if sys.platform == "linux" else _spawn(job)
    return _Running(job, process, time.monotonic())


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
