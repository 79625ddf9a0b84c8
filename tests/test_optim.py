"""Which parameters decay, and the learning rate of each step."""

import math

import open_clip
import pytest
import torch
from torch import nn

from lazyclip import bridge
from lazyclip.base.errors import UserError
from lazyclip.base.resources import config_names
from lazyclip.factory import build
from tests.toy_models import EVA, NATIVE, TIMM, make
from training.optim import (
    Rates,
    default_warmup,
    describe_rates,
    learning_rate,
    make_optimizer,
    parameter_groups,
    peak_rates,
    peaks_of,
    set_rates,
)

MODELS = {
    "LaSt-ViT-nano": lambda: build("LaSt-ViT-nano").model,
    "toy native": lambda: make(f"LaSt-{NATIVE}"),
    "toy EVA": lambda: make(f"LaSt-{EVA}"),
}
# Tables and projections that are parameters of their own, in open_clip's and timm's words.
MATRICES = {"positional_embedding", "pos_embed", "proj", "text_projection", "in_proj_weight"}
SETTINGS = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6}


def matrices_of(model: nn.Module) -> set[str]:
    """Names of the weight matrices, told by the kind of layer that owns them."""
    found = set()
    for prefix, layer in model.named_modules():
        for name, _ in layer.named_parameters(recurse=False):
            kinds = nn.Linear | nn.Conv2d | nn.Embedding
            if name in MATRICES or (name == "weight" and isinstance(layer, kinds)):
                found.add(f"{prefix}.{name}".strip("."))
    return found


def names_in(model: nn.Module, group: dict) -> set[str]:
    wanted = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


@pytest.mark.parametrize("name", MODELS)
def test_weight_decay_acts_on_matrices_and_on_nothing_else(name):
    model = MODELS[name]()
    peaks = peak_rates(model, Rates(1.0))
    decayed, plain = parameter_groups(model.named_parameters(), 0.2, peaks)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    assert names_in(model, decayed) == matrices_of(model)
    everything = {name for name, _ in model.named_parameters()}
    assert names_in(model, plain) == everything - matrices_of(model)
    assert len(decayed["params"]) + len(plain["params"]) == len(everything)
    assert "logit_scale" in names_in(model, plain)
    assert any("class_embedding" in n or "cls_token" in n for n in names_in(model, plain))


def test_frozen_parameters_are_not_given_to_the_optimiser():
    model = MODELS["toy native"]()
    for parameter in model.visual.parameters():
        parameter.requires_grad_(False)
    optimiser = make_optimizer(model, wd=0.2, **SETTINGS)
    held = set().union(*(names_in(model, group) for group in optimiser.param_groups))
    assert held == {name for name, _ in model.named_parameters() if not name.startswith("visual.")}


def test_a_group_without_parameters_is_left_out():
    optimiser = make_optimizer(nn.Linear(3, 3, bias=False), wd=0.2, **SETTINGS)
    assert len(optimiser.param_groups) == 1


def test_one_step_without_gradient_shrinks_matrices_alone():
    layer = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimiser = make_optimizer(layer, wd=0.5, **SETTINGS)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    assert torch.allclose(layer.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, before["bias"])


def test_the_settings_reach_every_group():
    optimiser = make_optimizer(nn.Linear(3, 2), wd=0.5, lr=0.1, betas=(0.8, 0.7), eps=1e-3)
    for group in optimiser.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.7), 1e-3)


def test_the_rate_rises_to_its_peak_and_falls_along_a_cosine():
    rates = [learning_rate(step, steps=10, warmup=4, peak=2.0) for step in range(10)]
    root = math.sqrt(3) / 2
    by_hand = [0.5, 1.0, 1.5, 2.0, 2.0, 1 + root, 1.5, 1.0, 0.5, 1 - root]
    assert rates == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 7, 12])
def test_every_step_of_a_run_has_a_positive_rate_up_to_the_peak(warmup):
    rates = [learning_rate(step, steps=12, warmup=warmup, peak=1.0) for step in range(12)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 1), (9, 1), (11, 2), (95, 10), (10_000, 1000), (1_000_000, 1000)]
)
def test_the_default_warmup_is_a_tenth_at_most_a_thousand(steps, warmup):
    assert default_warmup(steps) == warmup


# --- rates by tower and layer ---------------------------------------------------------------------

# Hand-made: depth 2, so embeddings are three layers below the end, the last block one.
BY_HAND = {
    NATIVE: {
        "visual.class_embedding": 3, "visual.positional_embedding": 3, "visual.conv1.weight": 3,
        "visual.ln_pre.bias": 3, "visual.transformer.resblocks.0.attn.in_proj_weight": 2,
        "visual.transformer.resblocks.1.mlp.c_fc.bias": 1, "visual.ln_post.weight": 0,
        "visual.proj": 0,
    },
    EVA: {
        "visual.trunk.cls_token": 3, "visual.trunk.pos_embed": 3,
        "visual.trunk.patch_embed.proj.weight": 3, "visual.trunk.blocks.0.attn.q_proj.bias": 2,
        "visual.trunk.blocks.1.mlp.norm.weight": 1, "visual.trunk.norm.bias": 0,
        "visual.trunk.head.weight": 0,
    },
    TIMM: {
        "visual.trunk.cls_token": 3, "visual.trunk.patch_embed.proj.bias": 3,
        "visual.trunk.blocks.0.attn.qkv.weight": 2, "visual.trunk.blocks.1.mlp.fc1.weight": 1,
        "visual.trunk.norm.weight": 0, "visual.trunk.head.bias": 0,
    },
}  # fmt: skip
TEXT_BY_HAND = {
    "token_embedding.weight": 2, "positional_embedding": 2,
    "transformer.resblocks.0.ln_1.weight": 1, "ln_final.bias": 0, "text_projection": 0,
}  # fmt: skip


def on_meta(name: str) -> nn.Module:
    """A model's shapes, without memory."""
    with torch.device("meta"):
        return open_clip.create_model(name, device="meta")


@pytest.mark.parametrize("name", config_names("models", ".json"))
def test_every_parameter_of_every_shipped_model_has_its_layer(name):
    model = on_meta(name)
    places = bridge.layer_places(model)
    assert list(places) == [key for key, _ in model.named_parameters()]
    for tower in ("image", "text"):
        mine = [place for place in places.values() if place.tower == tower]
        depth = mine[0].depth
        assert {place.layer for place in mine} == set(range(depth + 2))
        blocks = [sum(place.layer == i + 1 for place in mine) for i in range(depth)]
        assert len(set(blocks)) == 1  # blocks are alike
    assert {key for key, place in places.items() if place.tower == "scale"} == {"logit_scale"}


@pytest.mark.parametrize("kind", BY_HAND)
def test_a_layers_rate_falls_with_its_distance_from_the_end(kind):
    peaks = peak_rates(make(kind), Rates(0.5, 0.25, 0.125, 0.5, 0.25))
    text = TEXT_BY_HAND if kind == NATIVE else {f"text.{n}": v for n, v in TEXT_BY_HAND.items()}
    for name, below in BY_HAND[kind].items():
        assert peaks[name] == 0.25 * 0.5**below, name
    for name, below in text.items():
        assert peaks[name] == 0.125 * 0.25**below, name
    assert peaks["logit_scale"] == 0.5


def test_towers_without_a_rate_of_their_own_have_the_base_rate():
    peaks = peak_rates(make(NATIVE), Rates(0.5, text=0.125))
    assert {rate for name, rate in peaks.items() if name.startswith("visual.")} == {0.5}
    assert peaks["ln_final.weight"] == 0.125
    assert peaks["logit_scale"] == 0.5
    assert set(peak_rates(nn.Linear(2, 2), Rates(0.5)).values()) == {0.5}  # no tower is needed


def test_a_parameter_of_no_known_layer_is_named():
    model = make(NATIVE)
    model.visual.adapter = nn.Linear(2, 2)
    assert len(peak_rates(model, Rates(0.5, image=0.1))) == len(list(model.parameters()))
    with pytest.raises(UserError, match=r"visual\.adapter\.weight belongs to no layer known"):
        peak_rates(model, Rates(0.5, image_decay=0.9))


def test_groups_keep_decay_and_rates_apart():
    model = make(EVA)
    optimiser = make_optimizer(
        model, lr=Rates(0.5, image_decay=0.5), betas=(0.9, 0.98), eps=1e-6, wd=0.2
    )
    peaks = peak_rates(model, Rates(0.5, image_decay=0.5))
    held: set[str] = set()
    for group in optimiser.param_groups:
        names = names_in(model, group)
        assert {peaks[name] for name in names} == {group["lr"]}
        assert (names <= matrices_of(model)) == (group["weight_decay"] == 0.2)
        held |= names
    assert held == set(peaks)
    assert len(optimiser.param_groups) == 8  # four rates (text has the end's), decayed and not


def test_the_schedule_scales_each_groups_own_peak():
    model = make(NATIVE)
    optimiser = make_optimizer(model, lr=Rates(0.5, text=0.25), betas=(0.9, 0.98), eps=1e-6, wd=0.2)
    peaks = peaks_of(optimiser)
    assert sorted(set(peaks)) == [0.25, 0.5]
    for step, share in ((0, 0.5), (1, 1.0), (2, 1.0), (3, 0.75), (4, 0.25)):
        set_rates(optimiser, peaks, step, steps=5, warmup=2)
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            assert group["lr"] == pytest.approx(share * peak, abs=1e-15)


def test_a_decay_of_zero_leaves_all_but_the_end_unmoved():
    model = make(NATIVE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = make_optimizer(
        model, lr=Rates(0.1, text=0.0, image_decay=0.0), betas=(0.9, 0.98), eps=1e-6, wd=0.2
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"logit_scale", "visual.ln_post.weight", "visual.ln_post.bias", "visual.proj"}


def test_the_banner_says_what_each_tower_gets_and_what_is_locked():
    model = make(NATIVE)
    assert describe_rates(model, Rates(0.5)) == []
    model.lock_text_tower()
    (line,) = describe_rates(model, Rates(0.5, 0.25, 0.1, 0.5))
    assert line == (
        "rates at their peak: image 0.0312 (lowest layer) to 0.25 (top), layer decay 0.5; text "
        "locked, its rate and layer decay act on nothing; logit scale 0.5"
    )
