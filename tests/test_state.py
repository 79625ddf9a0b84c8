"""Checkpoints and status: complete, of plain types, and enough to go on from."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lazyclip.factory import build
from tests.toy_run import TINY, finished
from training.optim import make_optimizer
from training.state import (
    STATE_FILE,
    Progressed,
    checkpoint_folder,
    save_checkpoint,
    write_status,
)

SETTINGS = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "wd": 0.2}


def test_a_checkpoint_holds_step_samples_optimiser_and_random_state_as_plain_types():
    folder = checkpoint_folder(finished().folder, 4)
    assert folder.name == "step_00000004"
    state = torch.load(folder / STATE_FILE, weights_only=True)
    assert set(state) == {
        "step", "samples", "dropped", "k", "optimizer", "random", "args", "seed", "global_batch",
        "lanes", "window", "manifest", "initial_weights", "read", "skips", "reasons",
        "alarm",
    }  # fmt: skip
    assert (state["step"], state["samples"], state["dropped"]) == (4, 32, 0)
    record = json.loads((folder / "record.json").read_text())
    assert (record["step"], record["samples"]) == (4, 32)
    assert {"saved", "config", "versions"} <= set(record)


def test_a_step_from_a_loaded_checkpoint_is_the_step_that_was_taken():
    """Model and optimiser of step 4, put back, give the weights of a run that never stopped."""

    def one_step(model, optimiser):
        draw = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimiser.step()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    folder = checkpoint_folder(finished().folder, 4)
    built = build("LaSt-ViT-nano", str(folder))
    optimiser = make_optimizer(built.model, **SETTINGS)
    state = torch.load(folder / STATE_FILE, weights_only=True)["optimizer"]
    optimiser.load_state_dict(state)
    moments = [s["exp_avg"].abs().max() for s in optimiser.state.values()]
    assert len(moments) == len(list(built.model.parameters()))
    assert max(moments) > 0
    assert {int(s["step"]) for s in optimiser.state.values()} == {4}
    fresh = build("LaSt-ViT-nano", str(folder))
    went_on = one_step(built.model, optimiser)
    began = one_step(fresh.model, make_optimizer(fresh.model, **SETTINGS))
    assert any(not torch.equal(went_on[name], began[name]) for name in went_on)


def saved(tmp_path, step: int = 12):
    built = build(TINY)
    optimiser = make_optimizer(built.model, **SETTINGS)
    done = Progressed(step, 8 * step, 3)
    return built, save_checkpoint(tmp_path, done, built.model, built.info, optimiser, {"a": 1})


def test_a_checkpoint_appears_under_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            saved(tmp_path)
    assert not checkpoint_folder(tmp_path, 12).exists()
    built, folder = saved(tmp_path)  # the rest of the failed one is no hindrance
    assert folder == checkpoint_folder(tmp_path, 12)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["step_00000012"]
    weights = load_file(folder / "open_clip_model.safetensors")
    state = built.model.state_dict()
    assert all(torch.equal(weights[key], state[key]) for key in state)


def test_status_is_replaced_whole(tmp_path):
    write_status(tmp_path, "running", 3)
    write_status(tmp_path, "failed", 5, "why\nnot", retryable=True)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status.pop("time").endswith("Z")
    assert status == {"state": "failed", "reason": "why\nnot", "retryable": True, "step": 5}
    write_status(tmp_path, "failed", 6, "another rank's word on the same end")
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 5
    write_status(tmp_path, "running", 7)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
