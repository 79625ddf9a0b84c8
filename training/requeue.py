"""Whether a batch job begins a run, leaves it, or goes back into the queue: `training.requeue`.

    python -m training.requeue begin LOGS NAME
    python -m training.requeue end LOGS NAME --code 1

prints one line, its first word the answer: `start`, `finished`, `requeue` or `stop`. It reads
LOGS/NAME/status.json and the names of the checkpoints, and counts the starts since the newest one
in LOGS/slurm/NAME.starts.json: not in the run's folder, which a run that fails its checks must not
leave. Standard library only, since a batch script should know at once that there is nothing to do.
Not here: what a run writes (`state`), how a cluster is told (`slurm/lib.sh`).
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

STARTS = 3
USAGE_CODE = 2
_STEP = re.compile(r"step_\d+")


class Answer(NamedTuple):
    """What is to be done (`start`, `finished`, `requeue`, `stop`), and why, in one line."""

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
    return Answer(
        "stop",
        f"{count} starts ended without {since}; see {logs / name / 'out.log'}, mend what is wrong, "
        f"remove {starts_file(logs, name)} and submit again",
    )


def begin(logs: Path, name: str, most: int = STARTS) -> Answer:
    """Decide at the start of a job, and count the start.

    Args:
        logs: folder of the runs.
        name: of the run.
        most: starts without a new checkpoint after which no other is made.
    """
    status, checkpoint = _read(logs / name / "status.json"), newest(logs / name)
    if status.get("state") == "finished":
        return Answer("finished", f"at step {status.get('step')}, nothing to do")
    file = starts_file(logs, name)
    before = _read(file)
    count = int(before.get("starts", 0)) if before.get("checkpoint") == checkpoint else 0
    if count >= most:
        return _given_up(count, checkpoint, logs, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(
        json.dumps({"checkpoint": checkpoint, "starts": count + 1, "status": status}) + "\n",
        encoding="utf-8",
    )
    part.replace(file)
    return Answer("start", f"from {checkpoint or 'step 0'}, start {count + 1} of {most} from there")


def _wants_to_go_on(status: dict[str, Any], fresh: bool, code: int, asked: bool) -> Answer:
    """Read what a run left: `fresh` tells that it was written in this start."""
    if not fresh:
        if asked:
            return Answer("requeue", "asked to end before its first step")
        if code == USAGE_CODE:
            return Answer("stop", "refused (code 2); the line that says why stands above")
        if not status:
            return Answer("stop", f"ended with code {code} before it began; see the lines above")
    state, reason = status.get("state"), status.get("reason")
    told = f"{state} at step {status.get('step')}" + (f" ({reason})" if reason else "")
    if state == "running":
        return Answer("requeue", f"ended with code {code} without a word, {told}")
    if state == "preempted" or (state == "failed" and status.get("retryable") is True):
        return Answer("requeue", told)
    return Answer("stop", told)


def end(logs: Path, name: str, code: int, asked: bool = False, most: int = STARTS) -> Answer:
    """Decide when the processes of a start have ended.

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
    answer = _wants_to_go_on(status, status != counted.get("status", {}), code, asked)
    checkpoint, count = newest(logs / name), int(counted.get("starts", 0))
    if answer.word == "requeue" and checkpoint == counted.get("checkpoint") and count >= most:
        return _given_up(count, checkpoint, logs, name)
    return answer


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="training.requeue", description="Say what a batch job does with a training run."
    )
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
    args = make_parser().parse_args(argv)
    if args.when == "begin":
        answer = begin(args.logs, args.name, args.starts)
    else:
        answer = end(args.logs, args.name, args.code, args.asked, args.starts)
    sys.stdout.write(f"{answer.word} {answer.why}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
