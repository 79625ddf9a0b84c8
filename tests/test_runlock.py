"""One run in a folder at a time, and no dead one in the way of the next."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from lazyclip.base.errors import UserError
from tests.toy_faults import flags, kill_in_step, run
from tests.toy_locks import no_links, owner, put
from tests.toy_ranks import kill, start, wait
from tests.toy_run import TINY, train, world
from training import loop, runlock
from training import owner as owners
from training.main import main
from training.owner import STALE_SECONDS, Owner
from training.runlock import FILE, RunLock, in_use, living, run_lock

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def test_a_lock_is_held_once_and_given_back(tmp_path):
    with run_lock() as lock:
        lock.take(tmp_path)
        lock.take(tmp_path)
        assert lock.held
        assert owner(tmp_path)["pid"] == os.getpid()
        assert [p.name for p in tmp_path.iterdir()] == [FILE]
        with pytest.raises(UserError) as caught:
            RunLock().take(tmp_path)
        assert str(caught.value) == (
            f"{tmp_path} is being trained by process {os.getpid()} on {owner(tmp_path)['host']}, "
            f"since {owner(tmp_path)['since']}; end that run, or give another --name"
        )
        assert [p.name for p in tmp_path.iterdir()] == [FILE]
        assert living(tmp_path) == str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert living(tmp_path) is None
    again = RunLock()
    again.take(tmp_path)
    again.release()
    again.release()


@pytest.mark.parametrize(
    ("changes", "silent", "lives"),
    [
        ({}, 10, True),  # another machine, touched ten seconds ago
        ({}, STALE_SECONDS - 30, True),
        ({}, STALE_SECONDS + 30, False),
        ({"job": "55", "restarts": 1}, 0, False),  # an earlier start of our own SLURM job
        ({"job": "55", "restarts": 2}, 0, True),  # another step of this start of it
        ({"job": "55", "restarts": 2}, STALE_SECONDS + 30, False),
        ({"job": "55", "restarts": 3}, 0, True),  # a later start of it: ours is the one cut off
        ({"job": "56", "restarts": 0}, 0, True),
        ({"machine": None}, 0, False),  # this machine, no such process any more
        ({"machine": None, "pid": None}, 1e6, False),  # its number was given to another one
        ({"machine": None, "pid": None, "started": None}, 1e6, True),  # it is there, however still
        ({"machine": None, "pid": None, "started": None, "job": "55", "restarts": 1}, 0, True),
    ],
)  # fmt: skip
def test_who_counts_as_alive(tmp_path, monkeypatch, changes, silent, lives):
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    here = dataclasses.asdict(Owner.here())
    known = {name: here[name] if value is None else value for name, value in changes.items()}
    put(tmp_path, silent, **{"pid": 2**22 + 1, **known})
    lock = RunLock()
    if lives:
        with pytest.raises(UserError, match="is being trained by process"):
            lock.take(tmp_path)
        assert owner(tmp_path)["pid"] == known.get("pid", 2**22 + 1)
    else:
        lock.take(tmp_path)
        assert owner(tmp_path)["pid"] == os.getpid()
        lock.release()
    assert len(list(tmp_path.iterdir())) == int(lives)


def test_a_run_on_another_machine_is_told_with_the_time_to_wait(tmp_path):
    put(tmp_path, silent=60, pid=77)
    with pytest.raises(UserError, match=r"process 77 on node7, since 2026.*again in 4 min$"):
        RunLock().take(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}'])
def test_a_lock_that_cannot_be_read_counts_while_it_is_fresh(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UserError, match="is being trained by another start"):
        RunLock().take(tmp_path)
    then = time.time() - STALE_SECONDS - 10
    os.utime(tmp_path / FILE, (then, then))
    with run_lock() as lock:
        lock.take(tmp_path)
        assert lock.held


class Sleeper:
    """Sleeps by making the lock older, and may do something after some naps."""

    def __init__(self, file: Path, after: int = 10**9, then=lambda: None) -> None:
        self.file, self.after, self.then, self.naps = file, after, then, 0

    def __call__(self, seconds: float) -> None:
        self.naps += 1
        if self.naps > 100:
            raise RuntimeError("waits without end")
        if self.naps == self.after:
            self.then()
        elif self.file.exists():
            then = self.file.stat().st_mtime - seconds
            os.utime(self.file, (then, then))


def test_a_start_that_goes_on_waits_for_what_may_be_dead_elsewhere(tmp_path, caplog):
    caplog.set_level("INFO")
    file = put(tmp_path, silent=91, pid=77)
    sleep = Sleeper(file)
    lock = RunLock(sleep)
    lock.take(tmp_path, wait=True)
    assert lock.held
    assert sleep.naps == 21
    lines = [r.message for r in caplog.records if "waits" in r.message]
    assert lines[0] == (
        f"{tmp_path} is held by process 77 on node7, silent for 91 s: waits, 4 min at most, until "
        "that run is heard or counts as dead"
    )
    assert [line.split("waits, ")[1][0] for line in lines] == list("4321")
    lock.release()


def test_what_is_heard_again_is_waited_for_no_longer(tmp_path):
    file = put(tmp_path, silent=90)
    sleep = Sleeper(file, after=3, then=lambda: os.utime(file))
    with pytest.raises(UserError, match="is being trained by process 1 on node7"):
        RunLock(sleep).take(tmp_path, wait=True)
    assert sleep.naps == 3
    gone = RunLock(Sleeper(put(tmp_path, silent=90), after=2, then=file.unlink))
    gone.take(tmp_path, wait=True)
    assert gone.held
    gone.release()


@pytest.mark.parametrize("silent", [10, 90])
def test_a_new_start_waits_for_nobody(tmp_path, silent):
    sleep = Sleeper(put(tmp_path, silent=silent))
    with pytest.raises(UserError, match="is being trained by"):
        RunLock(sleep).take(tmp_path)
    assert sleep.naps == 0


def test_a_run_killed_a_moment_ago_elsewhere_is_waited_for_too(tmp_path):
    """As the next job of a chain does, which begins seconds after the one before was killed."""
    sleep = Sleeper(put(tmp_path, silent=5))
    lock = RunLock(sleep)
    lock.take(tmp_path, wait=True)
    assert lock.held
    assert sleep.naps == 30
    lock.release()


def test_a_process_that_the_system_shows_to_nobody_lives(monkeypatch):
    me = Owner.here()
    monkeypatch.setattr(owners, "_read", lambda path: "")
    assert not me.lives(me, 0)  # it takes signals, so it would be seen

    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(owners.os, "kill", refuse)
    assert me.lives(me, 10**6)


def test_only_a_run_that_goes_on_waits(tmp_path, monkeypatch):
    waited = []
    plain = RunLock.take

    def take(self, folder, wait=False):
        waited.append(wait)
        plain(self, folder, wait)

    monkeypatch.setattr(RunLock, "take", take)
    how = {"train_data": world(), "model": TINY, "save_every": 2}
    train(tmp_path, **how)
    assert waited == [False]
    train(tmp_path, **how, resume="latest")
    assert waited[1] is True


def test_a_disk_without_hard_links_has_locks_too(tmp_path, monkeypatch):
    no_links(monkeypatch)
    with run_lock() as lock:
        lock.take(tmp_path)
        assert living(tmp_path)
        with pytest.raises(UserError):
            RunLock().take(tmp_path)


def test_a_full_disk_lets_no_second_run_in(tmp_path, monkeypatch):
    put(tmp_path, pid=77)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="process 77 on node7"):
        RunLock().take(tmp_path)


def test_a_disk_that_takes_no_lock_stops_no_run(tmp_path, caplog):
    with run_lock() as lock:
        lock.take(tmp_path / "none")
        assert not lock.held
    assert "nothing keeps a second run out" in caplog.text


def test_a_folder_with_a_lock_alone_is_not_in_use(tmp_path):
    put(tmp_path)
    assert not in_use(tmp_path)
    (tmp_path / "out.log").touch()
    assert in_use(tmp_path)


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_start_beside_a_living_run_is_refused_and_leaves_its_files_alone(tmp_path, resume):
    how = {"train_data": world(), "model": TINY, "save_every": 2}
    first = train(tmp_path, **how)
    (first.folder / "status.json").write_text("its own")
    put(first.folder, **{**vars(Owner.here()), "token": "another"})
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    ran = train(tmp_path, **how, resume=resume)
    assert ran.code == 2
    said = ran.err.splitlines()[-1]
    assert said.startswith(f"error: {first.folder} is being trained by process {os.getpid()} on ")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_run_that_began_meanwhile_is_told(tmp_path, monkeypatch):
    """Its folder appears after this one's was found free."""
    plain = runlock.RunLock.take

    def take(self, folder, wait=False):
        monkeypatch.setattr(runlock.RunLock, "take", plain)
        put(folder, pid=77)
        plain(self, folder)

    monkeypatch.setattr(runlock.RunLock, "take", take)
    ran = train(tmp_path, train_data=world(), model=TINY)
    assert ran.code == 2
    assert "is being trained by process 77 on node7" in ran.err
    assert [p.name for p in (tmp_path / "a").iterdir()] == [FILE]


def test_a_run_that_began_and_ended_meanwhile_is_told(tmp_path, monkeypatch):
    plain = runlock.RunLock.take

    def take(self, folder):
        plain(self, folder)
        (folder / "out.log").write_text("of the other run")

    monkeypatch.setattr(runlock.RunLock, "take", take)
    ran = train(tmp_path, train_data=world(), model=TINY)
    assert ran.code == 2
    assert f"{ran.folder} exists; go on with it by --resume latest" in ran.err
    assert [p.name for p in ran.folder.iterdir()] == ["out.log"]


def test_a_run_leaves_no_lock(tmp_path):
    ran = train(tmp_path, train_data=world(), model=TINY)
    assert ran.code == 0
    assert not (ran.folder / FILE).exists()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_start_beside_a_living_one_is_refused_on_every_rank(tmp_path, ranks):
    """The first one waits in its third step; the second comes and goes; the first one ends."""
    plain = loop.Loop._advance
    here, go_on = tmp_path / "here", tmp_path / "go on"

    def advance(self, fed):
        while self.step == 2 and not go_on.exists():
            here.touch()
            time.sleep(0.01)
        return plain(self, fed)

    def before():
        loop.Loop._advance = advance

    first = start(ranks, lambda: before() or main(flags(tmp_path, ranks)), log=tmp_path / "log")
    try:
        while not here.exists():
            time.sleep(0.01)
        status = (tmp_path / "a" / "status.json").read_bytes()
        codes = run(ranks, flags(tmp_path, ranks, resume="latest"), tmp_path / "second")
        assert codes == [2] * ranks
        said = (tmp_path / "second").read_text()
        assert said.count(f"is being trained by process {first[0]} on ") == ranks
        assert (tmp_path / "a" / "status.json").read_bytes() == status
        go_on.touch()
        assert wait(first) == [0] * ranks, (tmp_path / "log").read_text()[-3000:]
    finally:
        kill(first)
    assert not (tmp_path / "a" / FILE).exists()


@pytest.mark.slow
@pytest.mark.dist
def test_the_lock_of_a_killed_run_is_in_nobodys_way(tmp_path):
    codes = run(1, flags(tmp_path, 1), tmp_path / "log", kill_in_step(3))
    assert codes == [-signal.SIGKILL]
    assert (tmp_path / "a" / FILE).exists()
    assert run(1, flags(tmp_path, 1, resume="latest"), tmp_path / "log") == [0]
    assert "is gone" in (tmp_path / "log").read_text()
    assert not (tmp_path / "a" / FILE).exists()
