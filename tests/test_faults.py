"""Runs killed at any moment and started again train on what an undisturbed run trains on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.toy import caption_sample, write_shard
from tests.toy_faults import (
    CROSSINGS,
    STEPS,
    flags,
    kill_in_save,
    kill_in_step,
    run,
    same_as_undisturbed,
    undisturbed,
)
from tests.toy_ranks import kill, start, wait
from tests.toy_run import CLASSES
from training import loop
from training.audit import read_audit
from training.main import main
from training.state import weights_hash

pytestmark = [
    pytest.mark.dist, pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]  # fmt: skip
ALL = os.environ.get("LAZYCLIP_TEST_FAULTS") == "1"
KILLED = -signal.SIGKILL
ROOT = Path(__file__).resolve().parents[1]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def resume(tmp_path: Path, ranks: int, **changes: object) -> None:
    codes = run(ranks, flags(tmp_path, ranks, resume="latest", **changes), tmp_path / "log")
    assert codes == [0] * ranks, (tmp_path / "log").read_text()[-3000:]
    assert status(tmp_path / "a")["state"] == "finished"


@pytest.mark.parametrize(("ranks", "workers", "step"), [(1, 0, 3), (1, 2, 5), (2, 0, 5), (2, 2, 3)])
def test_a_group_killed_in_a_step_goes_on_with_the_same_samples_and_losses(
    tmp_path, ranks, workers, step
):
    words = flags(tmp_path, ranks, workers=workers)
    codes = run(ranks, words, tmp_path / "log", kill_in_step(step, rank=ranks - 1))
    assert KILLED in codes
    assert status(tmp_path / "a")["state"] == "running"  # a dead run still says so
    resume(tmp_path, ranks, workers=workers)
    same_as_undisturbed(tmp_path / "a", ranks)


@pytest.mark.parametrize("crossing", [1, 5, 9, 12, 19])
def test_a_group_killed_inside_a_save_goes_on_with_the_same_samples_and_losses(tmp_path, crossing):
    codes = run(1, flags(tmp_path, 1), tmp_path / "log", kill_in_save(crossing))
    assert codes == [KILLED]
    resume(tmp_path, 1)
    same_as_undisturbed(tmp_path / "a", 1)
    assert not list((tmp_path / "a" / "checkpoints").glob("*.part"))


@pytest.mark.skipif(not ALL, reason="fifty kills take minutes: make test-faults")
@pytest.mark.parametrize("point", range(50))
def test_fifty_points_over_steps_saves_and_time(tmp_path, point):
    """A kill or two at places drawn by the point's number, ranks and workers by turns."""
    draw = random.Random(f"point {point}")
    ranks, workers = 1 + point % 2, 2 * (point // 2 % 2)
    log = tmp_path / "log"
    for again in range(draw.randint(1, 2)):
        words = flags(tmp_path, ranks, workers=workers, resume="latest" if again else None)
        kind = ("save", "step", "time")[(point + again) % 3]
        if kind == "time":
            ids = start(ranks, main, words, log=log)
            time.sleep(draw.uniform(0.2, 4.0))
            kill(ids)
            wait(ids)
        elif kind == "save":
            run(ranks, words, log, kill_in_save(draw.randint(1, 4 * CROSSINGS)))
        else:
            run(ranks, words, log, kill_in_step(draw.randrange(STEPS), draw.randrange(ranks)))
        if (tmp_path / "a" / "status.json").exists() and status(tmp_path / "a")[
            "state"
        ] == "finished":
            break
    resume(tmp_path, ranks, workers=workers)
    same_as_undisturbed(tmp_path / "a", ranks)


def test_two_ranks_see_the_samples_that_one_sees():
    same_as_undisturbed(undisturbed(2), 1, bits=False)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4)])
def test_another_number_of_ranks_goes_on_with_the_same_global_batches(tmp_path, before, after):
    run(before, flags(tmp_path, before), tmp_path / "log", kill_in_step(5))
    words = flags(tmp_path, 1, resume="latest", batch_size=None, workers=2)
    assert run(after, words, tmp_path / "log") == [0] * after, (tmp_path / "log").read_text()
    same_as_undisturbed(tmp_path / "a", 1, bits=False)
    said = (tmp_path / "log").read_text()
    assert f"({8 // after} per rank x {after})" in said


def test_a_number_of_ranks_that_does_not_divide_is_told_by_every_rank(tmp_path):
    run(1, flags(tmp_path, 1), tmp_path / "first", kill_in_step(5))
    words = flags(tmp_path, 1, resume="latest", batch_size=None)
    assert run(3, words, tmp_path / "log") == [2] * 3
    said = (tmp_path / "log").read_text()
    for rank in range(3):
        assert f"[rank {rank}] error: the run's global batch of 8 cannot be shared by 3" in said


def test_when_one_rank_is_killed_the_other_ends_and_says_that_it_can_go_on(tmp_path):
    plain = loop.Loop._advance

    def advance(self, fed):
        if self.step == 3 and self.run_.place.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, fed)

    def before():
        loop.Loop._advance = advance

    codes = run(2, flags(tmp_path, 2), tmp_path / "log", before)
    assert codes == [1, KILLED]
    found = status(tmp_path / "a")
    assert (found["state"], found["retryable"], found["step"]) == ("failed", True, 3)
    resume(tmp_path, 2)
    same_as_undisturbed(tmp_path / "a", 2)


def test_when_one_rank_stops_the_watchdog_of_the_other_ends_it(tmp_path):
    plain = loop.Loop._advance

    def advance(self, fed):
        if self.step == 3 and self.run_.place.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return plain(self, fed)

    def before():
        loop.Loop._advance = advance

    ids = start(
        2,
        lambda: before() or main(flags(tmp_path, 2, watchdog_minutes=0.05)),
        log=tmp_path / "log",
    )
    assert wait(ids[:1]) == [1]
    kill(ids)
    wait(ids[1:])
    found = status(tmp_path / "a")
    assert (found["state"], found["reason"], found["retryable"]) == ("failed", "hang", True)
    stacks = (tmp_path / "a" / "stacks-rank0.txt").read_text()
    assert "step.py" in stacks or "distributed.py" in stacks
    resume(tmp_path, 2)
    same_as_undisturbed(tmp_path / "a", 2)


def test_loader_processes_end_with_their_rank(tmp_path):
    """Their rank alone is killed; they sit in process groups of their own.

    DataLoader's processes look for their parent every five seconds: these are gone before that.
    """
    plain = loop.Loop._advance

    def advance(self, fed):
        if self.step == 2:
            (tmp_path / "children").write_text(
                Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
            )
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, fed)

    def before():
        loop.Loop._advance = advance

    assert run(1, flags(tmp_path, 1, workers=2), tmp_path / "log", before) == [KILLED]
    children = [int(word) for word in (tmp_path / "children").read_text().split()]
    assert len(children) == 2
    end = time.monotonic() + 2
    while time.monotonic() < end and any(Path(f"/proc/{child}").exists() for child in children):
        time.sleep(0.05)
    alive = [c for c in children if Path(f"/proc/{c}").exists() and
             "Z" not in Path(f"/proc/{c}/stat").read_text().split(")")[1].split()[0]]  # fmt: skip
    assert not alive


def test_what_one_rank_alone_finds_not_finite_is_skipped_by_both(tmp_path):
    plain, ended = loop.backward, loop.Loop.close

    def backward(towers, fed):
        loss = plain(towers, fed)
        backward.calls += 1
        spoiled = backward.calls == 3 and towers.place.rank == 1
        return loss * float("nan") if spoiled else loss

    def close(self):
        ended(self)
        (tmp_path / f"hash{self.run_.place.rank}").write_text(weights_hash(self.run_.model))

    def before():
        backward.calls = 0
        loop.backward, loop.Loop.close = backward, close

    assert run(2, flags(tmp_path, 2), tmp_path / "log", before) == [0, 0]
    assert json.loads((tmp_path / "a" / "params.json").read_text())["skipped"] == 1
    assert (tmp_path / "hash0").read_text() == (tmp_path / "hash1").read_text()
    told = [json.loads((tmp_path / "a" / f"ledger-rank{r}.jsonl").read_text()) for r in (0, 1)]
    assert [(line["step"], line["event"]) for line in told] == [(3, "not finite")] * 2
    ids = sorted(told[0]["ids"] + told[1]["ids"])
    assert ids == read_audit(tmp_path / "a")[3]["ids"]


def test_too_many_bad_samples_of_one_rank_end_both_with_code_2(tmp_path):
    samples = [caption_sample(i, CLASSES) for i in range(32)]
    samples[5] = {**samples[5], "txt": b" "}
    shard = write_shard(tmp_path / "0.tar", samples)

    def before():
        loop.JUDGE_FROM = 8

    assert run(2, flags(tmp_path, 2, train_data=shard), tmp_path / "log", before) == [2, 2]
    said = (tmp_path / "log").read_text()
    for rank in (0, 1):
        assert f"[rank {rank}] error: 1 of " in said
    found = status(tmp_path / "a")
    assert (found["state"], found["retryable"]) == ("failed", False)
    assert "first ['0.tar:5: empty caption']" in found["reason"]
    ledgers = list((tmp_path / "a").glob("ledger-rank*.jsonl"))
    assert len(ledgers) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_loader_process_ends_the_run_and_says_that_it_can_go_on(tmp_path, ranks):
    """As by the system when memory runs out: one loader process of the last rank."""
    plain = loop.Loop._advance

    def advance(self, fed):
        if self.step == 3 and self.run_.place.rank == ranks - 1:
            me = os.getpid()
            children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
        return plain(self, fed)

    def before():
        loop.Loop._advance = advance

    words = flags(tmp_path, ranks, workers=2)
    assert run(ranks, words, tmp_path / "log", before) == [1] * ranks
    found = status(tmp_path / "a")
    assert (found["state"], found["retryable"]) == ("failed", True)
    said = (tmp_path / "log").read_text()
    assert "is killed by signal: Killed" in said or "exited unexpectedly" in said
    resume(tmp_path, ranks, workers=2)
    same_as_undisturbed(tmp_path / "a", ranks)


@pytest.mark.skipif(not ALL, reason="two starts of torchrun: make test-faults")
@pytest.mark.parametrize("rank", [0, 1])
def test_torchruns_own_restart_goes_on_from_the_last_checkpoint(tmp_path, rank):
    """A rank is killed once; torchrun starts both again, and --resume latest does the rest.

    The ranks of the second round must not look up each other's addresses of the first, which they
    do in the store that torchrun shares with them otherwise.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, threading, time\n"
        "def look():\n"
        "    steps = Path(LOGS, 'a', 'checkpoints')\n"
        "    while not list(steps.glob('step_00000002')):\n"
        "        time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "from pathlib import Path\n"
        f"LOGS = {str(tmp_path)!r}\n"
        f"if os.environ.get('RANK') == '{rank}' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
        ":\n    threading.Thread(target=look, daemon=True).start()\n"
    )
    words = flags(tmp_path, 2, model="LaSt-ViT-nano", resume="latest", epochs=2)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", "--nproc_per_node", "2", "--max-restarts=1", "-m", "--",
        "training.main", *words,
    ]  # fmt: skip
    there = {
        **os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'src'}",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=there, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert status(tmp_path / "a")["state"] == "finished"
    assert "resumed from step_" in done.stderr
    assert read_audit(tmp_path / "a") == read_audit(undisturbed(2))
