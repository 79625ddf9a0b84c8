"""Runs that are killed on purpose, and what an undisturbed one leaves. Not here: the cases."""

import functools
import os
import signal
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from lazyclip.base import checkpoint
from tests.toy_ranks import start, wait
from tests.toy_run import TINY, metrics, small, world
from training import loop
from training.audit import read_audit
from training.main import main

PASSES, PASS_STEPS, BATCH = 2, 4, 8
STEPS = PASSES * PASS_STEPS
# Crossings inside a save at which a run may be killed; one save has about so many.
CROSSINGS = 16
_KEPT: list[tempfile.TemporaryDirectory] = []


def flags(logs: Path, ranks: int, **changes: object) -> list[str]:
    """Flags of a run of two passes over the toy world, saved at every second step."""
    plain: dict[str, object] = {
        "train_data": world(), "model": TINY, "epochs": PASSES, "save_every": 2, "audit": "ids",
        "batch_size": BATCH // ranks, "grad_clip_norm": 1.0, "logs": logs, "name": "a",
    }  # fmt: skip
    return small(**{**plain, **changes})


def run(ranks: int, words: list[str], log: Path, before: Callable[[], None] = lambda: None) -> list:
    """Run the trainer on forked ranks; `before` is called in each of them first."""

    def work() -> int:
        before()
        return main(words)

    return wait(start(ranks, work, log=log))


@functools.cache
def undisturbed(ranks: int) -> Path:
    """The folder of a run that nothing happened to."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="toy-faults-"))
    folder = Path(_KEPT[-1].name)
    codes = run(ranks, flags(folder, ranks), folder / "log")
    if any(codes):
        raise RuntimeError((folder / "log").read_text()[-3000:])
    return folder / "a"


def kill_group() -> None:
    """End this process and its whole group, as a node that fails does."""
    os.killpg(0, signal.SIGKILL)


def kill_in_step(number: int, rank: int = 0) -> Callable[[], None]:
    """Return a hook that kills the group when a rank is about to take a step."""
    plain = loop.Loop._advance

    def advance(self: loop.Loop, fed: object) -> object:
        if self.step == number and self.run_.place.rank == rank:
            kill_group()
        return plain(self, fed)

    def before() -> None:
        loop.Loop._advance = advance

    return before


def kill_in_save(crossing: int) -> Callable[[], None]:
    """Return a hook that kills the group inside a save, at its n-th touch of the disk, from 1."""
    crossed = 0

    def counting(plain: Callable) -> Callable:
        def counted(*args: object, **kwargs: object) -> object:
            nonlocal crossed
            crossed += 1
            if crossed == crossing:
                kill_group()
            return plain(*args, **kwargs)

        return counted

    def before() -> None:
        checkpoint.force_to_disk = counting(checkpoint.force_to_disk)
        checkpoint._hash = counting(checkpoint._hash)
        checkpoint.shutil.rmtree = counting(checkpoint.shutil.rmtree)
        Path.rename = counting(Path.rename)  # type: ignore[method-assign]

    return before


def every_sample() -> list[str]:
    """All samples of the toy world as shard:ordinal, read by tarfile alone."""
    found = []
    for shard in sorted(Path(world()).parent.glob("*.tar")):
        with tarfile.open(shard) as tar:
            keys = dict.fromkeys(member.name.split(".")[0] for member in tar)
        found += [f"{shard.name}:{i}" for i in range(len(keys))]
    return found


def same_as_undisturbed(folder: Path, ranks: int, *, bits: bool = True) -> None:
    """Check samples of every step, and loss and rate bit for bit, against the undisturbed run."""
    there = undisturbed(ranks)
    audit = read_audit(folder)
    assert audit == read_audit(there)
    assert sorted(audit) == list(range(1, STEPS + 1))
    for number in range(PASSES):
        steps = range(number * PASS_STEPS + 1, (number + 1) * PASS_STEPS + 1)
        assert sorted(i for step in steps for i in audit[step]["ids"]) == sorted(every_sample())
    if bits:
        kept = ("step", "samples", "train/loss", "lr", "logit_scale")
        ours, theirs = ([[line[k] for k in kept] for line in metrics(f)] for f in (folder, there))
        assert ours == theirs
