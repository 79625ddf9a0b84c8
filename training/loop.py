"""The training loop: what the ranks agree on at each step, when to save, to probe and to end.

Not here: what is built (`main`), forward and backward (`step`), what is written (`state`).
"""

import contextlib
import dataclasses
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lazyclip.base.checkpoint import NotWholeError, newest_whole
from lazyclip.base.errors import UserError
from lazyclip.base.logs import MetricsWriter
from lazyclip.factory import ModelInfo
from lazyclip.weights import trained_pooling

from .alarm import Alarm
from .audit import Audit
from .distributed import Place, agree, counted, first_alone, from_first, gathered
from .feed import Bad, Fed, Feed, labels, reasons_of
from .ledger import Ledger
from .nonfinite import NotFinite, Skips
from .optim import learning_rate, peaks_of, set_rates
from .params import TrainArgs
from .preflight import Plan
from .probe import Probe
from .report import Curves, Point, Reporter, Window, bearing_a_full_disk
from .resume import Resumed, read_checkpoint, restore
from .runlock import Hold
from .sharded import Sharded, in_one_piece
from .signals import Asked, Preempted
from .state import (
    HasState,
    Progressed,
    random_states,
    restore_random_states,
    save_checkpoint,
    write_status,
)
from .step import Towers, backward, gradient_norm
from .watchdog import Watchdog

log = logging.getLogger(__name__)
MAX_LOGIT_SCALE = math.log(100)
# The share of unusable samples is judged from so many read on.
JUDGE_FROM = 1000
NAMED = 20
# Between looks whether the folder is still this run's; one is a small file read.
LOOK_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works on.

    Fields, beside what their types say: folder, LOGS/NAME on every rank, or None where nothing is
    kept; metrics and curves, rank 0's, else None; facts, what a checkpoint must repeat; before,
    scores and losses of the steps before a resumed one; sharded, where the model lies in shares.
    """

    args: TrainArgs
    plan: Plan
    place: Place
    precision: str
    model: nn.Module
    wrapped: nn.Module
    info: ModelInfo
    optimizer: torch.optim.Optimizer
    feed: Feed
    probe: Probe | None
    record: dict[str, Any]
    folder: Path | None
    metrics: MetricsWriter | None
    curves: Curves | None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resumed: Resumed | None = None
    before: tuple[dict[str, Any], ...] = ()
    asked: Asked = dataclasses.field(default_factory=Asked)
    watchdog: Watchdog | None = None
    hold: Hold = dataclasses.field(default_factory=Hold)
    sharded: Sharded | None = None


class Loop:
    """Trains a `Run` from where it stands to its end."""

    def __init__(self, run: Run) -> None:
        """Start counting at zero, or where the resumed checkpoint stood."""
        self.run_ = run
        self.step = 0
        self.dropped: Counter[str] = Counter()
        self.skips = Skips(run.args.max_nonfinite)
        self.top1 = [(m["step"], m["probe/top1"]) for m in run.before if "probe/top1" in m]
        self.alarm: Alarm | None = None
        if run.probe is not None:
            own = trained_pooling(run.args.model, run.args.pretrained)
            self.alarm = Alarm(run.probe, run.args.max_top1_drop, own)
        self._named = 0
        self._fresh: list[Bad] = []
        self._bad = self._read = 0
        losses = [m["train/loss"] for m in run.before if m.get("train/loss") is not None]
        self.reporter = Reporter(run.plan, run.place.world, run.metrics, run.curves, losses)
        about = (run.info.mean, run.info.std) if run.info else ((), ())
        self.towers = Towers(
            run.model, run.wrapped, run.place, run.precision, run.args.accum_freq, *about
        )
        self._ledger = Ledger(run.folder, run.place.rank) if run.folder else None
        self._audit: Audit | None = None
        if run.args.audit and run.folder:
            self._audit = Audit(run.folder, run.place, run.feed.names, run.args.audit == "ids")
        self._peaks = peaks_of(run.optimizer)  # before a checkpoint's rates take their place
        if run.resumed is not None:
            self._go_on(run.resumed)
        self._saved_at = time.perf_counter()
        self._owed = False  # a checkpoint that fell on a step that was not finite

    def _go_on(self, resumed: Resumed) -> None:
        state, place = resumed.state, self.run_.place
        restore(resumed, self.run_.model, self.run_.optimizer, self.run_.sharded)
        self.step = resumed.step
        self._bad, self._read = int(state["dropped"]), int(state["read"])
        self.skips.restore(state["skips"])
        if self.alarm is not None:
            self.alarm.restore(state.get("alarm"))
        if place.first:  # sums over the ranks stay right
            self.dropped.update(state["reasons"])
        states = state["random"]
        if len(states) == place.world:
            restore_random_states(states[place.rank])

    # --- one step --------------------------------------------------------------------------------

    def _next_batch(self, batches: Iterator[Fed], window: Window) -> Fed:
        """Wait for the next batch; samples that could not be used are counted and named."""
        began = time.perf_counter()
        fed = next(batches)
        window.waited += time.perf_counter() - began
        for bad in fed.bad:
            self._note(bad)
        if self._ledger and fed.bad and self.run_.hold.stands():
            with bearing_a_full_disk("ledger"):
                self._ledger.write({"step": self.step + 1, **bad.line()} for bad in fed.bad)
        if not len(fed.images):
            raise UserError(
                f"no usable sample among {len(fed.bad)} records in a row: "
                f"{reasons_of(self.dropped)}; check the shards of --train-data"
            )
        return fed

    def _note(self, bad: Bad) -> None:
        self.dropped[bad.reason] += 1
        self._named += 1
        if self._named <= NAMED:
            log.warning("dropped %s", bad.phrase())
            self._fresh.append(bad)
        if self._named == NAMED:
            log.warning("further dropped samples are counted, not named")

    def _advance(self, fed: Fed) -> tuple[Tensor, bool, bool]:
        """Take one step, on every rank or on none.

        Returns:
            This rank's loss; whether somebody asked to end; whether a checkpoint is due by time.
        """
        run, args = self.run_, self.run_.args
        set_rates(
            run.optimizer, self._peaks, self.step, steps=run.plan.steps, warmup=run.plan.warmup
        )
        run.optimizer.zero_grad(set_to_none=True)
        loss = backward(self.towers, fed)
        norm = gradient_norm(run.model, args.grad_clip_norm)
        finite = bool((loss.isfinite() & norm.isfinite()).item())
        minutes = args.save_every_minutes
        due = bool(minutes) and time.perf_counter() - self._saved_at >= 60 * (minutes or 0)
        hidden = 0 if fed.masked is None else int(fed.masked.sum())
        asked, broken, saving, bad, read, masked = agree(
            [bool(run.asked), not finite, due and run.place.first, len(fed.bad), fed.read, hidden],
            run.place,
        )
        self._bad, self._read = self._bad + int(bad), self._read + int(read)
        if masked == run.plan.global_batch:
            raise self._unusable("no usable sample in a whole batch")
        if broken:
            self._skip(fed)
        else:
            run.optimizer.step()
            with torch.no_grad():
                # As in CLIP's own training: a temperature below 0.01 is not stable.
                run.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)  # type: ignore[operator]
            self.skips.fine()
        if run.place.first:
            run.hold.keep(LOOK_SECONDS)
        if self._audit is not None and fed.ids is not None:
            with bearing_a_full_disk("audit"):
                self._audit.write(self.step + 1, fed.ids)
        return loss, asked > 0, saving > 0

    def _judge(self) -> None:
        """End the run, on all ranks at once, when too many samples were bad."""
        most = self.run_.args.max_bad_fraction
        if self._read >= JUDGE_FROM and self._bad > most * self._read:
            raise self._unusable(f"more than --max-bad-fraction {most:g}")

    def _unusable(self, what: str) -> UserError:
        """Phrase the end of a run for its bad samples; every rank calls."""
        reasons = counted(self.dropped, self.run_.place)
        first = [bad.phrase() for part in gathered(self._fresh, self.run_.place) for bad in part]
        return UserError(
            f"{self._bad} of {self._read} samples were unusable ({reasons_of(reasons)}), {what}; "
            f"mend the shards or raise --max-bad-fraction; first {first[:3]}, all in "
            "ledger-rank*.jsonl"
        )

    def _skip(self, fed: Fed) -> None:
        """Leave a step out whose loss or gradient is not finite; its data are consumed."""
        number = self.step + 1
        over = self.skips.skip(number)
        log.warning(
            "step %d skipped: its loss or gradient is not finite (%d in all); its samples are in "
            "the ledger", number, self.skips.total,
        )  # fmt: skip
        ids = [] if fed.ids is None else labels(fed.ids, self.run_.feed.names)
        self._tell({"step": number, "event": "not finite", "ids": ids})
        if over:
            self._go_back(number)

    def _go_back(self, number: int) -> None:
        """Put the last checkpoint's weights back; the data go on behind what was not finite."""
        run = self.run_
        allowed = self.skips.go_back()

        def newest() -> str | None:
            found = newest_whole(run.folder / "checkpoints") if run.folder else None
            return None if found is None else str(found)

        found = first_alone(newest, run.place) if allowed else None
        if found is None:
            why = "no checkpoint to go back to" if allowed else "going back did not help"
            raise NotFinite(
                f"{self.skips.most + 1} of the steps up to {number} were not finite, and {why}; "
                "lower --lr, pass --grad-clip-norm 1.0, or use --precision fp32"
            )
        older = read_checkpoint(Path(found))
        restore(older, run.model, run.optimizer, run.sharded)
        log.warning(
            "weights and optimiser of step %d are back; steps %d to %d count for nothing",
            older.step, older.step + 1, number,
        )  # fmt: skip
        self._tell({"step": number, "event": "went back", "to": older.step})

    def _tell(self, line: dict[str, Any]) -> None:
        if self._ledger and self.run_.hold.stands():
            with bearing_a_full_disk("ledger"):
                self._ledger.write([line])

    # --- lines -----------------------------------------------------------------------------------

    def _report(self, loss: Tensor, window: Window) -> None:
        run = self.run_
        mean = agree([float(loss)], run.place)[0] / run.place.world
        if not run.place.first:
            return
        scale = float(run.model.logit_scale.detach().exp())  # type: ignore[operator]
        rate = learning_rate(
            self.step - 1, steps=run.plan.steps, warmup=run.plan.warmup, peak=run.args.lr
        )
        point = Point(
            self.step, mean, rate, scale,
            time.perf_counter() - window.start, self._bad, self._read, self.skips.total,
        )  # fmt: skip
        self.reporter.step(point, window)

    def _measure(self) -> None:
        if self.alarm is None:
            return
        run = self.run_
        # Ranks score shares of several lengths, so the model must compute without the others.
        with in_one_piece(run.sharded, run.model, run.place.device) as model:
            values = self.alarm.measure(self.step, model)
        self.top1.append((self.step, values["probe/top1"]))
        if self.run_.place.first:
            self.reporter.file(self.step, values)

    def _save(self, asked: bool = False) -> str | None:
        """Save a checkpoint; returns why it could not be done, None where it was.

        After a step that was not finite it waits for one that is, so that there is something older
        to go back to; a run that is `asked` to end does not wait.

        A full disk, or one that gives back other bytes than it took, ends no run.
        """
        run = self.run_
        if run.folder is None:
            return None
        self._owed = bool(self.skips.streak) and not asked
        if self._owed:
            log.warning(
                "no checkpoint at step %d: that step was not finite; the next that is gets it",
                self.step,
            )
            return "the last step was not finite"
        done = Progressed(
            self.step, self.step * run.plan.global_batch, self._bad,
            run.feed.samples_per_lane(self.step),
        )  # fmt: skip
        more = {
            **run.facts, "read": self._read, "skips": self.skips.state(),
            "alarm": None if self.alarm is None else self.alarm.state(),
            "reasons": dict(counted(self.dropped, run.place)),
            "random": gathered(random_states(), run.place),
        }  # fmt: skip
        first, failed = run.place.first, None
        held: HasState = run.optimizer
        with in_one_piece(run.sharded, run.model, torch.device("cpu"), first) as model:
            if run.sharded is not None:
                held = run.sharded.optimizer_state(run.optimizer, first)
            if first:
                failed = self._write(run.folder, done, more, model, held)
            failed = from_first(failed, run.place)
        self._saved_at = time.perf_counter()
        return failed

    def _write(
        self, folder: Path, done: Progressed, more: dict[str, Any], model: nn.Module, held: HasState
    ) -> str | None:
        run = self.run_
        run.hold.keep()
        try:
            saved = save_checkpoint(
                folder, done, model, run.info, held, run.record, more, run.args.keep
            )
            run.hold.keep()
            write_status(folder, "running", self.step, hold=run.hold)
        except (OSError, NotWholeError, RuntimeError, SafetensorError) as error:
            # torch.save and safetensors have errors of their own for a full disk.
            log.warning(
                "no checkpoint at step %d: %s; make room, the run goes on", self.step, error
            )
            return str(error)
        log.info("saved %s", saved.name)
        return None

    def close(self) -> None:
        """Close the run's files; what TensorBoard holds back is written."""
        self.reporter.close()
        if self._audit is not None:
            with bearing_a_full_disk("audit"):
                self._audit.close()

    def _tick(self, done: bool = False) -> None:
        if self.run_.watchdog is not None:
            self.run_.watchdog.tick(self.step if done else None)

    # --- the run ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end of the plan; the last step is logged, saved and probed.

        Afterwards `dropped` counts all ranks' samples.

        Raises:
            UserError: too many unusable samples, or a score that fell too far.
            NotFinite: steps that are not finite, in spite of older weights.
            Preempted: somebody asked to end; a checkpoint is saved, or it was said why not.
        """
        run, plan = self.run_, self.run_.plan
        scored = from_first([step for step, _ in self.top1], run.place)
        if self.step not in scored and (not self.step or self._probe_due()):
            self._measure()
        if self.alarm is not None:
            self.alarm.refuse_fall()  # one that the resumed checkpoint brought with it
        run.wrapped.train()
        bar_on = run.place.first and sys.stderr.isatty()
        with (
            logging_redirect_tqdm(),
            contextlib.closing(run.feed.steps(self.step)) as batches,
            tqdm(total=plan.steps, initial=self.step, disable=not bar_on, unit="step") as bar,
        ):
            window = Window(time.perf_counter())
            while self.step < plan.steps:
                fed = self._next_batch(batches, window)
                loss, asked, due = self._advance(fed)
                self.step += 1
                window.steps += 1
                bar.update()
                self._tick(done=True)
                self._judge()
                if self._finish_step(loss, window, asked, due):
                    window = Window(time.perf_counter())
        self.dropped = counted(self.dropped, run.place)

    def _probe_due(self) -> bool:
        plan = self.run_.plan
        return self.step == plan.steps or self.step % plan.probe_every == 0

    def _finish_step(self, loss: Tensor, window: Window, asked: bool, due: bool) -> bool:
        """Report, probe and save where it is time; tells whether a new window begins."""
        run, plan = self.run_, self.run_.plan
        last = self.step == plan.steps
        asked = asked and not last
        owed = self._owed and not self.skips.streak
        save = last or asked or due or owed or self.step % plan.save_every == 0
        report = save or self.step == 1 or self.step % run.args.log_every_n_steps == 0
        if report:
            self._report(loss, window)
        probed = run.probe is not None and not asked and self._probe_due()
        if last and self.skips.streak > 1:
            raise NotFinite(
                f"the last {self.skips.streak} steps up to {self.step} were not finite; nothing "
                "more is saved; lower --lr, pass --grad-clip-norm 1.0, or use --precision fp32"
            )
        # A checkpoint comes after all that is said of its step, so that nothing of it is missing
        # when the run goes on from there.
        if probed:
            self._measure()
        fallen = probed and self.alarm is not None and self.alarm.fallen is not None
        if save or fallen:
            watchdog = self.run_.watchdog
            with watchdog.paused() if watchdog else contextlib.nullcontext():
                failed = self._save(asked or fallen)
            if asked:
                raise Preempted(f"not saved: {failed}" if failed else "saved")
        if fallen and self.alarm is not None:
            self.alarm.refuse_fall()
        return report or probed
