"""Checkpoints and status: complete, of plain types, and enough to go on from."""

import errno
import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from lazyclip.factory import build
from tests.toy_run import TINY, finished, train, world
from training.optim import make_optimizer
from training.state import (
    STATE_FILE,
    Progressed,
    check_room,
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


def test_a_checkpoint_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    """What it needs is known from its tensors, to some kilobytes."""
    _, folder = saved(tmp_path)
    size = sum(path.stat().st_size for path in folder.iterdir())
    (folder.parent / "step_00000013.part").mkdir()
    free = size - 250_000
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**60, 0, free))
    with pytest.raises(OSError, match=r"it needs [1-9] MB and [0-9] MB are free") as caught:
        saved(tmp_path, 24)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in folder.parent.iterdir()] == ["step_00000012"]
    free = size + 2**20
    saved(tmp_path, 24)


def test_the_moments_count_in_what_a_checkpoint_needs(tmp_path, monkeypatch):
    built = build(TINY)
    optimiser = make_optimizer(built.model, **SETTINGS)
    usage = namedtuple("usage", "total used free")
    weights = sum(v.numel() * v.element_size() for v in built.model.state_dict().values())
    free = weights + 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**60, 0, free))
    check_room(tmp_path, built.model, optimiser)
    for parameter in built.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    with pytest.raises(OSError, match="are free"):
        check_room(tmp_path, built.model, optimiser)
    free += 2 * weights + 10_000
    check_room(tmp_path, built.model, optimiser)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))
    check_room(tmp_path, built.model, optimiser)  # a disk that knows no sizes


def test_a_save_that_does_not_fit_is_left_out_in_one_line_and_the_run_goes_on(
    tmp_path, monkeypatch
):
    usage, plain = namedtuple("usage", "total used free"), shutil.disk_usage
    calls = []

    def disk_usage(path):
        calls.append(path)
        return usage(2**60, 0, 1000) if len(calls) == 2 else plain(path)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    ran = train(tmp_path, train_data=world(), model=TINY, save_every=1, keep=0)
    assert ran.code == 0
    steps = sorted(p.name for p in (ran.folder / "checkpoints").iterdir())
    assert steps == ["step_00000001", "step_00000003", "step_00000004"]
    (line,) = [line for line in ran.err.splitlines() if "no checkpoint" in line]
    assert "no checkpoint at step 2: " in line
    assert "it needs" in line
    assert line.endswith("make room, the run goes on")


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
