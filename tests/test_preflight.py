"""What is checked before a run, the plan, and every mistake answered in one line."""

import json
import sys
from pathlib import Path

import pytest
import torch

from lazyclip.base.errors import UserError
from lazyclip.factory import build
from tests.toy import caption_sample, caption_shards, write_shard
from tests.toy_run import CLASSES, TINY, Ran, finished, small, train, world
from training.distributed import Place, find_place
from training.main import main
from training.params import TrainArgs
from training.preflight import Plan, check_name, default_name, make_plan

CPU = torch.device("cpu")


def plan(samples: int, world_size: int = 1, **changes) -> Plan:
    args = TrainArgs(**{"batch_size": 8, "epochs": 2, **changes})
    return make_plan(args, samples, Place(0, world_size, 0, CPU))


def mistake(tmp_path: Path, **changes) -> str:
    """Make a run that cannot be; returns its one line and checks that nothing was written."""
    there = sorted(tmp_path.rglob("*"))
    ran: Ran = train(tmp_path / "logs", **{"train_data": world(), **changes})
    assert ran.code == 2
    assert ran.out == ""
    assert sorted(tmp_path.rglob("*")) == there
    *before, line = ran.err.splitlines()
    assert all(" | " in said for said in before)  # log lines
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# --- the plan -------------------------------------------------------------------------------------


def test_steps_cover_all_epochs_rounded_up_once():
    made = plan(30, epochs=3)  # 90 samples in batches of 8
    assert (made.global_batch, made.steps, made.steps_per_epoch) == (8, 12, 4)
    assert (made.save_every, made.probe_every, made.warmup) == (4, 4, 2)
    assert made.samples == 96


def test_the_global_batch_counts_all_ranks():
    made = plan(100, world_size=3, save_every=5, probe_every=2, warmup=0)
    assert (made.global_batch, made.steps) == (24, 9)
    assert (made.save_every, made.probe_every, made.warmup) == (5, 2, 0)


def test_fewer_samples_than_a_batch_make_one_step():
    assert plan(3, epochs=1).steps == 1


def test_a_warmup_of_the_whole_run_is_allowed_and_a_longer_one_is_not():
    assert plan(16, warmup=4).warmup == 4
    with pytest.raises(UserError) as caught:
        plan(16, warmup=90)
    assert str(caught.value) == (
        "--warmup 90 exceeds the 4 steps of this run: the learning rate would stop at 4.4 % of "
        "--lr 0.0005; use --warmup 1 or more --epochs"
    )


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b", "a b", "", "ä!", "a\nb"])
def test_a_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(UserError, match="is no folder name"):
        check_name(TrainArgs(name=name))


def test_a_run_without_a_name_is_called_after_model_and_start_time():
    assert default_name(TrainArgs(model="runs/a/model")).startswith("model-2")
    assert default_name(TrainArgs()).startswith("LaSt-ViT-B-16-2")


def test_a_run_that_exists_is_left_alone(tmp_path):
    folder = tmp_path / "logs" / "a"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("mine")
    assert mistake(tmp_path) == (
        f"{folder} exists; go on with it by --resume latest, or give another --name or --logs"
    )
    assert (folder / "metrics.jsonl").read_text() == "mine"


def test_logs_that_cannot_hold_a_folder_are_named(tmp_path):
    (tmp_path / "logs").write_text("a file")
    ran = train(tmp_path / "logs", train_data=world(), train_num_samples=8, model=TINY)
    assert ran.code == 2
    assert f"{tmp_path / 'logs' / 'a'} cannot be made (Not a directory)" in ran.err
    assert (tmp_path / "logs").read_text() == "a file"


# --- the dry run ----------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path):
    ran = train(tmp_path / "logs", train_data=world(), epochs=5, warmup=None, dry_run=True,
                last_k="12", val_data=world(), classes=",".join(CLASSES))  # fmt: skip
    assert ran.code == 0
    assert ran.err == ""
    assert list(tmp_path.iterdir()) == []
    for words in (
        "device: cpu, 1 rank, precision fp32",
        "model: LaSt-ViT-nano, weights random, 7,582,465 parameters (7,582,465 trained)",
        "activation gelu, image 64 x 64 px, 8 x 8 patches",
        "pooling: pooling last, score paper, k 12,",
        "data: 32 samples in an epoch, 5.00 passes; exact loader, 4 shards, ",
        "32 samples in a pass, 4 chunks of 64, manifest ",
        "data: order: 8 lanes, windows of at most ",
        "data: members: ",
        "plan: 20 steps of 8 samples (8 per rank x 1) = 160 samples seen; warm-up 2 steps (10.0 %)",
        "lr 0.0005, weight decay 0.2; checkpoint every 4 steps",
    ):
        assert words in ran.out


def test_a_dry_run_counts_what_is_trained_and_names_what_flags_overrode(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("epochs: 7\nlr: 0.01\nlock_text: true\n")
    ran = train(tmp_path / "logs", train_data=world(), dry_run=True, config=recipe, lr=0.5)
    model = build("LaSt-ViT-nano").model
    image_and_scale = sum(p.numel() for p in model.visual.parameters()) + 1
    assert f"7,582,465 parameters ({image_and_scale:,} trained)" in ran.out
    # `small` gives --epochs too.
    assert "recipe: r.yaml; overridden by flags: --epochs, --lr" in ran.out


def test_shards_that_are_not_whole_are_a_warning_and_gaps_are_not(tmp_path):
    caption_shards(tmp_path / "d", shards=5, per_shard=8, classes=CLASSES)
    cut = tmp_path / "d" / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    (tmp_path / "d" / "00002.tar").write_bytes(b"")
    (tmp_path / "d" / "00003.tar").unlink()
    ran = train(tmp_path, train_data=tmp_path / "d", model=TINY)
    assert ran.code == 0, ran.err
    told = [line.split(" | ")[1:] for line in ran.err.splitlines() if " | data: " in line]
    levels = {text.split(": ")[1]: level for level, text in told}
    assert levels["truncated"] == levels["empty file"] == "WARNING"
    assert levels["gap"] == "INFO"


def test_resampling_is_said(tmp_path):
    ran = train(tmp_path, train_data=world(), dry_run=True, dataset_resampled=True, workers=9,
                loader="sequential")  # fmt: skip
    assert (
        "sequential loader, 4 shards, 0.4 shards per loader process, drawn with replacement"
        in ran.out
    )


# --- mistakes -------------------------------------------------------------------------------------


def test_training_shards_must_be_named(tmp_path):
    assert mistake(tmp_path, train_data=None).startswith("--train-data is missing; an example:")


def test_a_pattern_without_files_says_what_was_tried(tmp_path):
    line = mistake(tmp_path, train_data=f"{tmp_path}/none/{{00000..00002}}.tar")
    assert "names 0 existing shards; first tried: " in line
    assert "Quote the pattern" in line


def test_shards_without_captions_show_their_suffixes(tmp_path):
    shard = write_shard(tmp_path / "0.tar", [{"jpg": b"x", "cls": b"0"}] * 2)
    said = mistake(tmp_path, train_data=shard, loader="sequential")
    assert "seen: cls in 2, jpg in 2 of 2 samples" in said
    ran = train(tmp_path / "logs", train_data=shard)
    assert ran.code == 2
    assert "no captions" in ran.err
    assert "seen: jpg in 2, cls in 2 of 2 records" in ran.err
    assert not (tmp_path / "logs").exists()


def test_fewer_shards_than_loader_processes(tmp_path):
    said = mistake(tmp_path, workers=5, loader="sequential")
    assert "4 shards < 1 ranks x 5 workers; use --workers 4" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lanes": 3}, "a global batch of 8 does not divide among 3 lanes; use 6 or 9, or lanes 1"),
        ({"batch_size": 40}, "32 samples < 40 lanes"),
        ({"dataset_resampled": True}, "has no passes; add --loader sequential"),
        ({"loader": "sequential", "audit": True}, "--audit needs the exact loader"),
        ({"loader": "sequential", "lanes": 4}, "--lanes needs the exact loader"),
        ({"loader": "sequential", "filter": "a>1"}, "--filter needs the exact loader"),
        ({"train_data_upsampling_factors": "1.5"}, "'1.5' is no whole number from 1"),
        ({"train_data_upsampling_factors": "1.5", "loader": "sequential"},
         "fractions need --dataset-resampled"),
        ({"filter": "nothing>1"}, "nothing"),
        ({"manifest": "none/at/all.npz", "filter": "similarity"}, "similarity"),
    ],
)  # fmt: skip
def test_numbers_of_the_loaders_that_do_not_fit(tmp_path, changes, said):
    assert said in mistake(tmp_path, **changes)


def test_upsampling_factors_make_a_pass_longer(tmp_path):
    other = caption_shards(tmp_path / "d", shards=1, per_shard=8, classes=CLASSES)
    how = {"train_data": f"{world()}::{other}", "dry_run": True}
    ran = train(tmp_path, **how, train_data_upsampling_factors="1::3")
    assert "data: 56 samples in an epoch" in ran.out
    drawn = train(tmp_path, **how, train_data_upsampling_factors="1::0.5", loader="sequential",
                  dataset_resampled=True)  # fmt: skip
    assert drawn.code == 0, drawn.err
    twice = train(tmp_path, **how, train_data_upsampling_factors="1::2", loader="sequential")
    assert "data: 48 samples in an epoch" in twice.out


def test_an_unknown_model_names_the_nearest(tmp_path):
    line = mistake(tmp_path, model="LaSt-ViT-nona")
    assert line.startswith("unknown model 'LaSt-ViT-nona'; nearest: LaSt-ViT-nano")


def test_an_unknown_tag_names_the_known_ones(tmp_path):
    line = mistake(tmp_path, model="LaSt-ViT-B-32", pretrained="laion2b_s34b_b79")
    assert "laion2b_s34b_b79k" in line


def test_more_patches_kept_than_there_are(tmp_path):
    assert mistake(tmp_path, last_k=300).startswith("--last-k 300 exceeds the 64 patches")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("last_k", "many"), ("last_pooling", "lost"), ("last_sigma", "wide"), ("last_score", "good")],
)
def test_pooling_flags_that_do_not_read_are_named(tmp_path, flag, value):
    assert mistake(tmp_path, **{flag: value}).startswith(f"--{flag.replace('_', '-')} {value}")


def test_weights_of_another_architecture(tmp_path):
    line = mistake(tmp_path, model=TINY, pretrained=finished().folder / "model")
    assert "does not fit LaSt-Toy-ViT" in line
    assert "--model" in line


def test_weights_that_are_not_there(tmp_path):
    assert "/none/x.pt" in mistake(tmp_path, pretrained=f"{tmp_path}/none/x.pt")


@pytest.mark.parametrize(("size", "remedy"), [(60, "56 or 64"), (4, "8 or 16")])
def test_an_image_size_that_patches_do_not_cover(tmp_path, size, remedy):
    assert mistake(tmp_path, force_image_size=size) == (
        f"--force-image-size {size} is no multiple of the 8 px patches of LaSt-ViT-nano; "
        f"use {remedy}"
    )


def test_a_warmup_longer_than_the_run(tmp_path):
    assert mistake(tmp_path, warmup=90).startswith("--warmup 90 exceeds the 4 steps of this run")


def test_validation_without_classes_and_classes_without_validation(tmp_path):
    assert "--val-data needs class names: pass --classes" in mistake(tmp_path, val_data=world())
    assert "--classes without --val-data" in mistake(tmp_path, classes="red")


def test_a_class_beyond_the_list(tmp_path):
    line = mistake(tmp_path, val_data=world(), classes="red, blue")
    assert line.startswith("--val-data 00000.tar:2 (key 000000002) has class 2, and --classes")


def test_validation_shards_without_a_class(tmp_path):
    sample = caption_sample(0, CLASSES)
    shard = write_shard(tmp_path / "v.tar", [{"jpg": sample["jpg"], "txt": sample["txt"]}])
    line = mistake(tmp_path, val_data=shard, classes="red")
    assert "the first sample has no class; its json needs class_index, or add KEY.cls" in line
    empty = write_shard(tmp_path / "e.tar", [])
    assert "no class" in mistake(tmp_path, val_data=empty, classes="red")


def test_class_files_and_templates_that_cannot_be_read(tmp_path):
    both = {"val_data": world(), "classes": ",".join(CLASSES)}
    assert "class file" in mistake(tmp_path, **{**both, "classes": f"{tmp_path}/none.txt"})
    assert "templates" in mistake(tmp_path, **both, templates=f"{tmp_path}/none.txt")
    bad = tmp_path / "t.txt"
    bad.write_text("a photo\n")
    assert "needs exactly one {}" in mistake(tmp_path, **both, templates=bad)


def test_a_recipe_that_is_not_there(tmp_path):
    assert "no such file" in mistake(tmp_path, config=f"{tmp_path}/none.yaml")


def test_curves_that_cannot_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    line = mistake(tmp_path, report_to="tensorboard")
    assert line == "--report-to tensorboard needs tensorboard: pip install tensorboard"


def test_flags_of_open_clip_that_are_lacking(tmp_path, capsys):
    assert main([*small(logs=tmp_path), "--save-frequency", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: --save-frequency is open_clip's: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there(tmp_path):
    assert mistake(tmp_path, device="cuda").startswith("--device cuda: no CUDA device is visible")


def test_a_device_of_another_kind(tmp_path):
    assert mistake(tmp_path, device="tpu") == "--device tpu is not known here; use cuda or cpu"


def test_every_rank_tells_its_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    ran = train(tmp_path, train_data=world(), batch_size="many")
    assert ran.err.startswith("[rank 1] error: argument --batch-size: invalid int value: 'many'")


# --- mistakes that only show later ----------------------------------------------------------------


def failed(ran: Ran) -> dict:
    assert ran.code == 2
    assert not (ran.folder / "checkpoints").exists()
    assert not (ran.folder / "model").exists()
    status = json.loads((ran.folder / "status.json").read_text())
    assert (status["state"], status["retryable"]) == ("failed", False)
    assert "Traceback" not in ran.err
    return status


def test_a_later_class_beyond_the_list_ends_the_run_before_its_first_step(tmp_path):
    pattern = caption_shards(tmp_path / "v", shards=2, per_shard=2, classes=CLASSES)
    ran = train(tmp_path, train_data=world(), val_data=pattern, classes="red, blue", model=TINY)
    status = failed(ran)
    assert status["step"] == 0
    assert "00001.tar:0 (key 000010000) has class 2" in status["reason"]
    assert ran.err.splitlines()[-1].startswith("error: --val-data 00001.tar:0")


def test_too_many_bad_samples_end_the_run_with_their_reasons(tmp_path):
    good, empty = caption_sample(0, CLASSES), {"jpg": b"x", "txt": b" "}
    shard = write_shard(tmp_path / "0.tar", ([empty] * 70 + [good]) * 20)
    how = {"train_data": shard, "train_num_samples": 32, "model": TINY, "loader": "sequential"}
    status = failed(train(tmp_path, **how))
    assert "empty caption), more than --max-bad-fraction 0.01" in status["reason"]
    assert status["reason"].startswith("UserError: ")


def test_a_higher_bad_fraction_lets_it_run_and_counts(tmp_path):
    good, empty = caption_sample(0, CLASSES), {"jpg": b"x", "txt": b" "}
    shard = write_shard(tmp_path / "0.tar", ([empty] * 70 + [good]) * 20)
    ran = train(tmp_path, train_data=shard, train_num_samples=8, max_bad_fraction=1, model=TINY,
                loader="sequential")  # fmt: skip
    assert ran.code == 0
    dropped = json.loads((ran.folder / "params.json").read_text())["dropped"]
    assert set(dropped) == {"empty caption"}
    assert f"dropped {dropped['empty caption']} (" in ran.err
    assert ran.err.count("WARNING | dropped 0.tar:") == 20
    assert "further dropped samples are counted, not named" in ran.err


def test_a_world_without_one_usable_sample_ends_the_run(tmp_path):
    shard = write_shard(tmp_path / "0.tar", [{"jpg": b"x", "txt": b" "}] * 500)
    how = {"train_data": shard, "max_bad_fraction": 1, "model": TINY}
    status = failed(train(tmp_path, "b", **how))
    assert (
        "8 of 8 samples were unusable (8 empty caption), no usable sample in a whole batch"
        in (status["reason"])
    )
    status = failed(train(tmp_path, **how, loader="sequential"))
    assert "no usable sample among 5000 records in a row: 5000 empty caption" in status["reason"]


# --- where a process stands -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        # srun without a rendezvous address starts copies, not ranks.
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, (0, 1, 0)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "a",
          "MASTER_PORT": "1"}, (3, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "4",
          "MASTER_ADDR": "a"}, (0, 2, 0)),
    ],
)  # fmt: skip
def test_ranks_come_from_torchrun_else_from_slurm(monkeypatch, environment, place):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS",
                 "SLURM_LOCALID", "MASTER_ADDR"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = find_place("cpu")
    assert (found.rank, found.world, found.local_rank) == place
    assert found.first == (place[0] == 0)


def test_a_run_that_cannot_save_its_model_says_so(tmp_path, monkeypatch):

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.main.save_model", full)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, train_data=world(), train_num_samples=8, model=TINY)
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 1)
    assert "No space left" in status["reason"]
