"""Folders are whole or not there, and a changed byte is found."""

import errno
import json

import pytest

from lazyclip.base import checkpoint
from lazyclip.base.checkpoint import (
    NotWholeError,
    first_of_spans,
    list_steps,
    newest_whole,
    prune,
    verify,
    writing,
)


def save(parent, step, content=b"weights"):
    folder = parent / f"step_{step:08d}"
    with writing(folder) as part:
        (part / "sub").mkdir()
        (part / "model.bin").write_bytes(content)
        (part / "sub" / "state.bin").write_bytes(content * 2)
    return folder


def test_a_folder_that_was_written_is_whole(tmp_path):
    folder = save(tmp_path, 3)
    verify(folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {name: row["bytes"] for name, row in files.items()} == {
        "model.bin": 7,
        "sub/state.bin": 14,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[3] ^= 1
    file.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: flip(f / "sub" / "state.bin"), "state.bin was changed"),
        (lambda f: (f / "model.bin").unlink(), "model.bin is missing"),
        (lambda f: (f / "model.bin").write_bytes(b"weight"), "has 6 bytes, 7 were written"),
        (lambda f: (f / "manifest.json").unlink(), "was not finished"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text('{"files": 3}'), "cannot be read"),
    ],
)
def test_what_is_not_whole_is_named_and_the_step_before_is_taken(tmp_path, harm, words, caplog):
    older, newer = save(tmp_path, 3), save(tmp_path, 10)
    assert newest_whole(tmp_path) == newer
    harm(newer)
    with pytest.raises(NotWholeError, match=words):
        verify(newer)
    assert newest_whole(tmp_path) == older
    assert "passed over" in caplog.text


@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing_and_the_folder_before_as_it_was(tmp_path, kind):
    before = save(tmp_path, 3)

    def fail():
        with writing(before) as part:
            (part / "model.bin").write_bytes(b"half")
            raise kind

    with pytest.raises(type(kind)):
        fail()
    verify(before)
    assert (before / "model.bin").read_bytes() == b"weights"
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


def test_a_step_written_again_replaces_the_one_there(tmp_path):
    save(tmp_path, 3)
    again = save(tmp_path, 3, b"others")
    verify(again)
    assert (again / "model.bin").read_bytes() == b"others"


def test_files_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    order = []
    plain = checkpoint.force_to_disk
    monkeypatch.setattr(
        checkpoint, "force_to_disk", lambda path: (order.append(path.name), plain(path))
    )
    folder = save(tmp_path, 3)
    assert order[:2] == ["model.bin", "state.bin"]
    assert order[2] == "manifest.json"
    assert order[-1] == tmp_path.name
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("steps", "kept"),
    [((), []), ((5, 9), []), ((5, 10, 15, 20, 29), [10, 20]), ((3, 12, 17, 19, 33, 38), [12, 33]),
     ((47, 41, 9), [41])],
)  # fmt: skip
def test_of_each_span_the_first_step_stays_for_good(steps, kept):
    assert sorted(first_of_spans(steps, 10)) == kept


def test_saves_that_never_fall_on_a_round_step_leave_one_of_each_span(tmp_path):
    """As they come, one by one: what stays does not depend on when others went."""
    for step in range(3, 60, 4):
        save(tmp_path, step)
        prune(tmp_path, keep=2, every=20)
    assert [step for step, _ in list_steps(tmp_path)] == [23, 43, 55, 59]


def test_the_newest_steps_and_the_round_ones_stay(tmp_path):
    for step in (5, 10, 15, 20, 25, 30):
        save(tmp_path, step)
    (tmp_path / "step_00000031.part").mkdir()
    (tmp_path / "notes").mkdir()
    prune(tmp_path, keep=0)
    assert [step for step, _ in list_steps(tmp_path)] == [5, 10, 15, 20, 25, 30]
    prune(tmp_path, keep=2, every=10, spare=[tmp_path / "step_00000005"])
    assert [step for step, _ in list_steps(tmp_path)] == [5, 10, 20, 25, 30]
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("step")) == ["notes"]
    assert not (tmp_path / "step_00000031.part").exists()


def test_there_may_be_no_step_at_all(tmp_path):
    assert newest_whole(tmp_path / "none") is None
    (tmp_path / "step_x").mkdir()
    assert list_steps(tmp_path) == []
