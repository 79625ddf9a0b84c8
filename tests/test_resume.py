"""Going on after an end at any step: the same losses, samples and weights, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lazyclip.base.checkpoint import MANIFEST, seal
from lazyclip.base.errors import UserError
from tests.toy import caption_shards
from tests.toy_run import CLASSES, TINY, Ran, losses, metrics, train, world
from training import loop as loop_module
from training import main as main_module
from training.audit import read_audit
from training.ledger import cut_back, read_lines
from training.params import Parsed, TrainArgs
from training.resume import _batch
from training.state import STATE_FILE, write_status

STEPS = 7
HOW = {"train_data": world, "train_num_samples": 28, "epochs": 2, "model": TINY, "save_every": 2,
       "audit": "ids", "val_data": world, "classes": ",".join(CLASSES), "templates": "plain",
       "val_num_samples": 8, "probe_every": 3, "grad_clip_norm": 1.0}  # fmt: skip


class Killed(BaseException):
    """Stands for a process that is gone."""


def how(**changes) -> dict:
    return {k: v() if callable(v) else v for k, v in {**HOW, **changes}.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "open_clip_model.safetensors")


def same_weights(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def without_time(folder: Path) -> list[dict]:
    kept = ("step", "samples", "train/loss", "lr", "logit_scale", "dropped", "probe/top1")
    return [{k: line[k] for k in kept if k in line} for line in metrics(folder)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Ran:
    """The run that nothing happens to."""
    return train(tmp_path_factory.mktemp("straight"), **how())


def killed_at(tmp_path: Path, monkeypatch, step: int, **changes) -> None:
    """Train until a step is over, then be gone."""
    plain = loop_module.Loop._advance

    def advance(self, fed):
        if self.step == step:
            raise Killed
        return plain(self, fed)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Loop, "_advance", advance)
        with pytest.raises(Killed):
            train(tmp_path, **how(**changes))


@pytest.mark.parametrize("step", [0, 1, 2, 5, 6])
def test_a_run_killed_at_any_step_goes_on_as_if_nothing_had_been(
    tmp_path, monkeypatch, straight, step
):
    killed_at(tmp_path, monkeypatch, step)
    torch.manual_seed(99)
    ran = train(tmp_path, **how(resume="latest"))
    assert ran.code == 0
    assert without_time(ran.folder) == without_time(straight.folder)
    assert read_audit(ran.folder) == read_audit(straight.folder)
    assert same_weights(ran.folder, straight.folder)
    one, two = (json.loads((r.folder / "params.json").read_text()) for r in (ran, straight))
    assert one["probe"] == two["probe"]
    said = "resumed from step_0000000" if step >= 2 else "no checkpoint in"
    assert said in ran.err


def test_resume_alone_with_the_name_takes_the_recorded_settings(tmp_path, monkeypatch, straight):
    killed_at(tmp_path, monkeypatch, 5)
    bare = dict.fromkeys(HOW) | {"batch_size": None, "epochs": None, "warmup": None}
    ran = train(tmp_path, resume="latest", **{**bare, "model": None})
    assert ran.code == 0, ran.err
    assert without_time(ran.folder) == without_time(straight.folder)
    assert same_weights(ran.folder, straight.folder)


def test_a_checkpoint_may_be_named_and_its_run_found(tmp_path, monkeypatch, straight):
    killed_at(tmp_path, monkeypatch, 5)
    folder = tmp_path / "a" / "checkpoints" / "step_00000002"
    ran = train(tmp_path, name=None, resume=folder, **how())
    assert ran.code == 0, ran.err
    assert without_time(tmp_path / "a") == without_time(straight.folder)
    assert same_weights(tmp_path / "a", straight.folder)


def test_another_number_of_workers_changes_no_digit(tmp_path, monkeypatch, straight):
    killed_at(tmp_path, monkeypatch, 3)
    ran = train(tmp_path, **how(resume="latest", workers=2))
    assert ran.code == 0, ran.err
    assert losses(ran.folder) == losses(straight.folder)
    assert read_audit(ran.folder) == read_audit(straight.folder)


def test_a_finished_run_that_is_resumed_is_finished_again(tmp_path):
    first = train(tmp_path, **how(train_num_samples=16))
    lines = without_time(first.folder)
    again = train(tmp_path, **how(train_num_samples=16, resume="latest"))
    assert again.code == 0, again.err
    assert without_time(again.folder) == lines
    assert json.loads((again.folder / "status.json").read_text())["state"] == "finished"


def test_what_the_model_draws_goes_on_where_it_was(tmp_path, monkeypatch):
    """Toy towers draw nothing: a draw in each step stands for dropped patches."""
    drawn: dict[int, list[float]] = {}
    plain = loop_module.Loop._advance

    def advance(self, fed):
        if self.step == 3 and not self.run_.resumed and "b" in str(self.run_.folder.name):
            raise Killed
        drawn.setdefault(self.step, []).append(float(torch.rand(())))
        return plain(self, fed)

    monkeypatch.setattr(loop_module.Loop, "_advance", advance)
    few = how(val_data=None, classes=None, save_every=1)
    train(tmp_path, "a", **few)
    with pytest.raises(Killed):
        train(tmp_path, "b", **few)
    torch.manual_seed(5)
    train(tmp_path, "b", **few, resume="latest")
    assert all(len(values) == 2 and len(set(values)) == 1 for values in drawn.values())
    assert len({values[0] for values in drawn.values()}) == STEPS


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def contents(run: Path) -> dict[Path, bytes]:
    """All files of a run but its status."""
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "status.json"}


def mistake(ran: Ran) -> str:
    assert ran.code == 2, ran.err
    return ran.err.splitlines()[-1]


@pytest.fixture
def begun(tmp_path, monkeypatch) -> Path:
    killed_at(tmp_path, monkeypatch, 5)
    return tmp_path


def test_what_changes_the_run_is_refused_by_name(begun):
    before = contents(begun / "a")
    step = status(begun / "a")["step"]
    for changes, said in (
        ({"lr": 0.5}, "--lr 0.5 differs from the 0.0005 that step_00000004 was trained with"),
        ({"model": "ViT-nano"}, "--model ViT-nano differs from the LaSt-Toy-ViT"),
        ({"seed": 3}, "--seed 3 differs from the 0"),
        ({"last_k": 3}, "--last-k 3 does not fit step_00000004, which was trained without --last-k;"
         " leave it out"),
        ({"augment": None, "no_augment": True}, "--no-augment does not fit step_00000004, which"),
        ({"lock_text": True}, "--lock-text does not fit step_00000004, which was trained without"),
        ({"batch_size": 4}, "--batch-size 4 on 1 rank contradicts the run's global batch of 8; "
         "leave it out or give --batch-size 8"),
        ({"batch_size": None, "accum_freq": 3}, "global batch of 8 cannot be shared by 1 rank x 3 "
         "pieces; use --accum-freq 2 or 4"),
        ({"precision": "amp_bf16"}, "--precision amp_bf16 differs from the fp32 that step_00000004 "
         "was trained with"),
    ):  # fmt: skip
        told = mistake(train(begun, **how(resume="latest", **changes)))
        assert said in told
        assert contents(begun / "a") == before
        found = status(begun / "a")
        assert (found["state"], found["retryable"], found["step"]) == ("failed", False, step)
        assert found["reason"] == told.replace("error: ", "UserError: ")


@pytest.mark.parametrize(
    ("total", "world", "accum", "near"),
    [
        (16, 1, 3, "--accum-freq 2 or 4"),
        (16, 3, 2, "2 or 4 ranks"),
        (16, 3, 1, "2 or 4 ranks"),
        (12, 4, 2, "3 or 6 ranks, or --accum-freq 1 or 3"),
        (6, 4, 3, "2 ranks"),
        (8, 3, 3, "2 or 4 ranks and --accum-freq 1"),
        (7, 2, 1, "1 or 7 ranks"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_told_with_numbers_that_can(total, world, accum, near):
    args = TrainArgs(accum_freq=accum)
    with pytest.raises(UserError) as caught:
        _batch(Parsed(args, (), {}), args, total, world)
    assert str(caught.value).endswith(f" pieces; use {near}" if accum > 1 else f"; use {near}")
    for ranks in [int(n) for n in near.split(" rank")[0].split(" or ")] if "rank" in near else []:
        pieces = 1 if "and" in near else accum
        assert _batch(Parsed(args, (), {}), TrainArgs(accum_freq=pieces), total, ranks)


def as_on_a_gpu(monkeypatch) -> None:
    """Let the device that a run finds be one whose usual precision is amp_bf16."""
    plain = main_module.usual_precision
    monkeypatch.setattr(main_module, "usual_precision", lambda device: "amp_bf16")
    assert plain(torch.device("cpu")) == "fp32"


@pytest.mark.parametrize("recorded", ["as it is", "left to the device"])
def test_a_run_keeps_its_precision_on_another_device_and_says_so(
    begun, monkeypatch, straight, recorded
):
    folder = begun / "a" / "checkpoints" / "step_00000004"
    state = torch.load(folder / STATE_FILE, weights_only=True)
    assert state["args"]["precision"] == "fp32"
    if recorded == "left to the device":  # as older runs wrote it
        state["args"]["precision"] = None
        torch.save(state, folder / STATE_FILE)
        seal(folder)
    as_on_a_gpu(monkeypatch)
    ran = train(begun, **how(resume="latest"))
    assert ran.code == 0, ran.err
    assert "precision: fp32 as before, where cpu begins amp_bf16" in ran.err
    assert losses(ran.folder) == losses(straight.folder)
    again = train(begun, **how(resume="latest", precision="fp32"))
    assert "as before" not in again.err
    assert "--precision amp_bf16 differs from the fp32" in mistake(
        train(begun, **how(resume="latest", precision="amp_bf16"))
    )


@pytest.mark.parametrize(
    ("state", "kept"), [("running", False), ("preempted", False), ("failed", False),
                        ("finished", True), (None, False)],
)  # fmt: skip
def test_a_refused_start_says_so_but_a_finished_run_stays_finished(begun, state, kept):
    file = begun / "a" / "status.json"
    if state is None:
        file.unlink()
    else:
        write_status(begun / "a", state, 4, "hang", retryable=True)
    before = file.read_bytes() if state else b""
    mistake(train(begun, **how(resume="latest", lr=0.5)))
    assert (file.read_bytes() == before) == kept
    if not kept:
        found = status(begun / "a")
        assert (found["state"], found["retryable"]) == ("failed", False)
        assert found["reason"].startswith("UserError: --lr 0.5 differs")


def test_a_plan_that_is_refused_and_a_name_that_is_no_run_leave_nothing(begun, tmp_path):
    before = {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()}
    mistake(train(begun, **how(resume="latest", lr=0.5, dry_run=True)))
    mistake(train(begun, "never", **how(resume=begun / "none")))
    assert train(begun, **how(resume="latest", dry_run=True)).code == 0
    mistake(train(begun, "never", **how(resume="latest", lanes=3)))
    assert {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()} == before
    assert not (begun / "never").exists()


def test_other_data_are_refused_by_the_manifests_hash(begun, tmp_path):
    other = caption_shards(tmp_path / "other", shards=4, per_shard=9, classes=CLASSES)
    said = mistake(train(begun, **how(resume="latest", train_data=other)))
    assert "error: the manifest is " in said
    assert "step_00000004 was trained with" in said
    copied = tmp_path / "moved"
    shutil.copytree(Path(world()).parent, copied)
    moved = str(copied / Path(world()).name)
    assert train(begun, **how(resume="latest", train_data=moved)).code == 0


def test_a_used_folder_is_not_written_into_without_resume(begun):
    said = mistake(train(begun, **how()))
    assert "exists; go on with it by --resume latest, or give another --name" in said


def test_a_changed_byte_in_the_newest_checkpoint_is_seen_and_the_one_before_taken(begun, straight):
    newest = begun / "a" / "checkpoints" / "step_00000004" / "open_clip_model.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    said = mistake(train(begun, name=None, resume=newest.parent, **how()))
    assert "was changed after it was written; name an older checkpoint" in said
    ran = train(begun, **how(resume="latest"))
    assert "passed over: " in ran.err
    assert "resumed from step_00000002" in ran.err
    assert without_time(ran.folder) == without_time(straight.folder)
    assert same_weights(ran.folder, straight.folder)


def test_what_is_no_checkpoint_is_named(begun):
    assert "no such folder" in mistake(train(begun, **how(resume=begun / "none")))
    (begun / "empty").mkdir()
    assert "it was not finished; name an older" in mistake(
        train(begun, **how(resume=begun / "empty"))
    )
    (begun / "x" / "checkpoints").mkdir(parents=True)
    assert "no whole checkpoint in it" in mistake(train(begun, **how(resume=begun / "x")))
    assert "needs the run's --name" in mistake(train(begun, name=None, **how(resume="latest")))


def test_only_the_newest_checkpoints_stay(tmp_path, straight):
    def steps(folder):
        return sorted(p.name for p in (folder / "checkpoints").iterdir())

    assert steps(straight.folder) == [f"step_0000000{n}" for n in (4, 6, 7)]
    one = train(tmp_path, **how(keep=1))
    assert steps(one.folder) == ["step_00000007"]
    every = train(tmp_path, "b", **how(keep=0))
    assert steps(every.folder) == [f"step_0000000{n}" for n in (2, 4, 6, 7)]


def test_a_checkpoint_holds_what_going_on_needs_as_plain_types(straight):
    folder = straight.folder / "checkpoints" / "step_00000004"
    state = torch.load(folder / STATE_FILE, weights_only=True)
    assert (state["step"], state["samples"], state["k"], state["lanes"]) == (4, 32, 4, 8)
    assert state["global_batch"] == 8
    assert len(state["manifest"]) == len(state["initial_weights"]) == 64
    assert len(state["random"]) == 1
    assert state["args"]["lr"] == 5e-4
    assert MANIFEST in {p.name for p in folder.iterdir()}


def test_lines_of_later_steps_and_half_lines_are_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "a": 1}\n{"step": 3}\n{"step": 4, "tr')
    assert cut_back(file, 2) == 2
    assert read_lines(file) == [{"step": 1}, {"step": 2, "a": 1}]
    assert cut_back(file, 2) == 0
    assert cut_back(tmp_path / "none", 2) == 0


def test_checkpoints_of_which_none_is_whole_are_no_reason_to_start_over(begun):
    run = begun / "a"
    before = (run / "metrics.jsonl").read_bytes()
    for folder in (run / "checkpoints").iterdir():
        (folder / STATE_FILE).write_bytes(b"broken")
    said = mistake(train(begun, **how(resume="latest")))
    assert "none of the 2 checkpoints in " in said
    assert "is whole; restore one, or start a new run with another --name" in said
    assert (run / "metrics.jsonl").read_bytes() == before


def test_later_checkpoints_are_set_aside_when_an_older_one_is_gone_on_from(tmp_path, straight):
    first = train(tmp_path, **how(keep=0))
    older = first.folder / "checkpoints" / "step_00000002"
    again = train(tmp_path, **how(keep=0, resume=str(older)))
    assert again.code == 0
    there = sorted(p.name for p in (first.folder / "checkpoints").iterdir())
    assert "step_00000004.aside" in there
    assert losses(again.folder) == losses(straight.folder)
