"""Trainings on toy shards, small enough for tests. Not here: expected values."""

import contextlib
import functools
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tests.toy_models  # noqa: F401  registers TINY
from tests.toy import caption_shards
from training.main import main

# Where the model does not matter: a tenth of LaSt-ViT-nano.
TINY = "LaSt-Toy-ViT"
CLASSES = ("red", "blue", "green")
PER_SHARD = 8
_KEPT: list[tempfile.TemporaryDirectory] = []


class Ran(NamedTuple):
    """How a training ended: exit code, what it printed, its folder."""

    code: int
    out: str
    err: str
    folder: Path


def small(**changes: object) -> list[str]:
    """Flags of a training on the CPU with LaSt-ViT-nano; a value None leaves a flag out.

    True stands for a flag without a value; underscores in names stand for dashes.
    """
    plain: dict[str, object] = {
        "model": "LaSt-ViT-nano", "batch_size": 8, "epochs": 1, "workers": 0, "threads": 1,
        "device": "cpu", "report_to": "none", "log_every_n_steps": 1, "warmup": 1,
    }  # fmt: skip
    words: list[str] = []
    for name, value in {**plain, **changes}.items():
        flag = "--" + name.replace("_", "-")
        if value is not None:
            words += [flag] if value is True else [flag, str(value)]
    return words


@contextlib.contextmanager
def _logging_put_back() -> Iterator[None]:
    """Take an entry point's log handlers away again; else its out.log would go on growing."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
            handler.close()
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(level)
        logging.captureWarnings(False)


def train(logs: Path, name: str = "a", **changes: object) -> Ran:
    """Run `training.main` in this process; exceptions that it does not answer come through."""
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with _logging_put_back(), streams[0], streams[1]:
        try:
            code = main(small(logs=logs, name=name, **changes))
        except SystemExit as ended:
            code = int(ended.code)
    return Ran(code, out.getvalue(), err.getvalue(), logs / (name or "a"))


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The loss of each logged step."""
    return [line["train/loss"] for line in metrics(folder) if "train/loss" in line]


@functools.cache
def world() -> str:
    """Four shards of eight captioned boxes of three colours, as a pattern."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="toy-run-"))
    return caption_shards(Path(_KEPT[-1].name), shards=4, per_shard=PER_SHARD, classes=CLASSES)


@functools.cache
def finished() -> Ran:
    """One training that several tests look at: 7 steps, saved at 4, probed at 0, 4 and 7."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="toy-run-"))
    return train(
        Path(_KEPT[-1].name) / "logs", train_data=world(), train_num_samples=28, epochs=2,
        save_every=4, probe_every=4, log_every_n_steps=3, val_data=world(), val_num_samples=30,
        classes=",".join(CLASSES), templates="plain", report_to="auto", lr=1e-3, seed=3,
        grad_clip_norm=1.0,
    )  # fmt: skip
