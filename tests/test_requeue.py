"""What a batch job does with a run, by what the run left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from training.requeue import begin, end, main, newest, starts_file

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


def test_a_run_that_never_began_stops_unless_it_was_asked_to_end(tmp_path):
    begin(tmp_path, NAME)
    assert "before it began" in end(tmp_path, NAME, 1).why
    assert word(end(tmp_path, NAME, 1)) == "stop"
    assert end(tmp_path, NAME, 138, asked=True) == (
        "requeue",
        "asked to end before its first step",
    )


def test_an_old_status_says_nothing_of_a_start_that_was_refused(tmp_path):
    say(tmp_path, "preempted", 3)
    begin(tmp_path, NAME)
    assert word(end(tmp_path, NAME, 2)) == "stop"
    # Under torchrun every code is 1: the same start cannot be told from a rendezvous that failed.
    assert word(end(tmp_path, NAME, 1)) == "requeue"
    say(tmp_path, "preempted", 4)
    assert word(end(tmp_path, NAME, 2)) == "requeue"


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
        assert "\n" not in why
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
    assert word(end(tmp_path, NAME, 1)) == "stop"


def test_the_command_prints_one_line_and_imports_no_torch(tmp_path, capsys):
    assert main(["begin", str(tmp_path), NAME, "--starts", "5"]) == 0
    assert capsys.readouterr().out == "start from step 0, start 1 of 5 from there\n"
    code = "import sys, training.requeue; raise SystemExit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
