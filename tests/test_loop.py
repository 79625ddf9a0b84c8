"""The training loop: one step, the log line, the clamp, and when it stops."""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from lazyclip.base.logs import MetricsWriter
from lazyclip.export import save_model
from lazyclip.factory import build
from tests.toy_run import TINY, finished, metrics, train, world
from training import loop as module
from training import step as step_module
from training.distributed import Place
from training.feed import Bad, Fed, fixed
from training.loop import Loop, Run
from training.optim import make_optimizer
from training.params import TrainArgs
from training.preflight import Plan

# open_clip's log line, field by field; people grep these names.
LINE = re.compile(
    r"Train Epoch: \d+ \[\d+/\d+ \(\d+%\)\] Data \(t\): \d+\.\d{3} Batch \(t\): \d+\.\d{3}, "
    r"[\d.e+-]+/s, [\d.e+-]+/s/gpu LR: \d\.\d{6} Logit Scale: \d+\.\d{3} "
    r"Contrastive_loss: \d+\.\d{4} \(\d+\.\d{4}\) \| wait \d+% \| dropped \d+ \(\d+\.\d{4}%\)"
)
SAMPLES_PER_EPOCH = 10


class Towers(nn.Module):
    """Two linear towers; `clock` is told when a step computes."""

    def __init__(self, clock) -> None:
        super().__init__()
        self.visual, self.words = nn.Linear(4, 3), nn.Linear(4, 3)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.clock = clock

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        self.clock.pass_by(3.0)
        return {
            "image_features": functional.normalize(self.visual(images), dim=-1),
            "text_features": functional.normalize(self.words(texts.float()), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def pass_by(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def make_loop(tmp_path, clock) -> Iterator[Callable[..., Loop]]:
    """Makes a loop over two linear towers; closed when the test ends."""
    with contextlib.ExitStack() as made:

        def make(**how) -> Loop:
            loop = _make_loop(tmp_path, clock, **how)
            made.callback(loop.close)
            return loop

        yield make


def _make_loop(tmp_path, clock, batches=None, steps: int = 6, **changes) -> Loop:
    """A batch takes 1 s to come, a step 3 s."""

    def endless():
        draw = torch.Generator().manual_seed(0)
        for number in itertools.count():
            clock.pass_by(1.0)
            bad = (Bad(f"0.tar:{number}", "bad picture"),) if number % 2 else ()
            yield Fed(torch.randn(4, 4, generator=draw), torch.ones(4, 4), bad)

    args = TrainArgs(**{"batch_size": 4, "log_every_n_steps": 4, "lr": 0.1, **changes})
    plan = Plan(SAMPLES_PER_EPOCH, 4, steps, 3, warmup=0, save_every=99, probe_every=99)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Towers(clock)
    run = Run(
        args=args, plan=plan, place=Place(0, 1, 0, torch.device("cpu")), precision="fp32",
        model=model, wrapped=model, info=None,
        optimizer=make_optimizer(model, lr=args.lr, betas=(0.9, 0.98), eps=1e-6, wd=0.0),
        feed=fixed(endless if batches is None else lambda: (fed for fed in batches)),
        probe=None, record={}, folder=None,
        metrics=MetricsWriter(tmp_path / "metrics.jsonl"), curves=None,
    )  # fmt: skip
    return Loop(run)


def test_rates_and_waiting_are_those_of_the_clock(tmp_path, make_loop, caplog):
    caplog.set_level("INFO")
    loop = make_loop()
    loop.run()
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 4, 6]
    assert [line["samples"] for line in lines] == [4, 16, 24]
    assert [line["samples_per_s"] for line in lines] == pytest.approx([1.0] * 3)  # 4 in 4 s
    assert [line["data_wait"] for line in lines] == pytest.approx([0.25] * 3)
    assert [line["dropped"] for line in lines] == [0, 2, 3]
    text = [m for m in caplog.messages if m.startswith("Train Epoch")]
    assert "Data (t): 1.000 Batch (t): 4.000, 1/s, 1/s/gpu" in text[1]
    assert "| wait 25% | dropped 2 (11.1111%)" in text[1]  # 2 of 18 records


def test_the_line_keeps_open_clips_field_names(tmp_path, make_loop, caplog):
    caplog.set_level("INFO")
    make_loop().run()
    text = [m for m in caplog.messages if m.startswith("Train Epoch")]
    assert all(LINE.fullmatch(line) for line in text)
    assert [re.match(r"Train Epoch: (\d+ \[\d+/\d+ \(\d+%\)\])", line)[1] for line in text] == [
        "0 [4/10 (40%)]", "1 [6/10 (60%)]", "2 [4/10 (40%)]"
    ]  # fmt: skip
    shown = [line for line in finished().err.splitlines() if "Train Epoch" in line]
    assert len(shown) == 5
    assert all(LINE.search(line) for line in shown)


def test_the_loss_in_brackets_is_the_mean_of_the_logged_ones(tmp_path, make_loop, caplog):
    caplog.set_level("INFO")
    make_loop(log_every_n_steps=1).run()
    lost = [line["train/loss"] for line in metrics(tmp_path)]
    shown = [re.search(r"loss: (\S+) \((\S+)\)", m) for m in caplog.messages if "loss:" in m]
    assert [float(m[1]) for m in shown] == pytest.approx(lost, abs=1e-4)
    means = [sum(lost[: n + 1]) / (n + 1) for n in range(len(lost))]
    assert [float(m[2]) for m in shown] == pytest.approx(means, abs=1e-4)


def test_a_step_is_adam_by_hand_with_the_gradient_clipped(make_loop):
    loop = make_loop(steps=1, grad_clip_norm=1e-3)
    model = loop.run_.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loop.run()
    grads = {name: p.grad for name, p in model.named_parameters()}
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    assert norm == pytest.approx(1e-3, rel=1e-3)  # it was longer, or nothing is shown
    for name, parameter in model.named_parameters():
        # Adam's first step: lr * g / (|g| + eps)
        moved = 0.1 * grads[name] / (grads[name].abs() + 1e-6)
        assert torch.allclose(parameter, before[name] - moved, atol=1e-5)


def test_dropped_samples_are_named_until_there_are_many(tmp_path, make_loop, caplog):
    bad = tuple(Bad(f"0.tar:{n}", "no caption", "has jpg") for n in range(25))
    fed = Fed(torch.randn(4, 4), torch.ones(4, 4), bad)
    loop = make_loop(batches=[fed] * 2, steps=2, max_bad_fraction=1)
    loop.run()
    named = [m for m in caplog.messages if m.startswith("dropped 0.tar:")]
    assert named == [f"dropped 0.tar:{n}: no caption: has jpg" for n in range(20)]
    assert caplog.messages.count("further dropped samples are counted, not named") == 1
    assert loop.dropped == {"no caption": 50}


def test_the_logit_scale_is_kept_below_a_hundred(tmp_path):
    built = build(TINY)
    with torch.no_grad():
        built.model.logit_scale.fill_(5.0)
    save_model(built.model, built.info, tmp_path / "hot")
    ran = train(tmp_path, train_data=world(), train_num_samples=16, model=TINY,
                pretrained=tmp_path / "hot")  # fmt: skip
    scales = [line["logit_scale"] for line in metrics(ran.folder)]
    assert scales[0] == pytest.approx(100.0)
    assert 99 < scales[1] < 100.001
    weights = load_file(ran.folder / "model" / "open_clip_model.safetensors")
    assert float(weights["logit_scale"]) <= math.log(100) + 1e-6


def test_the_logit_scale_does_not_fall_below_one(make_loop):
    loop = make_loop(steps=1)
    with torch.no_grad():
        loop.run_.model.logit_scale.fill_(-3.0)
    loop.run()
    assert loop.run_.model.logit_scale.item() == 0.0


def test_a_run_that_stays_not_finite_fails_and_saves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="the last 3 steps up to 4 were not finite"):
        train(tmp_path, train_data=world(), lr=1e30, warmup=0, save_every=2, model=TINY)
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert (status["state"], status["retryable"], status["step"]) == ("failed", False, 4)
    assert "--grad-clip-norm" in status["reason"]
    assert not (tmp_path / "a" / "checkpoints").exists()
    assert not (tmp_path / "a" / "model").exists()
    lines = metrics(tmp_path / "a")
    assert [line["train/loss"] is None for line in lines] == [False, True, True, True]
    assert [line.get("skipped") for line in lines] == [None, 1, 2, 3]


def spoiled(monkeypatch, steps) -> list[int]:
    """Let the gradient of some steps be NaN; returns the steps that were computed."""
    plain, seen = step_module.contrastive_loss, []

    def sometimes(images, texts, scale, masked=None):
        seen.append(len(seen) + 1)
        if seen[-1] in steps:
            images.register_hook(lambda grad: grad * math.nan)
        return plain(images, texts, scale, masked)

    monkeypatch.setattr(step_module, "contrastive_loss", sometimes)
    return seen


def test_a_gradient_that_is_not_finite_is_skipped_and_its_samples_are_told(tmp_path, monkeypatch):
    spoiled(monkeypatch, {2})
    ran = train(tmp_path, train_data=world(), model=TINY, audit="ids")
    assert ran.code == 0
    assert all(math.isfinite(line["train/loss"]) for line in metrics(ran.folder))
    assert "step 2 skipped: its loss or gradient is not finite (1 in all)" in ran.err
    (told,) = [json.loads(x) for x in (ran.folder / "ledger-rank0.jsonl").read_text().splitlines()]
    audit = [json.loads(x) for x in (ran.folder / "audit.jsonl").read_text().splitlines()]
    assert (told["step"], told["event"]) == (2, "not finite")
    assert sorted(told["ids"]) == audit[1]["ids"]
    assert json.loads((ran.folder / "params.json").read_text())["skipped"] == 1


def test_a_save_that_falls_on_a_skipped_step_comes_after_the_next_one(tmp_path, monkeypatch):
    spoiled(monkeypatch, {2})
    ran = train(tmp_path, train_data=world(), model=TINY, save_every=2)
    assert "no checkpoint at step 2: that step was not finite; the next that is gets it" in ran.err
    there = sorted(p.name for p in (ran.folder / "checkpoints").iterdir())
    assert "step_00000002" not in there
    assert "step_00000003" in there


def test_a_skipped_step_changes_neither_weights_nor_moments(make_loop, monkeypatch):
    spoiled(monkeypatch, {2})
    loop = make_loop(steps=2)
    before = {}
    plain = Loop._skip

    def look(self, fed):
        before.update({k: v.clone() for k, v in self.run_.model.state_dict().items()})
        plain(self, fed)

    monkeypatch.setattr(Loop, "_skip", look)
    loop.run()
    after = loop.run_.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert {int(s["step"]) for s in loop.run_.optimizer.state.values()} == {1}


def test_too_many_skipped_steps_bring_the_last_checkpoint_back(tmp_path, monkeypatch):
    """Steps 3 and 4 are not finite, one is borne: step 2's weights return, and 5 and 6 follow."""
    spoiled(monkeypatch, {3, 4})
    how = {"train_data": world(), "model": TINY, "train_num_samples": 48, "save_every": 2}
    plain, back = Loop._go_back, {}

    def look(self, number):
        plain(self, number)
        back.update({k: v.clone() for k, v in self.run_.model.state_dict().items()})
        back["moments"] = {int(s["step"]) for s in self.run_.optimizer.state.values()}

    monkeypatch.setattr(Loop, "_go_back", look)
    before = Loop._skip

    def spoil(self, fed):
        with torch.no_grad():
            self.run_.model.logit_scale.fill_(1.5)
        before(self, fed)

    monkeypatch.setattr(Loop, "_skip", spoil)
    ran = train(tmp_path, **how, max_nonfinite=1)
    saved = load_file(ran.folder / "checkpoints" / "step_00000002" / "open_clip_model.safetensors")
    assert all(torch.equal(back[name], value) for name, value in saved.items())
    assert back["moments"] == {2}
    assert ran.code == 0
    assert "weights and optimiser of step 2 are back; steps 3 to 4 count for nothing" in ran.err
    events = [json.loads(x) for x in (ran.folder / "ledger-rank0.jsonl").read_text().splitlines()]
    assert [(e["step"], e["event"]) for e in events] == [
        (3, "not finite"), (4, "not finite"), (4, "went back"),
    ]  # fmt: skip
    assert events[2]["to"] == 2
    names = sorted(p.name for p in (ran.folder / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000004", "step_00000006"]


def test_a_run_without_a_checkpoint_to_go_back_to_ends(tmp_path, monkeypatch):
    spoiled(monkeypatch, {1, 2, 3})
    with pytest.raises(RuntimeError, match="3 of the steps up to 3 were not finite, and no check"):
        train(tmp_path, train_data=world(), model=TINY, max_nonfinite=2)
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "failed"


def test_a_run_goes_back_twice_and_then_ends(tmp_path, monkeypatch):
    spoiled(monkeypatch, set(range(2, 99)))
    how = {"train_data": world(), "model": TINY, "train_num_samples": 96, "save_every": 1}
    with pytest.raises(RuntimeError, match="going back did not help"):
        train(tmp_path, **how, max_nonfinite=1)
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert (status["state"], status["retryable"]) == ("failed", False)


def test_an_interruption_that_no_handler_takes_is_told(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(step_module, "contrastive_loss", interrupted)
    ran = train(tmp_path, train_data=world(), model=TINY)
    assert ran.code == 130
    status = json.loads((ran.folder / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "KeyboardInterrupt: ")
