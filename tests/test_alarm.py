"""The alarm on zero-shot top-1: what it is measured from, what ends a run, what a resume keeps."""

import json
import logging
from pathlib import Path

import pytest
import torch

from lazyclip.base.errors import UserError
from lazyclip.export import save_model
from lazyclip.factory import build
from lazyclip.pooling import PoolSpec
from lazyclip.shards import expand
from lazyclip.tower import pooling_of
from lazyclip.weights import trained_pooling
from lazyclip.zeroshot import class_list
from tests.toy_models import make, saved
from tests.toy_ranks import start, wait
from tests.toy_run import CLASSES, TINY, metrics, small, train, world
from training import loop as loop_module
from training.alarm import Alarm
from training.distributed import Place
from training.main import main
from training.preflight import ValData
from training.probe import Probe

PLAIN = "Toy-ViT"
IMAGES = 30
HOW = {"train_num_samples": 64, "epochs": 1, "model": TINY, "save_every": 1, "probe_every": 1,
       "val_num_samples": IMAGES, "classes": ",".join(CLASSES), "templates": "plain",
       "lr": 0.02, "keep": 0}  # fmt: skip


class Killed(BaseException):
    """Stands for a process that is gone."""


class Told:
    """A probe whose scores are given; it has the data of a real one."""

    def __init__(self, real: Probe, scores: list[float]) -> None:
        self.val, self.place, self.limit = real.val, real.place, real.limit
        self.chance, self.images, self.scores = real.chance, 400, list(scores)

    def top1(self, model) -> float:
        return self.scores.pop(0)


def run(tmp_path: Path, **changes):
    return train(tmp_path, **{**HOW, "train_data": world(), "val_data": world(), **changes})


def real_probe(built, classes=CLASSES, limit=None, ranks=1) -> Probe:
    val = ValData(tuple(expand(world())), class_list(classes), "plain")
    place = Place(0, ranks, 0, torch.device("cpu"))
    return Probe(val, built.preprocess_val, built.tokenizer, place, 8, limit)


@pytest.fixture(scope="module")
def built():
    return build(TINY)


def alarm_of(built, scores, most=None, own=None) -> Alarm:
    return Alarm(Told(real_probe(built), scores), most, own)


def scored(folder: Path) -> list[dict]:
    return [line for line in metrics(folder) if "probe/top1" in line]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without a limit, with the falls that its scores have."""
    ran = run(tmp_path_factory.mktemp("straight"))
    assert ran.code == 0
    return ran


def falls(lines: list[dict]) -> list[float]:
    """How far each score lies below the best up to it, from the scores alone."""
    scores = [line["probe/top1"] for line in lines]
    return [max(scores[: i + 1]) - score for i, score in enumerate(scores)]


# --- what it is measured from ---------------------------------------------------------------------


def test_a_fall_is_measured_from_the_best_so_far_and_not_from_step_0(built):
    alarm = alarm_of(built, [0.1, 0.6, 0.5, 0.61, 0.2])
    drops = [alarm.measure(s, built.model)["probe/top1_drop"] for s in range(5)]
    assert drops == pytest.approx([0, 0, 0.1, 0, 0.41])
    assert alarm.fallen is None  # without a limit a fall is only said


def telling_start(folder: Path) -> tuple[float, float]:
    """Save plain weights whose two poolings score differently; returns top-1 by each."""
    plain, last = build(PLAIN), build(TINY, last={"pooling": "last"})
    for seed in range(40):
        for one in (plain, last):
            one.model.load_state_dict(make(PLAIN, seed=seed).state_dict())
        by_token, by_last = (real_probe(b, limit=IMAGES).top1(b.model) for b in (plain, last))
        if by_token != by_last:
            save_model(plain.model, plain.info, folder)
            return by_token, by_last
    raise AssertionError("both poolings score alike for every seed")


def test_the_start_model_is_scored_with_the_pooling_its_weights_had(tmp_path):
    begun = tmp_path / "start"
    by_token, by_last = telling_start(begun)
    ran = run(tmp_path / "logs", pretrained=begun, last_pooling="last", lr=1e-9)
    first, second = scored(ran.folder)[:2]
    assert first["probe/top1_start"] == by_token
    assert first["probe/top1"] == by_last != by_token
    assert "probe/top1_start" not in second
    params = json.loads((ran.folder / "params.json").read_text())
    assert params["probe_start"] == by_token
    assert params["model"]["pooling"]["pooling"] == "last"
    assert f"start model {100 * by_token:.1f} %" in ran.err


def test_scoring_the_start_model_puts_the_runs_pooling_back(built):
    model = build(TINY).model
    before = pooling_of(model)
    alarm = alarm_of(built, [0.3, 0.7], own=PoolSpec(pooling="token"))
    assert alarm.measure(0, model) == {
        "probe/top1": 0.3, "probe/top1_start": 0.7, "probe/top1_drop": 0.0,
    }  # fmt: skip
    assert pooling_of(model) == before


def test_a_start_with_the_runs_own_pooling_is_scored_once(built):
    alarm = alarm_of(built, [0.3], own=pooling_of(built.model))
    assert alarm.measure(0, built.model)["probe/top1_start"] == 0.3


def test_the_start_pooling_is_that_of_tag_folder_or_file(tmp_path):
    folder = saved(tmp_path / "m", TINY, last={"pooling": "last", "k": 3})
    weights = folder / "open_clip_model.safetensors"
    token = PoolSpec(pooling="token")
    assert trained_pooling(TINY, None) is None
    assert trained_pooling("LaSt-ViT-B-16", "openai") == token
    for name, pretrained in ((folder, None), (TINY, folder), (TINY, weights)):
        found = trained_pooling(str(name), str(pretrained) if pretrained else None)
        assert found == PoolSpec(pooling="last", k=3)
    torch.save({}, tmp_path / "bare.pt")
    assert trained_pooling(TINY, str(tmp_path / "bare.pt")) == token


# --- what it does ---------------------------------------------------------------------------------


def test_a_fall_of_more_than_five_points_is_said_where_no_limit_is_set(built, caplog):
    alarm = alarm_of(built, [0.8, 0.75, 0.749, 0.6])
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            alarm.measure(step, built.model)
        assert not caplog.records  # five points are not more than five
        alarm.measure(2, built.model)
    assert "fell by 5.1 points to 74.9 % at step 2, from 80.0 % at step 0" in caplog.text
    assert "standard error 2.8 points, 400 images" in caplog.text  # sqrt(2 x 0.8 x 0.2 / 400)
    alarm.refuse_fall()


def test_a_score_that_has_come_back_ends_nothing(built):
    alarm = alarm_of(built, [0.8, 0.6, 0.79], most=0.1)
    for step in range(3):
        alarm.measure(step, built.model)
    alarm.refuse_fall()


def test_the_first_fall_beyond_the_limit_ends_the_run_with_its_checkpoint(tmp_path, straight):
    lines = scored(straight.folder)
    assert all(
        line["probe/top1_drop"] == pytest.approx(fall)
        for line, fall in zip(lines, falls(lines), strict=True)
    )
    limit = max(falls(lines)) * 0.7
    at = next(line["step"] for line, fall in zip(lines, falls(lines), strict=True) if fall > limit)
    assert 0 < at < lines[-1]["step"]
    ran = run(tmp_path, max_top1_drop=limit, save_every=99)
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith("error: zero-shot top-1 fell by ")
    remedy = ran.err.splitlines()[-1].split("its checkpoint is kept; ")[1]
    anew, on = remedy.split(", or go on with ")
    assert all(flag in anew for flag in ("--lr", "--pretrained", "/step_N", "--model", "--name"))
    assert on == "--resume latest and a higher --max-top1-drop"
    status = json.loads((ran.folder / "status.json").read_text())
    assert (status["state"], status["retryable"], status["step"]) == ("failed", False, at)
    assert "zero-shot top-1 fell by" in status["reason"]
    assert [p.name for p in (ran.folder / "checkpoints").iterdir()] == [f"step_{at:08d}"]
    assert scored(ran.folder) == lines[: at + 1]
    assert not (ran.folder / "model").exists()


def test_after_a_fall_the_run_goes_on_with_a_higher_limit(tmp_path, straight):
    limit = max(falls(scored(straight.folder))) * 0.7
    assert run(tmp_path, max_top1_drop=limit).code == 2
    ran = run(tmp_path, max_top1_drop=1, resume="latest")
    assert ran.code == 0, ran.err
    assert scored(ran.folder) == scored(straight.folder)


def given(monkeypatch, *scores: float) -> None:
    """Let probes find these scores, in turn."""
    left = list(scores)
    monkeypatch.setattr(Probe, "top1", lambda self, model: left.pop(0))


def state_of(folder: Path) -> tuple[str, int]:
    status = json.loads((folder / "status.json").read_text())
    return status["state"], status["step"]


@pytest.mark.parametrize("every", [999, 3])
def test_the_same_command_again_does_not_get_past_a_fall(tmp_path, monkeypatch, every):
    given(monkeypatch, 0.9, 0.2)
    how = {"probe_every": every, "max_top1_drop": 0.1}
    first = run(tmp_path, **how)
    assert first.code == 2
    at = state_of(first.folder)
    lines, held = metrics(first.folder), sorted((first.folder / "checkpoints").iterdir())
    for _ in range(2):
        ran = run(tmp_path, **how, resume="latest")
        assert (ran.code, state_of(ran.folder)) == (2, at)
        assert "fell by 70.0 points to 20.0 % at step" in ran.err.splitlines()[-1]
        assert not (ran.folder / "model").exists()
    assert metrics(ran.folder) == lines
    assert sorted((ran.folder / "checkpoints").iterdir()) == held


def test_a_run_that_fell_at_its_end_finishes_by_a_higher_limit_and_says_how_it_ends(
    tmp_path, monkeypatch
):
    begun = saved(tmp_path / "start", PLAIN)
    given(monkeypatch, 0.9, 0.9, 0.2)
    how = {"probe_every": 999, "pretrained": begun, "last_pooling": "last"}
    assert run(tmp_path, max_top1_drop=0.1, **how).code == 2
    assert run(tmp_path, resume="latest", **how).code == 2  # the limit is the run's
    ran = run(tmp_path, max_top1_drop=1, resume="latest", **how)
    assert (ran.code, state_of(ran.folder)[0]) == (0, "finished")
    assert "the run ends at 20.0 % zero-shot top-1, 70.0 points below the 90.0 %" in ran.err


def test_a_fall_taken_over_is_said_with_the_images_it_was_scored_on(built):
    alarm = alarm_of(built, [0.9, 0.2])
    alarm.measure(0, built.model)
    alarm.measure(4, built.model)
    later = alarm_of(built, [], most=0.1)
    later.probe.images = 0
    later.restore(json.loads(json.dumps(alarm.state())))
    with pytest.raises(UserError, match=r"at step 4, from 90\.0 % at step 0 .*, 400 images"):
        later.refuse_fall()


def test_a_run_that_ends_far_below_its_start_says_so(built, caplog):
    alarm = alarm_of(built, [0.1, 0.7, 0.5], own=PoolSpec(pooling="token"))
    alarm.measure(0, build(TINY).model)
    alarm.measure(9, built.model)
    with caplog.at_level(logging.WARNING):
        alarm.say_end()
    assert "ends at 50.0 % zero-shot top-1, 20.0 points below the 70.0 %" in caplog.text


@pytest.mark.dist
def test_two_ranks_end_alike_and_go_on_alike(tmp_path):
    def begin(**changes) -> list[int]:
        how = {**HOW, "train_data": world(), "val_data": world(), "batch_size": 4, **changes}
        return wait(start(2, main, small(logs=tmp_path, name="a", **how), log=tmp_path / "log"))

    assert begin(max_top1_drop=0.001) == [2, 2], (tmp_path / "log").read_text()[-3000:]
    drops = [line["probe/top1_drop"] for line in scored(tmp_path / "a")]
    assert drops[-1] > 0.001 >= max(drops[:-1])
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", len(drops) - 1)
    assert begin(max_top1_drop=1, resume="latest") == [0, 0], (tmp_path / "log").read_text()[-3000:]
    lines = scored(tmp_path / "a")
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["probe/top1_drop"] for line in lines] == pytest.approx(falls(lines))


# --- after a resume -------------------------------------------------------------------------------


def test_a_run_that_goes_on_remembers_start_and_best(tmp_path, monkeypatch):
    begun = saved(tmp_path / "start", PLAIN)
    how = {"pretrained": begun, "last_pooling": "last"}
    whole = run(tmp_path / "whole", **how)
    plain = loop_module.Loop._advance

    def advance(self, fed):
        if self.step == 4:
            raise Killed
        return plain(self, fed)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Loop, "_advance", advance)
        with pytest.raises(Killed):
            run(tmp_path / "cut", **how)
    # The checkpoint remembers, not the lines: they are lost here, and step 4 is scored again.
    (tmp_path / "cut" / "a" / "metrics.jsonl").write_text("")
    ran = run(tmp_path / "cut", **how, resume="latest")
    assert ran.code == 0, ran.err
    assert scored(ran.folder) == [m for m in scored(whole.folder) if m["step"] >= 4]
    for folder in (ran.folder, whole.folder):
        params = json.loads((folder / "params.json").read_text())
        assert params["probe_start"] == scored(whole.folder)[0]["probe/top1_start"]


def test_figures_of_other_images_or_classes_are_not_compared(built, caplog):
    alarm = alarm_of(built, [0.9])
    alarm.measure(0, built.model)
    state = json.loads(json.dumps(alarm.state()))
    same = alarm_of(built, [0.8])
    same.restore(state)
    assert same.measure(3, built.model)["probe/top1_drop"] == pytest.approx(0.1)
    for other in (real_probe(built, limit=7), real_probe(built, classes=("a", "b", "c"))):
        fresh = Alarm(Told(other, [0.2]), None, None)
        fresh.restore(state)
        assert fresh.measure(3, built.model)["probe/top1_drop"] == 0
    assert "falls count from here" in caplog.text


def test_a_checkpoint_of_before_the_alarm_starts_it_anew(built):
    alarm = alarm_of(built, [0.2])
    alarm.restore(None)
    assert alarm.measure(5, built.model)["probe/top1_drop"] == 0


# --- flags ----------------------------------------------------------------------------------------


def test_a_limit_without_scores_is_refused(tmp_path):
    ran = run(tmp_path, max_top1_drop=0.05, val_data=None, classes=None)
    assert ran.code == 2
    assert "--max-top1-drop needs scores to fall: add --val-data" in ran.err
