"""Requests to end, a hung run, and a launcher that is gone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.toy_faults import flags, run, same_as_undisturbed
from tests.toy_ranks import start, wait
from tests.toy_run import train, world
from training import distributed, loop, signals
from training.audit import read_audit
from training.main import main
from training.probe import Probe
from training.signals import Asked, listening
from training.watchdog import Watchdog

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[1]
NAMES = ["SIGTERM", "SIGINT", "SIGUSR1"]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


def sending(monkeypatch, owner, attribute: str, name: str, at: int | None = None) -> None:
    """Let a call send this process a signal before it does its work, once."""
    plain, sent = getattr(owner, attribute), []

    def call(*args, **kwargs):
        if not sent and (at is None or args[0].step == at):
            sent.append(1)
            send(name)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, call)


def go_on(tmp_path: Path, words: dict) -> None:
    ran = train(tmp_path, resume="latest", **words)
    assert ran.code == 0, ran.err
    assert status(ran.folder)["state"] == "finished"
    same_as_undisturbed(ran.folder, 1)


def settings(tmp_path: Path, **changes: object) -> dict:
    """The run of `toy_faults.flags` as keywords of `train`."""
    words = flags(tmp_path, 1, **changes)
    found: dict[str, object] = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word[2:].replace("-", "_")] = True if after.startswith("--") else after
    del found["logs"], found["name"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_in_training_saves_at_the_end_of_the_step(tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        sending(patch, loop.Loop, "_advance", name, at=2)
        ran = train(tmp_path, **settings(tmp_path))
    assert ran.code == 75
    found = status(ran.folder)
    assert (found["state"], found["step"], found["retryable"]) == ("preempted", 3, True)
    assert found["reason"] == f"{name}: saved"
    assert (ran.folder / "checkpoints" / "step_00000003").is_dir()
    assert f"ended at step 3 ({name}: saved); go on with --resume latest" in ran.err
    go_on(tmp_path, settings(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_while_saving_lets_the_save_end(tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        sending(patch, loop, "save_checkpoint", name)
        ran = train(tmp_path, **settings(tmp_path))
    assert ran.code == 75
    assert status(ran.folder)["step"] == 3  # the step after the save of step 2
    steps = sorted(p.name for p in (ran.folder / "checkpoints").iterdir())
    assert steps == ["step_00000002", "step_00000003"]
    go_on(tmp_path, settings(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_while_evaluating_waits_for_the_next_step(tmp_path, monkeypatch, name):
    words = settings(
        tmp_path, val_data=world(), classes="red,blue,green", templates="plain", val_num_samples=8
    )
    with monkeypatch.context() as patch:
        sending(patch, Probe, "top1", name)
        ran = train(tmp_path, **words)
    assert ran.code == 75
    assert status(ran.folder)["step"] == 1
    ran = train(tmp_path, resume="latest", **words)
    assert ran.code == 0
    lines = [json.loads(x) for x in (ran.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "probe/top1" in line] == [0, 4, 8]


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path, monkeypatch):
    sending(monkeypatch, loop.Loop, "_advance", "SIGTERM", at=7)
    ran = train(tmp_path, **settings(tmp_path))
    assert ran.code == 0
    assert status(ran.folder)["state"] == "finished"


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in signals.ASKING]
    with listening():
        assert [signal.getsignal(number) for number in signals.ASKING] != before
    assert [signal.getsignal(number) for number in signals.ASKING] == before


def test_outside_the_main_thread_nothing_is_listened_to():
    found = []
    thread = threading.Thread(target=lambda: found.append(listening().__enter__()))
    thread.start()
    thread.join()
    assert not found[0]


def test_an_echo_is_one_request_and_a_second_one_ends_at_once(monkeypatch):
    asked, ended, clock = Asked(), [], [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    asked.handle(signal.SIGTERM, None)
    clock[0] = 0.9
    asked.handle(signal.SIGUSR1, None)
    assert (asked.by, ended) == ("SIGTERM", [])
    clock[0] = 1.1
    asked.handle(signal.SIGINT, None)
    assert ended == [1]


@pytest.mark.dist
def test_a_second_signal_leaves_without_saving(tmp_path):
    plain = loop.Loop._advance

    def advance(self, fed):
        if self.step == 3:
            signals.ECHO_SECONDS = 0.0
            send("SIGTERM")
            time.sleep(0.01)
            send("SIGTERM")
        return plain(self, fed)

    def before():
        loop.Loop._advance = advance

    assert run(1, flags(tmp_path, 1), tmp_path / "log", before) == [1]
    assert status(tmp_path / "a")["state"] == "running"
    names = sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == ["step_00000002"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_one_rank_makes_both_save_the_same_step(tmp_path, workers):
    plain = loop.Loop._advance

    def advance(self, fed):
        if self.step == 4 and self.run_.place.rank == 1:
            send("SIGUSR1")
        return plain(self, fed)

    def before():
        loop.Loop._advance = advance

    words = flags(tmp_path, 2, workers=workers)
    assert run(2, words, tmp_path / "log", before) == [75, 75]
    assert (status(tmp_path / "a")["state"], status(tmp_path / "a")["step"]) == ("preempted", 5)
    words = flags(tmp_path, 2, workers=workers, resume="latest")
    assert run(2, words, tmp_path / "log") == [0, 0]
    same_as_undisturbed(tmp_path / "a", 2)


@pytest.mark.dist
def test_a_signal_to_the_whole_group_spares_the_loader_processes(tmp_path):
    """Sent from outside, as by Ctrl-C: the rank waits for it in its third step, then needs data."""
    plain = loop.Loop._advance
    here, sent = tmp_path / "here", tmp_path / "sent"

    def advance(self, fed):
        if self.step == 2:
            here.touch()
            while not sent.exists():
                time.sleep(0.01)
            self.run_.asked.by = None  # as if it were asked only later: the data must go on
        return plain(self, fed)

    def before():
        loop.Loop._advance = advance

    words = flags(tmp_path, 1, workers=2)
    ids = start(1, lambda: before() or main(words), log=tmp_path / "log")
    while not here.exists():
        time.sleep(0.01)
    os.killpg(ids[0], signal.SIGTERM)
    time.sleep(0.3)
    sent.touch()
    assert wait(ids) == [0], (tmp_path / "log").read_text()[-2000:]
    same_as_undisturbed(tmp_path / "a", 1)


def test_a_run_of_the_streaming_loader_says_that_it_cannot_go_on(tmp_path, monkeypatch):
    sending(monkeypatch, loop.Loop, "_advance", "SIGTERM", at=2)
    words = settings(tmp_path, loader="sequential", audit=None)
    ran = train(tmp_path, **words)
    assert ran.code == 1
    found = status(ran.folder)
    assert (found["state"], found["retryable"]) == ("failed", False)
    assert "--loader sequential cannot go on" in found["reason"]
    again = train(tmp_path, name=None, resume=ran.folder / "checkpoints" / "step_00000003")
    assert again.code == 2
    assert "is of --loader sequential, which has no place to go on from" in again.err


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.dist
def test_a_rank_whose_launcher_is_gone_saves_and_ends(tmp_path):
    """A launcher starts a rank and is killed; the rank gets SIGTERM by its death."""
    plain = loop.Loop._advance
    launcher = tmp_path / "launcher"

    def advance(self, fed):
        if self.step == 2:
            os.kill(int(launcher.read_text()), signal.SIGKILL)
            time.sleep(0.2)
        return plain(self, fed)

    def before():
        os.environ["TORCHELASTIC_RUN_ID"] = "x"
        loop.Loop._advance = advance

    def launch() -> int:
        launcher.write_text(str(os.getpid()))
        rank = start(1, lambda: before() or main(flags(tmp_path, 1)), log=tmp_path / "log")
        return wait(rank)[0]

    assert wait(start(1, launch)) == [-signal.SIGKILL]
    end = time.monotonic() + 30
    while time.monotonic() < end and status(tmp_path / "a")["state"] == "running":
        time.sleep(0.05)
    found = status(tmp_path / "a")
    assert (found["state"], found["reason"]) == ("preempted", "SIGTERM: saved")


@pytest.mark.slow
@pytest.mark.dist
def test_a_hung_run_tells_where_it_hangs_and_ends(tmp_path):
    plain = loop.Loop._advance

    def hang_here(self, fed):
        while self.step == 3:
            time.sleep(0.1)
        return plain(self, fed)

    def before():
        loop.Loop._advance = hang_here

    words = flags(tmp_path, 1, watchdog_minutes=0.05)
    assert run(1, words, tmp_path / "log", before) == [1]
    found = status(tmp_path / "a")
    assert found.pop("time")
    assert found == {"state": "failed", "reason": "hang", "retryable": True, "step": 3}
    assert "hang_here" in (tmp_path / "a" / "stacks-rank0.txt").read_text()
    assert "hang_here" in (tmp_path / "log").read_text()
    assert run(1, flags(tmp_path, 1, resume="latest"), tmp_path / "log") == [0]
    same_as_undisturbed(tmp_path / "a", 1)


def test_patience_is_ten_usual_steps_but_no_less_than_asked_for(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("training.watchdog.time.monotonic", lambda: clock[0])
    dog = Watchdog(tmp_path, 0, minutes=1)
    assert dog.limit() == 60
    for step in range(1, 4):
        clock[0] += 20.0
        dog.tick(step)
    assert dog.limit() == 200
    off = Watchdog(tmp_path, 0, minutes=0)
    off.start()
    assert off._thread is None


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_slower_than_the_watchdogs_patience_is_waited_for(tmp_path, ranks):
    plain = loop.save_checkpoint

    def slow(*args, **kwargs):
        time.sleep(2.5)
        return plain(*args, **kwargs)

    def before():
        loop.save_checkpoint = slow

    words = flags(tmp_path, ranks, watchdog_minutes=1.0 / 60, save_every=4)
    assert run(ranks, words, tmp_path / "log", before) == [0] * ranks
    assert status(tmp_path / "a")["state"] == "finished"
    assert not list((tmp_path / "a").glob("stacks-*"))
    same_as_undisturbed(tmp_path / "a", ranks)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("how", "code"), [("fails", 1), ("finishes", 0), ("is asked", 75)])
def test_a_process_group_that_does_not_let_go_is_left_by_the_watchdog(tmp_path, how, code):
    """As NCCL may, behind an error: the status stays what it was, and the rank ends."""
    plain = loop.Loop._advance

    def advance(self, fed):
        if self.step == 3 and how == "fails":
            raise MemoryError("on every rank")
        if self.step == 3 and how == "is asked":
            send("SIGTERM")
        return plain(self, fed)

    def never() -> None:
        while True:
            time.sleep(0.1)

    def before():
        loop.Loop._advance = advance
        distributed.dist.destroy_process_group = never

    words = flags(tmp_path, 2, watchdog_minutes=1.0 / 60)
    assert run(2, words, tmp_path / "log", before) == [code] * 2
    found = status(tmp_path / "a")
    state = {"fails": "failed", "finishes": "finished", "is asked": "preempted"}[how]
    assert found["state"] == state
    assert found["reason"] != "hang"
    assert "in never" in (tmp_path / "a" / "stacks-rank0.txt").read_text()


ALL = os.environ.get("LAZYCLIP_TEST_FAULTS") == "1"


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.skipif(not ALL, reason="three starts of torchrun: make test-faults")
def test_under_torchrun_each_signal_saves_and_the_next_start_goes_on(tmp_path):
    """SIGTERM; SIGUSR1, which torchrun must be told to pass on; SIGKILL of torchrun itself."""
    words = flags(
        tmp_path, 2, epochs=500, resume="latest", save_every=10_000, model="LaSt-ViT-nano"
    )
    base = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    passing = ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]
    metrics, done = tmp_path / "a" / "metrics.jsonl", 0
    for number, more in ((signal.SIGTERM, []), (signal.SIGUSR1, passing), (signal.SIGKILL, [])):
        command = [*base, *more, "-m", "--", "training.main", *words]
        with (tmp_path / "log").open("a") as log:
            started = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while not metrics.exists() or len(metrics.read_text().splitlines()) < done + 4:
            assert started.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        started.send_signal(number)
        started.wait()
        end = time.monotonic() + 30
        while time.monotonic() < end and status(tmp_path / "a")["state"] != "preempted":
            time.sleep(0.1)
        found = status(tmp_path / "a")
        assert found["state"] == "preempted"
        assert found["step"] > done
        done = found["step"]
    assert sorted(read_audit(tmp_path / "a")) == list(range(1, done + 1))


def test_the_watchdog_does_not_watch_while_it_is_paused(tmp_path, monkeypatch):
    ended = []
    dog = Watchdog(tmp_path, 0, minutes=0.05 / 60, check_seconds=0.01)
    monkeypatch.setattr(dog, "_end", lambda waited: ended.append(waited) or dog._over.set())
    dog.start()
    with dog.paused():
        dog._over.wait(0.3)
    assert ended == []
    dog._over.wait(2.0)
    assert len(ended) == 1
    dog.stop()
