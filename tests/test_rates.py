"""Rates by tower and layer through whole trainings: what moves, what is logged, what is resumed."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lazyclip.base.errors import UserError
from lazyclip.factory import build
from tests.toy_models import EVA
from tests.toy_run import TINY, Ran, metrics, train, world
from training.optim import Rates, make_optimizer
from training.resume import read_checkpoint, restore

LAST = "open_clip_model.safetensors"


def run(logs: Path, **changes) -> Ran:
    """Four steps of a toy model, each logged."""
    plain = {"train_data": world(), "model": TINY, "train_num_samples": 32, "lr": 0.01, "warmup": 0}
    ran = train(logs, **{**plain, **changes})
    assert ran.code == 0, ran.err
    return ran


def moved(ran: Ran, model: str) -> set[str]:
    """The parameters that a training changed."""
    before = build(model, random_weights_seed=0).model.state_dict()
    after = load_file(ran.folder / "model" / LAST)
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(
    ("model", "end"),
    [(TINY, {"visual.ln_post.weight", "visual.ln_post.bias", "visual.proj"}),
     (f"LaSt-{EVA}", {"visual.trunk.norm.weight", "visual.trunk.norm.bias",
                      "visual.trunk.head.weight", "visual.trunk.head.bias"})],
)  # fmt: skip
def test_a_training_moves_only_what_has_a_rate(tmp_path, model, end):
    ran = run(tmp_path, model=model, layer_decay=0, lr_text=0)
    assert moved(ran, model) == end | {"logit_scale"}
    assert "rates at their peak: image 0 (lowest layer) to 0.01 (top), layer decay 0; text 0" in (
        ran.folder / "out.log"
    ).read_text(encoding="utf-8")


def test_a_locked_tower_stays_whatever_its_rate(tmp_path):
    ran = run(tmp_path, lock_text=True, lr_text=0.5, layer_decay_text=0.5)
    assert {name.split(".")[0] for name in moved(ran, TINY)} == {"visual", "logit_scale"}
    assert "text locked, its rate and layer decay act on nothing" in ran.err


def test_rates_of_all_towers_given_as_the_base_rate_change_nothing(tmp_path):
    plain = run(tmp_path / "a")
    said = run(tmp_path / "b", lr_image=0.01, lr_text=0.01, layer_decay=1, layer_decay_text=1)
    one, two = (load_file(ran.folder / "model" / LAST) for ran in (plain, said))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_logged_rate_is_that_of_the_flag(tmp_path):
    ran = run(tmp_path, layer_decay=0.5, lr_image=0.002)
    rates = [line["lr"] for line in metrics(ran.folder) if "lr" in line]
    assert rates == pytest.approx([0.01, 0.0085355, 0.005, 0.0014645], rel=1e-4)


def test_a_run_with_layer_decay_goes_on_bit_for_bit(tmp_path):
    how = {"layer_decay": 0.5, "lr_text": 0.001, "save_every": 2}
    whole = run(tmp_path, **how)
    expected = load_file(whole.folder / "model" / LAST)
    folder = tmp_path / "again" / "a"
    shutil.copytree(whole.folder / "checkpoints" / "step_00000002",
                    folder / "checkpoints" / "step_00000002")  # fmt: skip
    again = run(tmp_path / "again", resume="latest", **how)
    found = load_file(again.folder / "model" / LAST)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = train(tmp_path / "again", train_data=world(), model=TINY, resume="latest",
                  warmup=None, layer_decay=0.9)  # fmt: skip
    assert other.code == 2
    assert "--layer-decay 0.9 differs from the 0.5" in other.err


def test_an_optimiser_of_other_groups_is_refused_in_words(tmp_path):
    ran = run(tmp_path, layer_decay=0.5)
    resumed = read_checkpoint(ran.folder / "checkpoints" / "step_00000004")
    model = build(TINY).model
    plain = make_optimizer(model, lr=Rates(0.01), betas=(0.9, 0.98), eps=1e-6, wd=0.2)
    with pytest.raises(UserError, match=r"in 8 groups, this run has \d+ in 2: rates by tower"):
        restore(resumed, model, plain)


def test_a_run_of_a_global_batch_goes_on_with_it(tmp_path):
    how = {"batch_size": None, "global_batch": 8, "save_every": 2}
    run(tmp_path, **how)
    later = train(tmp_path, train_data=world(), model=TINY, resume="latest", batch_size=None,
                  global_batch=16, train_num_samples=32, lr=0.01, warmup=0)  # fmt: skip
    assert later.code == 2
    assert "--global-batch 16 contradicts the run's global batch of 8" in later.err
