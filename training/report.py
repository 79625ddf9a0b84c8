"""The log line of a run, metrics.jsonl and TensorBoard's curves; rank 0's alone.

Not here: what is measured (`loop`).
"""

import contextlib
import dataclasses
import errno
import logging
import math
from collections.abc import Iterator
from typing import Protocol

from lazyclip.base.logs import MetricsWriter

from .preflight import Plan

log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Curves(Protocol):
    """What TensorBoard's writer offers, as far as it is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """File one value of a curve."""

    def close(self) -> None:
        """Write what is still held back."""


@dataclasses.dataclass
class Window:
    """What happened since the last log line, on this rank."""

    start: float
    steps: int = 0
    waited: float = 0.0


@dataclasses.dataclass(frozen=True)
class Point:
    """A step as it is reported.

    Fields: step; loss, mean over the ranks; lr; scale, factor on the cosines; seconds since the
    last report; bad samples and samples read, of all ranks and since the run's beginning; skipped,
    steps that were not finite.
    """

    step: int
    loss: float
    lr: float
    scale: float
    seconds: float
    bad: int
    read: int
    skipped: int


@contextlib.contextmanager
def bearing_a_full_disk(what: str) -> Iterator[None]:
    """Let a write fail for want of room; it is said, and the run goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        log.warning("%s not written: %s; make room, the run goes on", what, error.strerror)


class Reporter:
    """Says and files what a run measures."""

    def __init__(
        self, plan: Plan, world: int, metrics: MetricsWriter | None, curves: Curves | None,
        losses: list[float],
    ) -> None:  # fmt: skip
        """Begin; `losses` are those that were logged before, where the run goes on."""
        self._plan, self._world = plan, world
        self._metrics, self._curves, self._losses = metrics, curves, losses

    def step(self, point: Point, window: Window) -> None:
        """Write a step's log line, and its numbers to the files."""
        plan = self._plan
        seconds = max(point.seconds, 1e-9)
        rate = window.steps * plan.global_batch / seconds
        samples = point.step * plan.global_batch
        if math.isfinite(point.loss):
            self._losses.append(point.loss)
        average = sum(self._losses) / len(self._losses) if self._losses else math.nan
        epoch, into = divmod(samples - 1, plan.samples_per_epoch)
        log.info(
            "Train Epoch: %d [%d/%d (%.0f%%)] Data (t): %.3f Batch (t): %.3f, %.6g/s, %.6g/s/gpu "
            "LR: %.6f Logit Scale: %.3f Contrastive_loss: %.4f (%.4f) | wait %.0f%% | dropped %d "
            "(%.4f%%)",
            epoch, into + 1, plan.samples_per_epoch, 100 * (into + 1) / plan.samples_per_epoch,
            window.waited / window.steps, seconds / window.steps, rate, rate / self._world,
            point.lr, point.scale, point.loss, average, 100 * window.waited / seconds,
            point.bad, 100 * point.bad / max(point.read, 1),
        )  # fmt: skip
        values = {
            "train/loss": point.loss, "lr": point.lr, "logit_scale": point.scale,
            "samples_per_s": rate, "data_wait": window.waited / seconds, "dropped": point.bad,
        }  # fmt: skip
        if point.skipped:
            values["skipped"] = point.skipped
        self.file(point.step, values)

    def file(self, step: int, values: dict[str, float]) -> None:
        """Write values of a step to metrics.jsonl and TensorBoard."""
        with bearing_a_full_disk("metrics"):
            if self._metrics:
                samples = step * self._plan.global_batch
                self._metrics.write({"step": step, "samples": samples, **values})
            if self._curves:
                for name, value in values.items():
                    self._curves.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files; what TensorBoard holds back is written."""
        with bearing_a_full_disk("metrics"):
            for writer in (self._metrics, self._curves):
                if writer is not None:
                    writer.close()
