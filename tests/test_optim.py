"""Which parameters decay, and the learning rate of each step."""

import math

import pytest
import torch
from torch import nn

from lazyclip.factory import build
from tests.toy_models import EVA, NATIVE, make
from training.optim import default_warmup, learning_rate, make_optimizer, parameter_groups

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
    decayed, plain = parameter_groups(model.named_parameters(), 0.2)
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
