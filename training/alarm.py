"""The alarm on the zero-shot score: what the start model knew, and how far a run has fallen.

Two figures are kept beside each score. `start`: the start model's top-1 with the pooling its
weights were trained with; swapping a CLS token for LaSt pooling lowers the score before any step is
taken, so step 0 of a fine-tune does not say what the model knew. `best`: the run's own best so far,
step 0 included; a fall is measured from it, since a fine-tune that begins below `start` may rise
for long and then collapse without ever being below its step 0. All of it, the last score too,
travels with the checkpoints, so that a run that fell too far is no further when it is started
again. Not here: the score (`probe`).
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lazyclip.base.errors import UserError
from lazyclip.pooling import PoolSpec
from lazyclip.tower import attach_spec, pooling_of

from .probe import Probe

log = logging.getLogger(__name__)
# Share of the images by which a score may fall before it is said, where no limit is set.
WARN_AT = 0.05


def data_hash(probe: Probe) -> str:
    """Hash what makes two scores comparable: shards by name, classes, prompts, number of images."""
    val = probe.val
    parts = [[p.name for p in val.shards], val.classes.sha256, val.templates, probe.limit]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _scored(pair: Sequence[Any] | None) -> tuple[int, float] | None:
    return None if pair is None else (int(pair[0]), float(pair[1]))


def points(share: float) -> str:
    """Write a share of images as percentage points."""
    return f"{100 * share:.1f}"


class Alarm:
    """Scores a run's model, and tells when it has fallen too far."""

    def __init__(self, probe: Probe, most: float | None, own: PoolSpec | None) -> None:
        """Begin without a score.

        Args:
            probe: scores the model.
            most: fall of top-1 below the run's best, a share of the images, that ends the run;
                None: a fall of `WARN_AT` is only said.
            own: pooling of the start weights, see `weights.trained_pooling`.
        """
        self.probe, self.most, self.own = probe, most, own
        self.start: float | None = None
        self.best: tuple[int, float] | None = None
        self.last: tuple[int, float] | None = None
        self.images = 0
        self.fallen: str | None = None

    def state(self) -> dict[str, Any]:
        """Return what a run that goes on must know, as plain values."""
        return {
            "data": data_hash(self.probe), "start": self.start, "best": self.best,
            "last": self.last, "images": self.images,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take over a checkpoint's figures, where they are of the same images and classes.

        Its last score is judged again, by this run's limit.
        """
        if not state:
            return
        if state["data"] != data_hash(self.probe):
            log.warning("other --val-data, --classes or prompts than before: falls count from here")
            return
        self.start = state["start"]
        self.best, last = _scored(state["best"]), _scored(state.get("last"))
        if last is not None:
            self.images = int(state["images"])
            self._judge(*last)

    def measure(self, step: int, model: nn.Module) -> dict[str, float]:
        """Score the model after a step; every rank calls, and finds the same.

        Returns:
            Values for metrics.jsonl: `probe/top1`; `probe/top1_drop`, how far it lies below the
            best; at step 0 of a run with weights `probe/top1_start`.
        """
        top1 = self.probe.top1(model)
        values = {"probe/top1": top1}
        if step == 0 and self.own is not None:
            same = self.own.alike(pooling_of(model))
            self.start = values["probe/top1_start"] = top1 if same else self._as(model, self.own)
        if self.best is None or top1 >= self.best[1]:
            self.best = (step, top1)
        values["probe/top1_drop"] = self.best[1] - top1
        if self.probe.place.first:
            known = "" if self.start is None else f"; start model {points(self.start)} %"
            log.info(
                "Zero-shot step %d: top1 %.1f %% (chance %.1f %%%s)",
                step, 100 * top1, 100 * self.probe.chance, known,
            )  # fmt: skip
        self.images = self.probe.images
        self._judge(step, top1)
        return values

    def _as(self, model: nn.Module, own: PoolSpec) -> float:
        """Score the model with its start weights' own pooling; the run's is put back."""
        used = pooling_of(model)
        attach_spec(model, own)
        try:
            return self.probe.top1(model)
        finally:
            attach_spec(model, used)

    def _judge(self, step: int, top1: float) -> None:
        """Say a fall; one beyond the limit is kept in `fallen`, which ends the run."""
        self.last = (step, top1)
        if self.best is None:
            return
        at, best = self.best
        limit = WARN_AT if self.most is None else self.most
        self.fallen = None
        if best - top1 <= limit + 1e-9:  # less than any one image
            return
        error = (2 * best * (1 - best) / max(self.images, 1)) ** 0.5
        text = (
            f"zero-shot top-1 fell by {points(best - top1)} points to {points(top1)} % at step "
            f"{step}, from {points(best)} % at step {at} (standard error {points(error)} points, "
            f"{self.images} images)"
        )
        if self.probe.place.first:
            log.warning("%s; more than %s points", text, points(limit))
        if self.most is not None:
            self.fallen = (
                f"{text}; more than --max-top1-drop {self.most:g}; its checkpoint is kept; start "
                "anew from an older checkpoint with a lower --lr (--pretrained "
                ".../checkpoints/step_N --model MODEL --name NEW), or go on with --resume latest "
                "and a higher --max-top1-drop"
            )

    def refuse_fall(self) -> None:
        """Raise `UserError` where the last score lies too far below the best."""
        if self.fallen is not None:
            raise UserError(self.fallen)

    def say_end(self) -> None:
        """Warn where a run ends far below what its start model scored with its own pooling."""
        if self.start is None or self.last is None or self.start - self.last[1] <= WARN_AT:
            return
        top1 = self.last[1]
        log.warning(
            "the run ends at %s %% zero-shot top-1, %s points below the %s %% of its start model "
            "with the start model's own pooling; eval.interpolate shows what a mixture keeps",
            points(top1), points(self.start - top1), points(self.start),
        )  # fmt: skip
