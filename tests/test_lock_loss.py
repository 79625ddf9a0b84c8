"""A run that lost its folder to another start ends, and leaves its files alone."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from tests.toy_locks import owner, put
from tests.toy_run import TINY, train, world
from training import loop, runlock
from training.distributed import Place
from training.runlock import FILE, RunLock, run_lock, share
from training.state import write_status
from training.watchdog import Watchdog


def test_the_lock_is_touched_while_it_is_held_and_its_loss_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runlock, "BEAT_SECONDS", 0.01)
    ended: list[int] = []
    with run_lock() as lock:
        lock.take(tmp_path)
        os.utime(tmp_path / FILE, (0, 0))
        end = time.monotonic() + 5
        while (tmp_path / FILE).stat().st_mtime < 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert (tmp_path / FILE).stat().st_mtime > 1
        lock._over.set()
        lock._thread.join()
        lock.beat(ended.append)
        assert ended == []
        (tmp_path / FILE).rename(tmp_path / "away")
        lock.beat(ended.append)  # its successor has ended and given the lock back
        assert ended == [1]
        put(tmp_path, token="of another")
        lock.beat(ended.append)
        assert ended == [1, 1]
    assert owner(tmp_path)["token"] == "of another"


def test_a_disk_that_is_away_ends_no_run(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    ended: list[int] = []
    with run_lock() as lock:
        lock.take(folder)
        lock._over.set()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError(5)))
            lock.beat(ended.append)
            assert lock.hold.stands()
        folder.rename(tmp_path / "elsewhere")
        lock.beat(ended.append)
        (tmp_path / "elsewhere").rename(folder)
        lock.beat(ended.append)
    assert ended == []


def lose(folder: Path, successor: str) -> None:
    """Give a run's lock to another start, which may have ended since."""
    if successor == "lives":
        put(folder, token="of another")
    else:
        (folder / FILE).unlink()


@pytest.mark.parametrize("successor", ["lives", "has ended"])
@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_run_that_lost_its_folder_writes_nothing_more(tmp_path, monkeypatch, successor, moment):
    """The lock is lost in the third step, or right before a save; no beat comes in between."""
    plain, plain_write = loop.Loop._advance, loop.Loop._write
    before = {}

    class Ended(BaseException):
        """Stands for the end of the process."""

    def end(code):
        raise Ended

    def now(self):
        lose(self.run_.folder, successor)
        before.update({p: p.read_bytes() for p in self.run_.folder.rglob("*") if p.is_file()})

    def advance(self, fed):
        if self.step == 2 and moment == "step":
            now(self)
        return plain(self, fed)

    def write(self, *args):
        if self.step == 2 and moment == "save":
            now(self)
        return plain_write(self, *args)

    monkeypatch.setattr(loop, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(loop.Loop, "_advance", advance)
    monkeypatch.setattr(loop.Loop, "_write", write)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended):
        train(tmp_path, train_data=world(), model=TINY, audit=True, save_every=2)
    there = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    for file in set(before) | set(there):
        if file.name != "out.log":
            assert there.get(file) == before.get(file), file


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_left_of_a_run_says_nothing_in_its_successors_files(tmp_path, rank):
    lock = RunLock()
    lock.take(tmp_path)
    place = Place(0, 1, 0, torch.device("cpu"))
    hold = share(tmp_path, place, lock)
    assert hold.stands()
    write_status(tmp_path, "running", 3, hold=hold)
    lock._over.set()
    file = put(tmp_path, token="of another")
    write_status(tmp_path, "running", 5)  # the successor
    write_status(tmp_path, "failed", 4, "connection closed", True, hold)
    Watchdog(tmp_path, rank, 1.0, hold=hold)._tell(1.0)
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 5
    file.unlink()
    write_status(tmp_path, "failed", 4, "connection closed", True, hold)
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_a_rank_that_does_not_see_the_lock_has_nothing_to_check(tmp_path):
    lock = RunLock()
    (tmp_path / "one").mkdir()
    lock.take(tmp_path / "one")
    place = Place(0, 1, 0, torch.device("cpu"))
    (tmp_path / "two").mkdir()
    assert share(tmp_path / "two", place, lock).stands()
    lock.release()
    assert share(tmp_path / "two", place, RunLock()).stands()
