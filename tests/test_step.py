"""Gradients of a step in float64: ranks, pieces and masked slots against one plain big batch."""

import functools
import math
import os

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lazyclip.factory import build
from tests.toy_models import pixels
from tests.toy_ranks import in_ranks
from tests.toy_run import TINY
from training.assemble import wrap
from training.distributed import Place
from training.feed import Fed
from training.objectives import contrastive_loss
from training.step import Towers, backward, gradient_norm

TOLERANCE = 1e-12
B, CONTEXT = 8, 8
MASKED = (1, 6, 7)
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def tiny() -> nn.Module:
    return build(TINY, random_weights_seed=1).model.double().train()


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return pixels(B, seed=4).double(), torch.randint(1, 49000, (B, CONTEXT), generator=draw)


def plain(model: nn.Module, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """The one big batch by the formula, without anything of ours but the towers."""
    out = model(images, texts)
    x, y = out["image_features"], out["text_features"]
    logits = out["logit_scale"] * x @ y.T
    own = torch.arange(len(x))
    loss = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**grads, "loss": loss.detach()}


def all_cases(rank: int, world: int) -> dict:
    return {(p, m): ours(rank, world, p, m, False) for p in (1, 2) for m in ((), MASKED)}


@functools.cache
def by_ranks(world: int) -> list[dict]:
    return in_ranks(world, all_cases, world)


def ours(rank: int, world: int, pieces: int, masked: tuple[int, ...], lock: bool) -> dict:
    model = tiny()
    if lock:
        model.lock_image_tower()
    images, texts = batch()
    for slot in masked:  # what stands in a masked slot must not matter
        images[slot], texts[slot] = math.pi, 7
    place = Place(rank, world, rank, torch.device("cpu"))
    mine = slice(rank * B // world, (rank + 1) * B // world)
    hidden = torch.zeros(B, dtype=torch.bool)
    hidden[list(masked)] = True
    fed = Fed(images[mine], texts[mine], masked=hidden[mine])
    loss = backward(Towers(model, wrap(model, place), place, "fp32", pieces), fed)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**grads, "loss": loss}


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == torch.float64
        assert torch.allclose(got[name], want[name], rtol=0, atol=TOLERANCE), name
    assert all(want[name].abs().max() > 1e-8 for name in ("loss", "logit_scale", "visual.proj"))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("masked", [(), MASKED], ids=["whole", "masked"])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_pieces_give_the_gradients_of_the_big_batch(world, pieces, masked):
    images, texts = batch()
    kept = [i for i in range(B) if i not in masked]
    want = plain(tiny(), images[kept], texts[kept])
    got = [cases[pieces, masked] for cases in by_ranks(world)]
    mean = sum(one["loss"] for one in got) / world
    for one in got:
        close({**one, "loss": mean}, want)


def test_pieces_leave_a_locked_tower_alone():
    images, texts = batch()
    model = tiny()
    model.lock_image_tower()
    want = plain(model, images, texts)
    got = ours(0, 1, 4, (), True)
    assert "visual.proj" not in want
    assert set(got) == set(want)
    assert all(torch.allclose(got[name], want[name], rtol=0, atol=TOLERANCE) for name in want)


def test_what_a_tower_draws_is_drawn_alike_in_both_forwards():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Linear(4, 3).double()
            self.logit_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
            self.drawn: list[Tensor] = []

        def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
            noise = torch.randn(len(images), 4, dtype=torch.float64)
            self.drawn.append(noise)
            x = functional.normalize(self.visual(images + noise), dim=-1)
            return {"image_features": x, "text_features": functional.normalize(texts, dim=-1),
                    "logit_scale": self.logit_scale.exp()}  # fmt: skip

    torch.manual_seed(0)
    model = Noisy()
    fed = Fed(torch.randn(6, 4).double(), torch.randn(6, 3).double())
    place = Place(0, 1, 0, torch.device("cpu"))
    backward(Towers(model, model, place, "fp32", 3), fed)
    first, second = model.drawn[:3], model.drawn[3:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_a_batch_that_is_masked_as_a_whole_costs_nothing_and_gives_no_nan():
    x = functional.normalize(torch.randn(3, 4, dtype=torch.float64), dim=-1).requires_grad_()
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(x, x.detach().roll(1, 0), scale, torch.ones(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert scale.grad.item() == 0


def test_the_norm_is_that_of_all_gradients_and_clipping_shortens_them():
    model = nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 3), 2.0), torch.full((2,), 2.0)
    assert gradient_norm(model, None).item() == pytest.approx(math.sqrt(32))
    assert model.weight.grad.max() == 2.0
    assert gradient_norm(model, 1.0).item() == pytest.approx(math.sqrt(32))
    assert gradient_norm(model, None).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(
        os.environ.get("LAZYCLIP_TEST_FAULTS") != "1",
        reason="compiling takes minutes on a CPU: make test-faults"))],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_compiled_towers_give_the_same_gradients(backend):
    images, texts = batch()
    fed = Fed(images.float(), texts)
    place = Place(0, 1, 0, torch.device("cpu"))
    found = []
    for compiled in (False, True):
        model = tiny().float()
        names = set(model.state_dict())
        if compiled:
            model.compile(backend=backend)
        loss = backward(Towers(model, model, place, "fp32"), fed)
        assert set(model.state_dict()) == names
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({**grads, "loss": loss})
    plain, other = found
    assert set(plain) == set(other)
    for name, value in plain.items():
        assert torch.allclose(value, other[name], rtol=1e-3, atol=1e-4), name
