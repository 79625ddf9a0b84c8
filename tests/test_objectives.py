"""The contrastive loss: value and every gradient, on one rank and on two, in float64."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lazyclip.factory import build
from training.distributed import Place, counted, from_first, total
from training.objectives import contrastive_loss

WORLD, B, E = 2, 3, 5
SEEDS = (0, 1, 2)
TOLERANCE = 1e-10


class TwoTowers(nn.Module):
    """A picture tower, a text tower and a temperature, shaped like CLIP for the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(48, 7), nn.GELU(), nn.Linear(7, E))
        self.words = nn.EmbeddingBag(11, E, mode="sum")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": functional.normalize(self.visual(images), dim=-1),
            "text_features": functional.normalize(self.words(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def towers(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TwoTowers().double()


def nano(seed: int) -> nn.Module:
    return build("LaSt-ViT-nano", random_weights_seed=seed).model.double().train()


def data(seed: int, side: int, words: int, length: int) -> tuple[Tensor, Tensor]:
    """The global batch: WORLD * B pictures and texts."""
    draw = torch.Generator().manual_seed(100 + seed)
    images = torch.randn(WORLD * B, 3, side, side, generator=draw, dtype=torch.float64)
    return images, torch.randint(1, words, (WORLD * B, length), generator=draw)


CASES = {
    **{f"towers-{seed}": (towers, seed, data(seed, 4, 11, 4)) for seed in SEEDS},
    "nano-0": (nano, 0, data(0, 64, 49000, 16)),
}


def own_loss(x: np.ndarray, y: np.ndarray, scale: float) -> tuple[float, dict[str, np.ndarray]]:
    """Loss of one big batch and its gradients, by hand: log-sum-exp row by row.

    x, y: N x E. L = -1/2N sum_i (2 z_ii - lse_j z_ij - lse_j z_ji), z = scale x y^T.
    """
    N = len(x)
    z = np.array([[scale * float(a @ b) for b in y] for a in x])

    def lse(row):
        return row.max() + math.log(sum(math.exp(v - row.max()) for v in row))

    value = -sum(2 * z[i, i] - lse(z[i]) - lse(z[:, i]) for i in range(N)) / (2 * N)
    by_row = np.array([[math.exp(z[i, j] - lse(z[i])) for j in range(N)] for i in range(N)])
    by_column = np.array([[math.exp(z[i, j] - lse(z[:, j])) for j in range(N)] for i in range(N)])
    dz = (by_row + by_column - 2 * np.eye(N)) / (2 * N)
    return value, {"x": scale * dz @ y, "y": scale * dz.T @ x, "log_scale": (dz * z).sum()}


def expected(case: str) -> dict[str, Tensor]:
    """What the big batch on one process gives, gradients of the towers by the chain rule."""
    make, seed, (images, texts) = CASES[case]
    model = make(seed)
    out = model(images, texts)
    x, y = out["image_features"], out["text_features"]
    value, grads = own_loss(
        x.detach().numpy(), y.detach().numpy(), float(out["logit_scale"].detach())
    )
    gx, gy = torch.from_numpy(grads["x"]), torch.from_numpy(grads["y"])
    torch.autograd.backward([x, y], [gx, gy])
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found["logit_scale"] = torch.tensor(grads["log_scale"])
    return {**found, "loss": torch.tensor(value), "x": gx, "y": gy}


def trained(case: str, rank: int, world: int) -> dict[str, Tensor]:
    """What one rank gets from the trainer's loss and DDP."""
    make, seed, (images, texts) = CASES[case]
    model = make(seed)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    rows = slice(rank * len(images) // world, (rank + 1) * len(images) // world)
    out = wrapped(images[rows], texts[rows])
    for name in ("image_features", "text_features"):
        out[name].retain_grad()
    loss = contrastive_loss(out["image_features"], out["text_features"], out["logit_scale"])
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # The ranks' losses are averaged: a rank's features count for the world-th part.
    x, y = (out[name].grad / world for name in ("image_features", "text_features"))
    return {**found, "loss": loss.detach(), "x": x, "y": y}


def one_rank(rank: int, folder: str) -> None:
    """What each of the spawned processes does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    found = {case: trained(case, rank, WORLD) for case in CASES}
    place = Place(rank, WORLD, rank, torch.device("cpu"))
    mine = torch.tensor([1.0 + rank])
    found["helpers"] = {
        "total": total(mine, place), "mine": mine,
        "name": from_first(f"name {rank}", place),
        "counted": dict(counted([Counter(a=2), Counter(a=1, b=5)][rank], place)),
    }  # fmt: skip
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, args=(str(folder),), nprocs=WORLD)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]


def close(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float64 and torch.allclose(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_one_rank_has_loss_and_all_gradients_of_the_formula(case):
    want, got = expected(case), trained(case, 0, 1)
    assert set(got) == set(want)
    assert all(close(got[name], want[name]) for name in want)
    assert all(want[name].abs().max() > 1e-6 for name in ("loss", "x", "y", "logit_scale"))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_loss_and_all_gradients_of_the_one_big_batch(ranks, case):
    want = expected(case)
    got = [rank[case] for rank in ranks]
    assert close(sum(g["loss"] for g in got) / WORLD, want["loss"])
    assert not close(got[0]["loss"], got[1]["loss"])
    for name in ("x", "y"):
        assert close(torch.cat([g[name] for g in got]), want[name])
    parameters = set(want) - {"loss", "x", "y"}
    assert "logit_scale" in parameters
    for g in got:
        assert set(g) == set(want)
        assert all(close(g[name], want[name]) for name in parameters)


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_share_sums_counts_and_the_first_ranks_value(ranks):
    for rank, found in enumerate(ranks):
        helpers = found["helpers"]
        assert helpers["total"].item() == 3.0
        assert helpers["mine"].item() == 1.0 + rank
        assert helpers["name"] == "name 0"
        assert helpers["counted"] == {"a": 3, "b": 5}


def test_half_precision_features_give_a_float32_loss():
    x = functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    y, scale = x.roll(1, 0), torch.tensor(10.0)
    half = contrastive_loss(x.bfloat16(), y.bfloat16(), scale)
    assert half.dtype == torch.float32
    rounded, _ = own_loss(x.bfloat16().double().numpy(), y.bfloat16().double().numpy(), 10.0)
    assert float(half) == pytest.approx(rounded, abs=1e-5)


def test_matched_pairs_cost_nothing_at_a_high_temperature_and_chance_at_zero():
    x = torch.eye(6, dtype=torch.float64)
    assert float(contrastive_loss(x, x, torch.tensor(1000.0))) == pytest.approx(0, abs=1e-12)
    assert float(contrastive_loss(x, x, torch.tensor(0.0))) == pytest.approx(math.log(6))
