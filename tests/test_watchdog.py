"""A rank that hangs while it saves ends too, and so does one whose disk hangs."""

import json
import threading

from training import watchdog
from training.watchdog import Watchdog


def test_a_save_that_never_ends_ends_the_run(tmp_path, monkeypatch):
    """Patience with a save is an hour, or ten usual ones, and not without end."""
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    dog = Watchdog(tmp_path, 0, minutes=10)
    with dog.paused():
        assert dog.limit() == 3600
        clock[0] = 1000.0
    assert dog.limit() == 600
    with dog.paused():
        assert dog.limit() == 10_000
    monkeypatch.undo()
    monkeypatch.setattr(watchdog, "SAVE_MINUTES", 0.1 / 60)
    ended = []
    dog = Watchdog(tmp_path, 0, minutes=0.05 / 60, check_seconds=0.01)
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: ended.append(code) or dog._over.set())
    dog.start()
    with dog.paused():
        dog._over.wait(5.0)
    dog.stop()
    assert ended == [1]
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["reason"], found["retryable"]) == ("failed", "hang", True)


def test_a_disk_that_hangs_does_not_keep_the_watchdog_from_ending(tmp_path, monkeypatch):
    ended, told, free = [], [], threading.Event()
    monkeypatch.setattr(watchdog, "LAST_WORDS_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "write_status", lambda *args: told.append(free.wait(5)))
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    Watchdog(tmp_path, 0, minutes=1)._end(1.0)
    assert (ended, told) == ([1], [])
    free.set()
