"""`--dry-run`: what it prints and writes, here and for machines that are elsewhere."""

import dataclasses
import json
import re

import pytest

from lazyclip.base.errors import UserError
from lazyclip.base.resources import config_file, config_names
from lazyclip.factory import build
from tests.toy_run import train, world
from training.costs import Costs, estimate
from training.dryrun import check_dry_run, describe_costs, place_of
from training.params import TrainArgs, read_recipe
from training.preflight import Plan

# H100 hours at 30 % of 989 TFLOP/s, by hand: samples x (3 x image + 3 or 1 x text) / (0.3 x peak).
HOURS = {(False, False): 73.9, (True, False): 710.0, (False, True): 66.7, (True, True): 694.1}
PAPERS = [name for name in config_names("recipes", ".yaml") if name.startswith("paper-")]


def elsewhere(tmp_path, **changes):
    """A plan for GPUs that are not here: a recipe, no data, no weights."""
    plain = {"batch_size": None, "epochs": None, "warmup": None, "model": None, "device": None,
             "threads": None, "dry_run": True}  # fmt: skip
    return train(tmp_path / "logs", **{**plain, **changes})


def estimated(gpus: int) -> Costs:
    args = TrainArgs(model="LaSt-ViT-nano", batch_size=8, epochs=1, warmup=0)
    built = build(args.model, device="meta")
    plan = Plan(80, 8, 10, 10, 0, 10, 10)
    return estimate(built.model, built.info, args, plan, gpus=gpus)


def head_of(recipe: str) -> str:
    """The comment on top of a recipe, in one line."""
    text = config_file("recipes", recipe, ".yaml").read_text(encoding="utf-8")
    return text.replace("\n# ", " ")


def check_said(text: str, about: dict) -> None:
    """Check hours, batch and memory in a text against a plan's."""
    hours, batch = about["costs"]["gpu_hours"], about["args"]["batch_size"]
    size = about["costs"]["memory"]["needed"] / 2**30
    assert f" {hours:,.0f} H100 or {hours * 989 / 312:,.0f} A100 hours" in text
    assert f" {batch} samples and {size:.0f} GiB" in text


def test_a_dry_run_says_what_the_run_costs(tmp_path):
    ran = train(tmp_path / "logs", train_data=world(), dry_run=True, mfu=0.5, gpu="h100")
    assert ran.code == 0
    assert list(tmp_path.iterdir()) == []
    for words in (
        "cost: work: 0.1269 GFLOP a sample forward (image 0.1141, text 0.0129; pooling 0.27",
        "GPU hours of h100 at 50 % of 67 TFLOP/s; on 1 GPU ",
        "cost: memory: 0.1 GiB on each GPU (weights 0.03, gradients 0.03, optimizer 0.06, ",
        " a sample, counted in the shards)",
        "cost: disk: 91.0 MB a checkpoint; at most 3 of them and the model at the end 303.3 MB",
    ):
        assert words in ran.out


@pytest.mark.parametrize("recipe", PAPERS)
def test_every_recipe_of_the_paper_is_planned_without_data_weights_or_gpus(tmp_path, recipe):
    plan = tmp_path / "plan.json"
    ran = elsewhere(tmp_path, config=recipe, gpus=64, gpu="h100", dry_run=plan)
    assert (ran.code, ran.err) == (0, "")
    assert list(tmp_path.iterdir()) == [plan]
    assert "planned for 64 GPUs, precision amp_bf16" in ran.out
    assert "(not read)" in ran.out
    assert "warning" not in ran.out
    about = json.loads(plan.read_text())
    large, locked = "-l14" in recipe, recipe.endswith("-cautious")
    assert about["plan"]["global_batch"] == (4096 if large else 5376)
    assert about["plan"]["steps"] == (156_250 if large else 119_048)
    assert about["args"]["batch_size"] == (64 if large else 84)
    assert about["plan"]["samples"] == pytest.approx(0.64e9, rel=1e-5)
    assert about["model"]["image_size"] == ([336, 336] if large else [224, 224])
    assert about["costs"]["gpu_hours"] == pytest.approx(HOURS[large, locked], abs=0.5)
    check_said(head_of(recipe).split("On 64 GPUs without --accum-freq:")[1], about)
    positions = "positions interpolated from 224 x 224), 24 x 24 patches" in ran.out
    assert positions == ("metaclip-l14" in recipe)
    assert ("rates at their peak" in ran.out) == locked


@pytest.mark.parametrize("recipe", PAPERS)
def test_a_recipes_head_states_what_its_own_command_takes(tmp_path, recipe):
    head = head_of(recipe)
    gpus, accum = re.search(r"--nproc_per_node (\d+) .*--accum-freq (\d+)", head).groups()
    how = {"gpus": int(gpus), "accum_freq": int(accum), "gpu": "h100"}
    plan = tmp_path / "plan.json"
    assert elsewhere(tmp_path, config=recipe, dry_run=plan, **how).code == 0
    said, elsewhere_said = head.split(" On 64 GPUs without --accum-freq: ")
    about = json.loads(plan.read_text())
    check_said(said, about)
    assert f" {about['costs']['hours']:,.0f} hours on 8 H100" in said
    assert "--max-top1-drop 0.05; docs/keeping.md" in elsewhere_said


@pytest.mark.parametrize("recipe", PAPERS)
def test_a_cautious_recipe_differs_in_what_it_says_it_differs_in(recipe):
    values = read_recipe(recipe)
    if not recipe.endswith("-cautious"):
        assert {"lr_text", "layer_decay", "lock_text"}.isdisjoint(values)
        assert f"{recipe}-cautious" in PAPERS
        return
    plain = read_recipe(recipe.removesuffix("-cautious"))
    changed = {key for key in values if values[key] != plain.get(key)}
    assert changed == {"lr", "layer_decay", "lock_text"}
    assert values["lr"] <= plain["lr"] / 10


def test_more_than_a_gpu_holds_is_warned_of(tmp_path):
    ran = elsewhere(tmp_path, config="paper-clip-l14-336", gpus=8)
    assert (
        "warning: more than the 79 GiB that a100 cards of 80 GB have; use --grad-checkpointing"
        in ran.out
    )
    ran = elsewhere(tmp_path, config="paper-clip-l14-336", gpus=8, accum_freq=8)
    assert "warning" not in ran.out


def test_cuda_and_fragmentation_count_for_the_warning():
    about = estimated(gpus=1)
    assert about.memory.needed == 1.1 * about.memory.total + 2**30
    for total, warned in ((70.9, False), (71.1, True), (72.1, True), (79.2, True)):
        weights = about.memory.weights + total * 2**30 - about.memory.total
        memory = dataclasses.replace(about.memory, weights=weights)
        lines = describe_costs(dataclasses.replace(about, memory=memory))
        assert any(line.startswith("warning: ") for line in lines) == warned
    # 70.9 x 1.1 + 1 is 78.99, of 79.1.
    assert f"cost: memory: {total:.1f} GiB on each GPU" in "\n".join(lines)
    assert "with CUDA's own and fragmentation (1 GiB and a tenth) 88.1 GiB" in "\n".join(lines)


def test_data_are_looked_at_where_they_are_named(tmp_path):
    ran = elsewhere(
        tmp_path, model="LaSt-ViT-nano", train_data=world(), gpus=2, global_batch=8, epochs=3
    )
    assert ran.code == 0
    assert "32 samples in an epoch, 3.00 passes" in ran.out
    assert "(4 per rank x 2)" in ran.out
    assert "counted in the shards" in ran.out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": 8}, "--gpus only plans: add --dry-run"),
        ({"mfu": 0.4}, "--mfu only plans: add --dry-run"),
        ({"gpu": "a100"}, "--gpu only plans: add --dry-run"),
        ({"dry_run": "plan.txt"}, "use --dry-run plan.json, or --dry-run alone to print only"),
        ({"dry_run": "plan"}, "use --dry-run plan.json"),
        ({"dry_run": "print", "mfu": 30.0}, "--mfu 30 is no share"),
        ({"dry_run": "print", "mfu": 0.0}, "--mfu 0 is no share"),
        ({"dry_run": "print", "gpus": 8, "resume": "latest"}, "leave --resume out"),
    ],
)
def test_flags_that_do_not_go_together(changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        check_dry_run(TrainArgs(**changes))


def test_planning_is_no_work_for_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="plans in one process"):
        place_of(TrainArgs(dry_run="print", gpus=8))


def test_a_plan_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    ran = elsewhere(tmp_path, model="LaSt-ViT-nano", train_num_samples=100, epochs=1, gpus=1,
                    dry_run=tmp_path / "file" / "plan.json")  # fmt: skip
    assert ran.code == 2
    assert "plan.json cannot be written" in ran.err
    assert "give a file in a folder that you can write to" in ran.err
