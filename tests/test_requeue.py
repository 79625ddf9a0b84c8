"""What a batch job does with a run, by what the run left."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.owner import Owner
from training.requeue import LOCK, begin, end, main, newest, starts_file
from training.runlock import FILE, QUIET_SECONDS

NAME = "a"


def say(logs: Path, state: str, step: int = 0, reason: str | None = None, **more: object) -> None:
    (logs / NAME).mkdir(parents=True, exist_ok=True)
    about = {"state": state, "step": step, "reason": reason, "retryable": False, **more}
    (logs / NAME / "status.json").write_text(json.dumps(about))


def save(logs: Path, step: int) -> None:
    folder = logs / NAME / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def word(answer: tuple[str, str]) -> str:
    return answer[0]


def test_a_run_that_is_not_there_starts_and_leaves_no_folder_of_its_own(tmp_path):
    assert begin(tmp_path, NAME) == ("start", "from step 0, start 1 of 3 from there")
    assert not (tmp_path / NAME).exists()


def test_a_finished_run_has_nothing_to_do_and_is_not_counted(tmp_path):
    say(tmp_path, "finished", 8)
    assert begin(tmp_path, NAME) == ("finished", "at step 8, nothing to do")
    assert not starts_file(tmp_path, NAME).exists()
    assert word(end(tmp_path, NAME, 0)) == "finished"


@pytest.mark.parametrize(
    ("state", "retryable", "answer"),
    [
        ("preempted", True, "requeue"),
        ("running", False, "requeue"),
        ("failed", True, "requeue"),
        ("failed", False, "stop"),
        ("finished", False, "finished"),
    ],
)
def test_what_a_run_left_decides(tmp_path, state, retryable, answer):
    begin(tmp_path, NAME)
    say(tmp_path, state, 3, "because", retryable=retryable)
    found = end(tmp_path, NAME, 1)
    assert found.word == answer
    assert answer == "finished" or "at step 3 (because)" in found.why


def starts(logs: Path) -> int:
    """Starts that are counted."""
    file = starts_file(logs, NAME)
    return json.loads(file.read_text())["starts"] if file.exists() else 0


def test_a_run_that_never_began_is_over_unless_it_was_asked_to_end(tmp_path):
    begin(tmp_path, NAME)
    assert end(tmp_path, NAME, 138, asked=True) == (
        "requeue",
        "asked to end before its first step",
    )
    assert starts(tmp_path) == 1
    answer = end(tmp_path, NAME, 1)
    assert answer.word == "refused"
    assert "before it began" in answer.why


def test_an_old_status_says_nothing_of_a_start_that_was_refused(tmp_path):
    say(tmp_path, "preempted", 3)
    begin(tmp_path, NAME)
    assert word(end(tmp_path, NAME, 2, asked=True)) == "refused"
    # Under torchrun every code is 1: the same start cannot be told from a rendezvous that failed.
    assert word(end(tmp_path, NAME, 1)) == "requeue"
    say(tmp_path, "preempted", 4)
    assert word(end(tmp_path, NAME, 2)) == "requeue"


@pytest.mark.parametrize("before", [None, ("preempted", 3)])
def test_refused_starts_do_not_count(tmp_path, before):
    if before:
        say(tmp_path, *before)
    for _ in range(4):
        assert begin(tmp_path, NAME).why.endswith("start 1 of 3 from there")
        assert word(end(tmp_path, NAME, 2)) == "refused"
        assert starts(tmp_path) == 0
    begin(tmp_path, NAME)
    say(tmp_path, "running", 4)
    end(tmp_path, NAME, 2)
    assert starts(tmp_path) == 1


def test_a_start_that_was_refused_by_its_checks_does_not_count_and_a_failure_does(tmp_path):
    """The trainer leaves the step of the run when it refuses to go on with it."""
    for step, answer, count in ((3, "refused", 0), (4, "stop", 1)):
        say(tmp_path, "preempted", 3)
        begin(tmp_path, NAME)
        say(tmp_path, "failed", step, "UserError: --lr is another")
        assert word(end(tmp_path, NAME, 1)) == answer
        assert starts(tmp_path) == count


# --- flags ----------------------------------------------------------------------------------------


def test_a_mistake_in_the_flags_is_refused_before_a_start_is_counted(tmp_path):
    say(tmp_path, "preempted", 3)
    answer = begin(tmp_path, NAME, flags=["--name", NAME, "--workrs", "8"])
    assert answer.word == "refused"
    assert "--workrs" in answer.why
    assert "\n" not in answer.why
    assert not starts_file(tmp_path, NAME).exists()
    assert word(begin(tmp_path, NAME, flags=["--config", "paper-clip-b17"])) == "refused"
    assert word(begin(tmp_path, NAME, flags=["--config", "paper-clip-b16"])) == "start"


def test_flags_of_a_finished_run_are_not_looked_at(tmp_path):
    say(tmp_path, "finished", 8)
    assert word(begin(tmp_path, NAME, flags=["--workrs", "8"])) == "finished"


# --- a run that another job trains ----------------------------------------------------------------


def hold(logs: Path, silent: float = 0.0, **owner: object) -> None:
    """Let another job's living process hold the run."""
    about = {**vars(Owner.here()), "host": "n7", "job": "5", **owner}
    file = logs / NAME / FILE
    file.write_text(json.dumps(about) + "\n")
    os.utime(file, (time.time() - silent,) * 2)


def test_a_run_that_another_job_trains_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    begin(tmp_path, NAME)
    kept = starts_file(tmp_path, NAME).read_text()
    say(tmp_path, "running", 3)
    hold(tmp_path)
    answer = begin(tmp_path, NAME)
    assert answer.word == "refused"
    assert "is being trained by process" in answer.why
    assert "on n7" in answer.why
    assert starts_file(tmp_path, NAME).read_text() == kept
    assert LOCK == FILE


def test_a_start_that_met_another_jobs_run_is_over_and_not_counted(tmp_path, monkeypatch):
    """Both began at once: the status that is there is the other's."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    begin(tmp_path, NAME)
    say(tmp_path, "running", 0)
    hold(tmp_path)
    answer = end(tmp_path, NAME, 1)
    assert answer.word == "refused"
    assert "on n7" in answer.why
    assert starts(tmp_path) == 0


@pytest.mark.parametrize(
    "lock",
    [{"job": "17"}, {"silent": QUIET_SECONDS + 5, "machine": "far"}],
    ids=["own job", "silent"],
)
def test_a_lock_of_the_same_job_or_without_a_beat_keeps_nobody_out(tmp_path, monkeypatch, lock):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    say(tmp_path, "running", 3)
    hold(tmp_path, **lock)
    assert word(begin(tmp_path, NAME)) == "start"
    assert word(end(tmp_path, NAME, 1)) == "requeue"


def test_what_another_machine_holds_is_left_to_the_trainer_at_first(tmp_path, monkeypatch):
    """It may have been killed a moment ago; a trainer that was refused there is over."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    say(tmp_path, "running", 3)
    hold(tmp_path, machine="far")
    assert word(begin(tmp_path, NAME)) == "start"
    assert starts(tmp_path) == 1
    assert word(end(tmp_path, NAME, 1)) == "refused"
    assert starts(tmp_path) == 0


# --- how often ------------------------------------------------------------------------------------


def test_three_starts_without_a_new_checkpoint_are_enough(tmp_path):
    save(tmp_path, 100)
    for number in (1, 2, 3):
        assert begin(tmp_path, NAME).why == f"from step_00000100, start {number} of 3 from there"
        say(tmp_path, "running", number)
        answer = end(tmp_path, NAME, 1)
        assert answer.word == ("stop" if number == 3 else "requeue")
    for why in (answer.why, begin(tmp_path, NAME).why):
        assert "3 starts ended without a checkpoint after step_00000100" in why
        assert str(starts_file(tmp_path, NAME)) in why
        assert "see the lines above, mend" in why
        assert "\n" not in why
    (tmp_path / NAME / "out.log").touch()
    assert f"see {tmp_path / NAME / 'out.log'}, mend" in begin(tmp_path, NAME).why
    starts_file(tmp_path, NAME).unlink()
    assert word(begin(tmp_path, NAME)) == "start"


def test_a_new_checkpoint_begins_the_count_anew(tmp_path):
    for number in range(1, 9):
        assert begin(tmp_path, NAME).why.endswith("start 1 of 3 from there")
        say(tmp_path, "preempted", number, retryable=True)
        save(tmp_path, number)
        assert word(end(tmp_path, NAME, 1)) == "requeue"


def test_the_third_start_that_saves_something_is_no_failure(tmp_path):
    for number in (1, 2, 3):
        begin(tmp_path, NAME)
        say(tmp_path, "running", number)
    save(tmp_path, 2)
    assert word(end(tmp_path, NAME, 1)) == "requeue"


def test_only_sealed_checkpoints_count_and_the_highest_step_is_the_newest(tmp_path):
    assert newest(tmp_path / NAME) is None
    save(tmp_path, 99_999_999)
    save(tmp_path, 100_000_000)
    for name in ("step_00000300.part", "step_00000400.aside"):
        (tmp_path / NAME / "checkpoints" / name).mkdir()
        (tmp_path / NAME / "checkpoints" / name / "manifest.json").write_text("{}")
    (tmp_path / NAME / "checkpoints" / "step_200000000").mkdir()
    assert newest(tmp_path / NAME) == "step_100000000"


@pytest.mark.parametrize("text", ["", "[1]", "{", "null"])
def test_files_that_do_not_read_count_as_absent(tmp_path, text):
    say(tmp_path, "running")
    (tmp_path / NAME / "status.json").write_text(text)
    starts_file(tmp_path, NAME).parent.mkdir()
    starts_file(tmp_path, NAME).write_text(text)
    assert word(begin(tmp_path, NAME)) == "start"
    assert word(end(tmp_path, NAME, 1)) == "refused"


def test_the_command_prints_one_line_and_imports_no_torch(tmp_path, capsys):
    assert main(["begin", str(tmp_path), NAME, "--starts", "5"]) == 0
    assert capsys.readouterr().out == "start from step 0, start 1 of 5 from there\n"
    assert main(["begin", str(tmp_path), "b", "--", "--name", "b", "--starts", "5"]) == 0
    refused = capsys.readouterr().out
    assert refused.startswith("refused ")
    assert "--starts" in refused
    assert refused.count("\n") == 1
    code = "import sys, training.requeue; raise SystemExit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
