"""What a run costs, against what torch counts and what a small run leaves."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lazyclip.base.errors import UserError
from lazyclip.factory import Built, build
from lazyclip.pooling import last_pool
from tests.toy_models import EVA, NATIVE, TIMM
from tests.toy_run import finished
from training.costs import (
    PEAKS,
    Costs,
    checkpoint_bytes,
    checkpoints_kept,
    estimate,
    memory_of,
    pooling_flop,
    towers_of,
)
from training.distributed import Place
from training.params import TrainArgs
from training.preflight import Plan, make_plan

# open_clip's docs/model_profile.csv (mlfoundations/open_clip): GFLOP of both towers, one sample.
PUBLISHED = {"LaSt-ViT-B-16": 41.1, "LaSt-ViT-L-14": 175.3, "LaSt-ViT-L-14-336": 395.2}
OTHERS = ["LaSt-EVA02-B-16", "LaSt-ViT-tiny", "LaSt-ViT-nano",
          f"LaSt-{NATIVE}", f"LaSt-{EVA}", f"LaSt-{TIMM}"]  # fmt: skip


def shapes(name: str, **how) -> Built:
    return build(name, device="meta", **how)


def sample(built: Built, device: str, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Pictures and texts of the model's sizes."""
    texts = torch.zeros(batch, built.info.context_length, dtype=torch.long, device=device)
    return torch.zeros(batch, 3, *built.info.image_size, device=device), texts


def plan_of(args: TrainArgs, samples: int, world: int) -> Plan:
    return make_plan(args, samples, Place(0, world, 0, torch.device("meta"), planned=True))


def costs(name: str, gpus: int = 1, samples: int = 1000, **changes) -> Costs:
    args = TrainArgs(**{"batch_size": 10, "epochs": 1, "warmup": 0, **changes})
    built = shapes(name)
    return estimate(built.model, built.info, args, plan_of(args, samples, gpus), gpus=gpus)


# --- work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PUBLISHED, *OTHERS])
def test_a_forward_costs_what_torch_counts(name):
    built = shapes(name)
    towers = towers_of(built.model, built.info)
    with FlopCounterMode(display=False) as counter:
        built.model(*sample(built, "meta"))
    assert sum(tower.forward for tower in towers.values()) == counter.get_total_flops()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_forward_costs_what_open_clip_published(name):
    built = shapes(name)
    towers = towers_of(built.model, built.info)
    giga = sum(tower.forward for tower in towers.values()) / 1e9
    assert giga == pytest.approx(PUBLISHED[name], abs=0.05)


@pytest.mark.parametrize("lock", ["", "image", "text"])
def test_training_costs_what_torch_counts_of_forward_and_backward(lock):
    built = shapes("LaSt-ViT-nano")
    if lock:
        getattr(built.model, f"lock_{lock}_tower")()
    built.model.train()
    towers = towers_of(built.model, built.info)
    ours = sum(tower.training() for tower in towers.values())
    with FlopCounterMode(display=False) as counter:
        out = built.model(*sample(built, "meta"))
        (out["image_features"].sum() + out["text_features"].sum()).backward()
    counted = counter.get_total_flops()
    # The pictures get no gradient, so the first layer's backward is half of what we take it for.
    assert 1 <= ours / counted < 1.03


def test_pooling_is_less_than_a_hundredth_of_the_work_and_free_for_the_cls_token():
    for name in [*PUBLISHED, "LaSt-EVA02-B-16"]:
        built = shapes(name)
        image = towers_of(built.model, built.info)["image"].forward
        assert 0 < pooling_flop(built.info) < 0.01 * image
    assert pooling_flop(shapes("LaSt-ViT-B-16", last={"pooling": "token"}).info) == 0
    # Two transforms of length D for each patch: the half of a complex one's 5 D log2 D each.
    info = shapes("LaSt-ViT-nano").info
    assert pooling_flop(info) == 64 * 128 * (5 * 7 + 7)
    assert last_pool(torch.randn(1, 64, 128), 8).shape == (1, 128)


def test_what_is_computed_again_is_counted_apart():
    plain, twice = costs("LaSt-ViT-nano"), costs("LaSt-ViT-nano", accum_freq=2)
    blocks = costs("LaSt-ViT-nano", grad_checkpointing=True)
    once = sum(plain.forward.values())
    assert plain.again == 0
    assert twice.again == pytest.approx(once)
    assert 0.9 * once < blocks.again < once
    assert plain.training == twice.training == blocks.training
    assert twice.flop == pytest.approx(twice.samples * (plain.training + once))


def test_an_unknown_tower_is_named_rather_than_guessed():
    built = shapes("LaSt-ViT-nano")
    built.model.visual.adapter = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"visual\.adapter\.weight"):
        towers_of(built.model, built.info)


# --- time -----------------------------------------------------------------------------------------


def test_hours_and_rates_follow_from_the_work():
    found = costs("LaSt-ViT-B-16", gpus=8, samples=800_000)
    assert found.samples == 800_000
    assert found.training == pytest.approx(3 * 41.086e9, rel=1e-3)
    assert found.gpu_hours == pytest.approx(800_000 * found.training / (312e12 * 0.3) / 3600)
    assert found.hours == found.gpu_hours / 8
    assert found.samples_per_s == pytest.approx(8 * 0.3 * 312e12 / found.training)
    assert found.read_per_s == pytest.approx(33_000 * found.samples_per_s)
    assert found.decode_cores == pytest.approx(found.samples_per_s / 691)
    assert PEAKS["h100"]["amp_bf16"] == 989e12


def test_large_pictures_are_read_from_larger_files():
    assert costs("LaSt-ViT-L-14-336").bytes_per_sample == 120_000
    assert costs("LaSt-ViT-L-14").bytes_per_sample == 33_000


# --- memory ---------------------------------------------------------------------------------------


def kept_by_autograd(model: nn.Module, inputs: tuple[Tensor, Tensor], amp: bool) -> int:
    """Count the bytes of what a forward keeps for its backward, own weights left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        model(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("name", "quick", "off"),
    [("LaSt-ViT-nano", False, 0.02), ("LaSt-ViT-nano", True, 0.02), (f"LaSt-{EVA}", False, 0.08)],
)
def test_activations_are_those_that_autograd_keeps(name, quick, off):
    built = build(name, force_quick_gelu=quick)
    built.model.train()
    towers = towers_of(built.model, built.info)
    args = TrainArgs(batch_size=4)
    found = memory_of(built.model, towers, args, built.info, 1, "fp32")
    counted = kept_by_autograd(built.model, sample(built, "cpu", 4), amp=False)
    assert found.activations == pytest.approx(counted, rel=off)


def test_with_bfloat16_autograd_keeps_little_more_than_the_estimate_says():
    # The CPU's autocast leaves norms in bfloat16, CUDA's computes them in float32: here are fewer.
    built = build("LaSt-ViT-nano")
    built.model.train()
    towers = towers_of(built.model, built.info)
    two, four = (
        kept_by_autograd(built.model, sample(built, "cpu", rows), amp=True) for rows in (2, 4)
    )
    found = memory_of(built.model, towers, TrainArgs(batch_size=2), built.info, 1, "amp_bf16")
    assert 0.8 < (four - two) / found.activations < 1.05
    # What does not grow with the batch are the weights in bfloat16.
    assert two - (four - two) == pytest.approx(found.copies, rel=0.01)


def test_states_are_exactly_what_adamw_holds():
    built = build("LaSt-ViT-nano")
    built.model.lock_text_tower()
    trained = [p for p in built.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    towers = towers_of(built.model, built.info)
    found = memory_of(built.model, towers, TrainArgs(), built.info, 1, "fp32")
    held = [t for state in optimiser.state.values() for t in state.values() if t.dim()]
    scalar = sum(t.numel() for p in trained if not p.dim() for t in optimiser.state[p].values()) - 1
    assert found.weights == sum(p.nbytes for p in built.model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in trained)
    assert found.optimizer == sum(t.nbytes for t in held) + 4 * scalar
    assert (found.buckets, found.copies) == (0, 0)


def test_memory_follows_batch_ranks_and_what_is_locked():
    one, more = costs("LaSt-ViT-B-16"), costs("LaSt-ViT-B-16", batch_size=20)
    assert more.memory.activations == 2 * one.memory.activations
    ranks = costs("LaSt-ViT-B-16", gpus=4)
    assert ranks.memory.buckets == ranks.memory.gradients > 0
    shares = costs("LaSt-ViT-B-16", gpus=4, fsdp=True)
    assert shares.memory.optimizer == ranks.memory.optimizer / 4
    assert shares.memory.buckets == 0
    less = costs("LaSt-ViT-B-16", grad_checkpointing=True)
    assert less.memory.activations < 0.25 * one.memory.activations
    assert one.memory.total == pytest.approx(sum(dataclasses.astuple(one.memory)))


# --- disk -----------------------------------------------------------------------------------------


def test_a_checkpoint_holds_exactly_the_bytes_foretold():
    ran = finished()
    folder = max((ran.folder / "checkpoints").glob("step_*"))
    about = json.loads((folder / "record.json").read_text())
    built = build(about["model"]["name"])
    weights, whole = checkpoint_bytes(built.model)
    file = folder / "open_clip_model.safetensors"
    with safe_open(str(file), framework="pt") as stream:
        saved = sum(stream.get_tensor(key).nbytes for key in stream.keys())  # noqa: SIM118
    state = torch.load(folder / "train_state.pt", weights_only=True)["optimizer"]["state"]
    moments = sum(t.nbytes for held in state.values() for t in held.values())
    assert (saved, saved + moments) == (weights, whole)
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    assert whole < on_disk < whole + 250_000  # headers, settings, random states


@pytest.mark.parametrize(
    ("steps", "every", "keep", "kept", "by_clock"),
    [(119_048, 10_000, 3, 12, 14), (156_250, 20_000, 3, 8, 18), (25, 10, 3, 3, 3),
     (25, 10, 1, 1, 1), (25, 10, 0, 3, 3), (30_000, 5_000, 3, 4, 6)],
)  # fmt: skip
def test_the_newest_checkpoints_and_the_first_of_each_ten_thousand_steps_stay(
    steps, every, keep, kept, by_clock
):
    plan = Plan(1, 1, steps, 1, 0, every, 1)
    assert checkpoints_kept(plan, keep) == kept
    assert checkpoints_kept(plan, keep, by_clock=True) == by_clock


def test_costs_become_json_with_what_follows_from_them(tmp_path: Path):
    about = json.loads(json.dumps(costs("LaSt-ViT-nano").to_dict()))
    assert about["gpu_hours"] > 0
    assert about["memory"]["total"] == costs("LaSt-ViT-nano").memory.total
    assert about["kept_bytes"] > about["checkpoint_bytes"] > about["model_bytes"]
