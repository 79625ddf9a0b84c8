"""Whether a batch job begins a run, leaves it, or goes back into the queue: `training.requeue`.

    python -m training.requeue begin LOGS NAME -- FLAGS OF training.main
    python -m training.requeue end LOGS NAME --code 1

prints one line, its first word the answer: `start`, `finished`, `requeue`, `stop` or `refused`. It
reads LOGS/NAME/status.json, run.lock and the names of the checkpoints, and counts the starts since
the newest one in LOGS/slurm/NAME.starts.json: not in the run's folder, which a run that fails its
checks must not leave. A start that was refused does not count. Standard library only until a start
is due, since a batch script should know at once that there is nothing to do. Not here: what a run
writes (`state`), how a cluster is told (`slurm/lib.sh`).
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

STARTS = 3
USAGE_CODE = 2
# `runlock.FILE`, which takes torch along.
LOCK = "run.lock"
_STEP = re.compile(r"step_\d+")


class Answer(NamedTuple):
    """What is to be done, and why, in one line.

    Words: `start`; `finished`; `requeue`; `stop`, the run is over until somebody looks at it;
    `refused`, the command is a mistake and the run is as it was.
    """

    word: str
    why: str


def _read(file: Path) -> dict[str, Any]:
    """Read a small json object; empty where there is none or it is no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def newest(run: Path) -> str | None:
    """Return the name of a run's newest sealed checkpoint, not looking into it."""
    folder = run / "checkpoints"
    names = [p.name for p in folder.glob("step_*") if (p / "manifest.json").is_file()]
    steps = [name for name in names if _STEP.fullmatch(name)]
    return max(steps, key=lambda name: int(name.split("_")[1]), default=None)


def starts_file(logs: Path, name: str) -> Path:
    """Return where the starts of a run are counted."""
    return logs / "slurm" / f"{name}.starts.json"


def _given_up(count: int, checkpoint: str | None, logs: Path, name: str) -> Answer:
    since = f"a checkpoint after {checkpoint}" if checkpoint else "a first checkpoint"
    told = logs / name / "out.log"
    see = told if told.is_file() else "the lines above"
    return Answer(
        "stop",
        f"{count} starts ended without {since}; see {see}, mend what is wrong, "
        f"remove {starts_file(logs, name)} and submit again",
    )


def _held(run: Path, near_only: bool = False) -> str | None:
    """Phrase by whom a run is trained at this moment; None where by nobody but this job.

    A lock that was silent for two beats counts as nobody's: the trainer waits and sees.

    Args:
        run: its folder.
        near_only: leave what another machine holds to the trainer: it may be dead since a moment.
    """
    lock = run / LOCK
    try:
        silent, text = time.time() - lock.stat().st_mtime, lock.read_text(encoding="utf-8")
    except OSError:
        return None
    job = os.environ.get("SLURM_JOB_ID")
    if job and _read(lock).get("job") == job:
        return None
    # Late, as they take torch along.
    from .owner import Owner
    from .runlock import QUIET_SECONDS, living, near

    if silent > QUIET_SECONDS:
        return None
    if near_only and not near(Owner.of(text), Owner.here()):
        return None
    return living(run)


def _mistake(flags: Sequence[str]) -> str | None:
    """Phrase what is wrong with the flags of a training; None where they read."""
    # Late, as they take torch along.
    from lazyclip.base.errors import UserError

    from .params import parse

    try:
        parse(flags)
    except UserError as error:
        return " ".join(str(error).split())
    return None


def _count(logs: Path, name: str, about: dict[str, Any]) -> None:
    file = starts_file(logs, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(json.dumps(about) + "\n", encoding="utf-8")
    part.replace(file)


def begin(logs: Path, name: str, most: int = STARTS, flags: Sequence[str] | None = None) -> Answer:
    """Decide at the start of a job, and count the start.

    Args:
        logs: folder of the runs.
        name: of the run.
        most: starts without a new checkpoint after which no other is made.
        flags: of `training.main`, to be read once before all ranks are started; None: not looked
            at. Under torchrun a run that goes on cannot tell a mistake in them from a crash.
    """
    status, checkpoint = _read(logs / name / "status.json"), newest(logs / name)
    if status.get("state") == "finished":
        return Answer("finished", f"at step {status.get('step')}, nothing to do")
    held = _held(logs / name, near_only=True)
    if held is not None:
        return Answer("refused", held)
    before = _read(starts_file(logs, name))
    count = int(before.get("starts", 0)) if before.get("checkpoint") == checkpoint else 0
    if count >= most:
        return _given_up(count, checkpoint, logs, name)
    mistake = _mistake(flags) if flags is not None else None
    if mistake is not None:
        return Answer("refused", mistake)
    _count(logs, name, {"checkpoint": checkpoint, "starts": count + 1, "status": status})
    return Answer("start", f"from {checkpoint or 'step 0'}, start {count + 1} of {most} from there")


def _wants_to_go_on(
    status: dict[str, Any], before: dict[str, Any], code: int, asked: bool
) -> Answer:
    """Read what a run left, and what it had left before this start."""
    if status == before:
        if code == USAGE_CODE:
            return Answer("refused", "code 2; the line that says why stands above")
        if asked:
            return Answer("requeue", "asked to end before its first step")
        if not status:
            return Answer("refused", f"ended with code {code} before it began; see the lines above")
    state, reason = status.get("state"), status.get("reason")
    told = f"{state} at step {status.get('step')}" + (f" ({reason})" if reason else "")
    if state == "running":
        return Answer("requeue", f"ended with code {code} without a word, {told}")
    if state == "preempted" or (state == "failed" and status.get("retryable") is True):
        return Answer("requeue", told)
    at_once = status.get("step") == before.get("step", 0)
    return Answer("refused" if at_once and str(reason).startswith("UserError") else "stop", told)


def end(logs: Path, name: str, code: int, asked: bool = False, most: int = STARTS) -> Answer:
    """Decide when the processes of a start have ended; a refused start is taken back.

    Args:
        logs: folder of the runs.
        name: of the run.
        code: exit code; under torchrun it is 1 for everything.
        asked: the job was asked to end, by its time limit for one.
        most: starts without a new checkpoint after which no other is made.
    """
    status, counted = _read(logs / name / "status.json"), _read(starts_file(logs, name))
    if status.get("state") == "finished":
        return Answer("finished", f"at step {status.get('step')}")
    held = _held(logs / name)
    answer = (
        Answer("refused", held)
        if held is not None
        else _wants_to_go_on(status, counted.get("status", {}), code, asked)
    )
    checkpoint, count = newest(logs / name), int(counted.get("starts", 0))
    if answer.word == "refused" and count:
        _count(logs, name, {**counted, "starts": count - 1})
    if answer.word == "requeue" and checkpoint == counted.get("checkpoint") and count >= most:
        return _given_up(count, checkpoint, logs, name)
    return answer


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="training.requeue", description="Say what a batch job does with a training run.",
        epilog="begin: flags of training.main may follow behind --; they are read, and refused.",
    )  # fmt: skip
    parser.add_argument("when", choices=("begin", "end"))
    parser.add_argument("logs", type=Path, help="folder that holds the runs")
    parser.add_argument("name", help="of the run")
    parser.add_argument("--code", type=int, default=0, help="exit code of the start that ended")
    parser.add_argument("--asked", action="store_true", help="the job was asked to end")
    parser.add_argument(
        "--starts", type=int, default=STARTS, help="most starts without a new checkpoint"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the answer."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = make_parser().parse_args(words[:cut])
    if args.when == "begin":
        flags = words[cut + 1 :] if cut < len(words) else None
        answer = begin(args.logs, args.name, args.starts, flags)
    else:
        answer = end(args.logs, args.name, args.code, args.asked, args.starts)
    sys.stdout.write(f"{answer.word} {answer.why}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
