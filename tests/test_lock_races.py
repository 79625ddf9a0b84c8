"""Of many starts that meet a dead lock one gets it, with no moment between the locks."""

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import threading
from pathlib import Path

import pytest

from lazyclip.base.errors import UserError
from tests.toy_locks import no_links, owner, put
from training import runlock
from training.owner import Owner
from training.runlock import FILE, RunLock, run_lock

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def test_of_two_that_find_a_dead_lock_one_gets_it(tmp_path, monkeypatch):
    """The second one takes the lock while the first is about to take the dead one away."""
    put(tmp_path, silent=1e6)
    quick, plain = RunLock(), RunLock._displace

    def displace(self, file):
        monkeypatch.setattr(RunLock, "_displace", plain)
        seen = runlock._seen

        def meanwhile(path, *missing):
            text = seen(path, *missing)
            monkeypatch.setattr(runlock, "_seen", seen)
            quick.take(tmp_path)
            return text

        monkeypatch.setattr(runlock, "_seen", meanwhile)
        return plain(self, file)

    monkeypatch.setattr(RunLock, "_displace", displace)
    with pytest.raises(UserError, match="is being trained by process"):
        RunLock().take(tmp_path)
    assert quick.held
    assert owner(tmp_path)["token"] == quick._me.token
    quick.release()
    assert list(tmp_path.iterdir()) == []


def held_of(folder: Path, locks: list[RunLock]) -> list[RunLock]:
    """Let all locks be taken at once, by threads; returns those that are held."""
    gate = threading.Barrier(len(locks))

    def take(lock: RunLock) -> None:
        gate.wait()
        with contextlib.suppress(UserError):
            lock.take(folder)

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [lock for lock in locks if lock.held]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("left", ["lock", "lock and claim", "lock, claim and claim on it"])
def test_of_many_that_find_what_dead_ones_left_one_gets_it(tmp_path, monkeypatch, links, left):
    if not links:
        no_links(monkeypatch)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for number in range(25):
            folder = tmp_path / str(number)
            file = put(folder, silent=1e6)
            for _ in range(left.count("claim")):
                other = dataclasses.replace(Owner.here(), pid=2**22 + 7)
                file = runlock._claim(file, file.read_text())
                file.write_text(other.text)
            locks = [RunLock() for _ in range(5)]
            held = held_of(folder, locks)
            assert [lock.token for lock in held] == [owner(folder)["token"]]
            assert [p.name for p in folder.iterdir()] == [FILE]
            held[0].release()
            assert list(folder.iterdir()) == []
    finally:
        sys.setswitchinterval(switch)


def test_there_is_no_moment_without_a_lock_while_a_dead_one_is_displaced(tmp_path, monkeypatch):
    """Seen at each change of the folder: a third start finds nothing that is free."""
    put(tmp_path, silent=1e6)
    moments = []

    def watched(plain):
        def call(*args, **kwargs):
            moments.append((tmp_path / FILE).exists())
            done = plain(*args, **kwargs)
            moments.append((tmp_path / FILE).exists())
            return done

        return call

    for module, name in ((os, "link"), (os, "replace"), (Path, "unlink"), (Path, "rename")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    lock = RunLock()
    lock.take(tmp_path)
    monkeypatch.undo()
    assert lock.held
    assert len(moments) > 6
    assert all(moments)
    lock.release()


def test_what_was_seen_dead_and_is_another_starts_meanwhile_is_left_alone(tmp_path, monkeypatch):
    """Its reader made the claim after the other had given it back."""
    file = put(tmp_path, silent=1e6)
    slow, quick = RunLock(), RunLock()
    plain = RunLock._acquire

    def acquire(self, name):
        if self is slow and name != file:
            monkeypatch.setattr(RunLock, "_acquire", plain)
            quick.take(tmp_path)
        return plain(self, name)

    monkeypatch.setattr(RunLock, "_acquire", acquire)
    with pytest.raises(UserError, match="is being trained by process"):
        slow.take(tmp_path)
    assert owner(tmp_path)["token"] == quick.token
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    quick.release()


def test_a_lock_that_another_writes_over_is_not_given_back_beside_it(tmp_path):
    """Its owner was cut off, and ends while its successor is at the lock."""
    lock = RunLock()
    lock.take(tmp_path)
    claim = runlock._claim(tmp_path / FILE, lock._me.text)
    claim.write_text(Owner.here().text)
    lock.release()
    assert (tmp_path / FILE).exists()


def test_a_link_whose_answer_was_lost_counts(tmp_path, monkeypatch):
    plain = os.link

    def link(source, target):
        plain(source, target)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", link)
    with run_lock() as lock:
        lock.take(tmp_path)
        assert lock.held
    put(tmp_path, silent=1e6)
    with run_lock() as lock:
        lock.take(tmp_path)
        assert lock.held
    assert list(tmp_path.iterdir()) == []


def take_in_a_process(folders: list[Path], gate) -> None:
    for folder in folders:
        lock = RunLock()
        gate.wait(20)
        with contextlib.suppress(UserError):
            lock.take(folder)
        if lock.held:
            with (folder / "holders").open("a") as stream:
                stream.write(f"{lock.token}\n")
        gate.wait(20)  # it lives until all have tried


def test_of_many_processes_that_find_a_dead_lock_one_gets_it(tmp_path):
    forked = multiprocessing.get_context("fork")
    folders = [tmp_path / str(number) for number in range(20)]
    for folder in folders:
        put(folder, silent=1e6)
    gate = forked.Barrier(4)
    there = [forked.Process(target=take_in_a_process, args=(folders, gate)) for _ in range(4)]
    for process in there:
        process.start()
    for process in there:
        process.join(60)
    assert [process.exitcode for process in there] == [0] * 4
    for folder in folders:
        assert (folder / "holders").read_text().split() == [owner(folder)["token"]]
