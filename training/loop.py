"""The training loop: one optimiser step, the log line, when to save and to probe.

Not here: what is built (`main`), what is written (`state`).
"""

import contextlib
import dataclasses
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lazyclip.base.errors import UserError
from lazyclip.base.logs import MetricsWriter
from lazyclip.factory import ModelInfo

from .data.batches import Batch
from .data.samples import Dropped
from .distributed import Place, counted, total
from .objectives import contrastive_loss
from .optim import learning_rate
from .params import TrainArgs
from .preflight import Plan
from .probe import Probe
from .state import Progressed, save_checkpoint, write_status

log = logging.getLogger(__name__)
MAX_LOGIT_SCALE = math.log(100)
# The share of unusable records is judged from so many records on.
JUDGE_FROM = 1000
NAMED = 20


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
class Run:
    """What the loop works on; `folder`, `metrics` and `curves` are rank 0's, else None."""

    args: TrainArgs
    plan: Plan
    place: Place
    precision: str
    model: nn.Module
    wrapped: nn.Module
    info: ModelInfo
    optimizer: torch.optim.Optimizer
    batches: Iterator[Batch]
    probe: Probe | None
    record: dict[str, Any]
    folder: Path | None
    metrics: MetricsWriter | None
    curves: Curves | None


class Loop:
    """Trains a `Run` from step 0 to its end."""

    def __init__(self, run: Run) -> None:
        """Start counting at zero."""
        self.run_ = run
        self.step = 0
        self.dropped: Counter[str] = Counter()
        self.dropped_everywhere = 0
        self.top1: list[tuple[int, float]] = []
        self._losses: list[float] = []

    # --- one step --------------------------------------------------------------------------------

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        on = self.run_.precision == "amp_bf16"
        return torch.autocast(self.run_.place.device.type, torch.bfloat16, enabled=on)

    def _optimise(self, batch: Batch) -> Tensor:
        """Take one step; returns this rank's loss, detached."""
        run, args = self.run_, self.run_.args
        rate = learning_rate(self.step, steps=run.plan.steps, warmup=run.plan.warmup, peak=args.lr)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        device = run.place.device
        images = batch.images.to(device, non_blocking=True)
        texts = batch.texts.to(device, non_blocking=True)
        run.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            out = run.wrapped(images, texts)
        loss = contrastive_loss(out["image_features"], out["text_features"], out["logit_scale"])
        loss.backward()
        if args.grad_clip_norm:
            nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip_norm)
        run.optimizer.step()
        with torch.no_grad():
            # As in CLIP's own training: a temperature below 0.01 is not stable.
            run.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)  # type: ignore[operator]
        return loss.detach()

    def _next_batch(self, window: Window) -> Batch:
        """Wait for the next batch with pictures; records that gave none are counted and named."""
        began = time.perf_counter()
        batch = next(self.run_.batches)
        window.waited += time.perf_counter() - began
        for record in batch.dropped:
            self._drop(record)
        if not len(batch.images):
            raise UserError(
                f"no usable sample among {len(batch.dropped)} records in a row: "
                f"{self._reasons()}; check the shards of --train-data"
            )
        return batch

    def _drop(self, record: Dropped) -> None:
        self.dropped[record.reason] += 1
        number = self.dropped.total()
        if number <= NAMED:
            why = f"{record.reason}: {record.detail}" if record.detail else record.reason
            log.warning("dropped %s: %s", record.label, why)
        if number == NAMED:
            log.warning("further dropped samples are counted, not named")
        seen = number + (self.step + 1) * self.run_.args.batch_size
        most = self.run_.args.max_bad_fraction
        if seen >= JUDGE_FROM and number > most * seen:
            raise UserError(
                f"{number} of {seen} samples were unusable ({self._reasons()}), more than "
                f"--max-bad-fraction {most:g}; mend the shards or raise it"
            )

    def _reasons(self) -> str:
        return ", ".join(f"{n} {reason}" for reason, n in self.dropped.most_common())

    # --- lines -----------------------------------------------------------------------------------

    def _report(self, loss: Tensor, window: Window) -> None:
        """Write the last step's log line, and its numbers to metrics.jsonl and TensorBoard."""
        run, plan = self.run_, self.run_.plan
        numbers = torch.tensor(
            [float(loss), float(self.dropped.total())], dtype=torch.float64, device=run.place.device
        )
        summed = total(numbers, run.place).tolist()
        mean_loss, self.dropped_everywhere = summed[0] / run.place.world, int(summed[1])
        if not math.isfinite(mean_loss):
            raise RuntimeError(
                f"the loss at step {self.step} is {mean_loss}; nothing is saved; lower --lr, pass "
                "--grad-clip-norm 1.0, or use --precision fp32"
            )
        if not run.place.first:
            return
        now = time.perf_counter()
        seconds = max(now - window.start, 1e-9)
        rate = window.steps * plan.global_batch / seconds
        samples = self.step * plan.global_batch
        self._losses.append(mean_loss)
        average = sum(self._losses) / len(self._losses)
        scale = float(run.model.logit_scale.detach().exp())  # type: ignore[operator]
        lr = float(run.optimizer.param_groups[0]["lr"])
        epoch, into = divmod(samples - 1, plan.samples_per_epoch)
        read = samples + self.dropped_everywhere
        log.info(
            "Train Epoch: %d [%d/%d (%.0f%%)] Data (t): %.3f Batch (t): %.3f, %.6g/s, %.6g/s/gpu "
            "LR: %.6f Logit Scale: %.3f Contrastive_loss: %.4f (%.4f) | wait %.0f%% | dropped %d "
            "(%.4f%%)",
            epoch, into + 1, plan.samples_per_epoch, 100 * (into + 1) / plan.samples_per_epoch,
            window.waited / window.steps, seconds / window.steps, rate, rate / run.place.world,
            lr, scale, mean_loss, average, 100 * window.waited / seconds,
            self.dropped_everywhere, 100 * self.dropped_everywhere / read,
        )  # fmt: skip
        self._file(
            {
                "train/loss": mean_loss, "lr": lr, "logit_scale": scale, "samples_per_s": rate,
                "data_wait": window.waited / seconds, "dropped": self.dropped_everywhere,
            }
        )  # fmt: skip

    def _file(self, values: dict[str, float]) -> None:
        run = self.run_
        samples = self.step * run.plan.global_batch
        if run.metrics:
            run.metrics.write({"step": self.step, "samples": samples, **values})
        if run.curves:
            for name, value in values.items():
                run.curves.add_scalar(name, value, self.step)

    def _measure(self) -> None:
        run = self.run_
        if run.probe is None:
            return
        top1 = run.probe.top1(run.model)
        self.top1.append((self.step, top1))
        if run.place.first:
            log.info(
                "Zero-shot step %d: top1 %.1f %% (chance %.1f %%)",
                self.step, 100 * top1, 100 * run.probe.chance,
            )  # fmt: skip
            self._file({"probe/top1": top1})

    def _save(self) -> None:
        run = self.run_
        # The loss was finite before this step; a gradient that was not shows in the weights alone.
        finite = torch.stack([p.detach().isfinite().all() for p in run.model.parameters()])
        if not bool(finite.all()):
            raise RuntimeError(
                f"step {self.step} left weights that are not finite; nothing is saved; lower --lr, "
                "pass --grad-clip-norm 1.0, or use --precision fp32"
            )
        done = Progressed(self.step, self.step * run.plan.global_batch, self.dropped_everywhere)
        if run.folder is not None:
            folder = save_checkpoint(
                run.folder, done, run.model, run.info, run.optimizer, run.record
            )
            write_status(run.folder, "running", self.step)
            log.info("saved %s", folder.name)

    def close(self) -> None:
        """Close the run's files; what TensorBoard holds back is written."""
        for writer in (self.run_.metrics, self.run_.curves):
            if writer is not None:
                writer.close()

    # --- the run ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end of the plan; the last step is logged, saved and probed.

        Afterwards `dropped` counts all ranks' records.

        Raises:
            UserError: too many unusable samples.
            RuntimeError: a loss or weights that are not finite.
        """
        run, plan, args = self.run_, self.run_.plan, self.run_.args
        self._measure()
        run.wrapped.train()
        bar_on = run.place.first and sys.stderr.isatty()
        with (
            logging_redirect_tqdm(),
            tqdm(total=plan.steps, disable=not bar_on, unit="step") as bar,
        ):
            window = Window(time.perf_counter())
            while self.step < plan.steps:
                loss = self._optimise(self._next_batch(window))
                self.step += 1
                window.steps += 1
                bar.update()
                last = self.step == plan.steps
                paused = False
                save = last or self.step % plan.save_every == 0
                if last or save or self.step == 1 or self.step % args.log_every_n_steps == 0:
                    self._report(loss, window)
                    window = Window(time.perf_counter())
                if save:
                    self._save()
                    paused = True
                if run.probe and (last or self.step % plan.probe_every == 0):
                    self._measure()
                    paused = True
                if paused:
                    window = Window(time.perf_counter())
        self.dropped = counted(self.dropped, run.place)
