"""A model in shares (FSDP2) on gloo ranks trains, saves and goes on as one under DDP does."""

import copy
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lazyclip.factory import build
from tests.toy_faults import run
from tests.toy_models import EVA, KINDS, NATIVE, pixels
from tests.toy_ranks import in_ranks
from tests.toy_run import CLASSES, TINY, metrics, small, train, world
from training import step as step_module
from training.assemble import make_trained
from training.distributed import Place
from training.feed import Fed
from training.ledger import read_lines
from training.params import TrainArgs
from training.sharded import blocks_of, in_one_piece
from training.state import STATE_FILE
from training.step import Towers, backward
from training.step import gradient_norm as norm_of

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


# --- steps in float64 ----------------------------------------------------------------------------


class Case(NamedTuple):
    """How a few steps are taken."""

    kind: str = NATIVE
    pieces: int = 1
    clip: float | None = None
    lock: str = ""
    checkpointing: bool = False
    foreach: bool = False
    precision: str = "fp32"
    layer_decay: float = 1.0


CASES = {
    "plain": Case(),
    "pieces": Case(pieces=2),
    "clipped": Case(clip=0.05),
    "pieces, clipped": Case(pieces=2, clip=0.05),
    "image locked": Case(lock="image", pieces=2),
    "text locked": Case(lock="text"),
    "checkpointing": Case(checkpointing=True),
    "many groups, each at once": Case(foreach=True, layer_decay=0.5),
    "bf16": Case(precision="amp_bf16", pieces=2),
    "EVA": Case(kind=EVA),
    "timm": Case(kind=KINDS[2], pieces=2),
}
# Two ways to the same sums: rounding of float64, and of bf16 where that is asked for.
TOLERANCE = {"fp32": 1e-11, "amp_bf16": 2e-3}
STEPS, B, CONTEXT = 2, 12, 8
# By the native model everything but the tower's kind is tried on ranks that cut unevenly too.
ON_THREE = ("pieces, clipped", "text locked")


@functools.cache
def built(kind: str) -> nn.Module:
    return build(f"LaSt-{kind}", random_weights_seed=1).model.train()


def model_of(case: Case) -> nn.Module:
    model = copy.deepcopy(built(case.kind))
    if case.precision == "fp32":
        model = model.double()
    if case.lock == "image":
        model.lock_image_tower()
    if case.lock == "text":
        model.lock_text_tower()
    if case.checkpointing:
        model.set_grad_checkpointing()
    return model


def steps(case: Case, place: Place, fsdp: bool) -> dict:
    """Losses, norms, weights and optimiser of a few steps, in one piece."""
    args = TrainArgs(fsdp=fsdp, lr=1e-2, layer_decay=case.layer_decay)
    sharded, wrapped, optimizer = make_trained(model := model_of(case), args, place)
    for group in optimizer.param_groups:
        group["foreach"] = case.foreach
    towers = Towers(model, wrapped, place, case.precision, case.pieces)
    mine = slice(place.rank * B // place.world, (place.rank + 1) * B // place.world)
    found: dict = {"loss": [], "norm": []}
    for number in range(STEPS):
        draw = torch.Generator().manual_seed(number)
        texts = torch.randint(1, 49000, (B, CONTEXT), generator=draw)
        images = pixels(B, seed=number).to(next(model.parameters()).dtype)
        optimizer.zero_grad(set_to_none=True)
        found["loss"].append(backward(towers, Fed(images[mine], texts[mine])))
        found["norm"].append(norm_of(model, case.clip))
        optimizer.step()
    held = optimizer if sharded is None else sharded.optimizer_state(optimizer, place.first)
    with in_one_piece(sharded, model, CPU, place.first) as whole:
        found["kind"] = type(whole).__name__
        if place.first:
            found["weights"] = {k: v.clone() for k, v in whole.state_dict().items()}
            found["optimizer"] = held.state_dict()
    local = [p.to_local() if fsdp else p for p in model.parameters() if p.dim()]
    found["held"] = sum(p.numel() for p in local)
    return found


def both_ways(rank: int, world: int, names: tuple[str, ...]) -> dict:
    place = Place(rank, world, rank, CPU)
    return {name: [steps(CASES[name], place, way) for way in (False, True)] for name in names}


def close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance, msg=name)


def compare(parts: list[dict], name: str) -> None:
    """Hold the run in shares against that under DDP, by all that is left of both."""
    tolerance = TOLERANCE[CASES[name].precision]
    for of_rank in parts:
        ddp, fsdp = of_rank[name]
        for what in ("loss", "norm"):
            got, want = (torch.stack(found[what]).double() for found in (fsdp, ddp))
            torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
            assert want.min() > 1e-2
    ddp, fsdp = parts[0][name]
    assert fsdp["kind"] == ddp["kind"]
    close(fsdp["weights"], ddp["weights"], tolerance)
    ours, theirs = fsdp["optimizer"], ddp["optimizer"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert set(ours["state"]) == set(theirs["state"])
    for number, state in theirs["state"].items():
        close(ours["state"][number], state, tolerance)
    # Every rank has the norm of all and a share of the weights.
    assert len({tuple(map(float, of_rank[name][1]["norm"])) for of_rank in parts}) == 1
    held = [of_rank[name][1]["held"] for of_rank in parts]
    assert sum(held) == ddp["held"]
    assert max(held) < 1.2 * ddp["held"] / len(parts)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "names"), [(2, tuple(CASES)), (3, ON_THREE)])
def test_losses_norms_weights_and_moments_are_those_of_ddp(ranks, names):
    for name in names:  # here, so that each rank need not
        built(CASES[name].kind)
    parts = in_ranks(ranks, both_ways, ranks, names)
    for name in names:
        compare(parts, name)


def test_blocks_of_both_towers_are_shared_out():
    for kind in KINDS:
        assert len(blocks_of(built(kind))) == 2 + 1


# --- the command ---------------------------------------------------------------------------------

# Step 2 is spoiled on one rank only; 5 and 6 then are too many, and step 3's weights come back.
SPOILED, STEP = {2, 5, 6}, "step_00000003"
# The first rank scores two batches, the second one.
HOW = {"train_data": world, "train_num_samples": 28, "epochs": 2, "model": TINY, "save_every": 3,
       "max_nonfinite": 2, "grad_clip_norm": 1.0, "val_data": world, "val_num_samples": 9,
       "classes": ",".join(CLASSES), "templates": "plain", "probe_every": 4}  # fmt: skip
ROUNDING = 1e-5


def spoil() -> None:
    """Make some losses NaN on the last rank."""
    from training.loop import Loop

    plain, advance = step_module.contrastive_loss, Loop._advance
    bad = []

    def loss(*values):
        return plain(*values) * (float("nan") if bad else 1.0)

    def noting(self, fed):
        place = self.run_.place
        bad[:] = [1] * (self.step + 1 in SPOILED and place.rank == place.world - 1)
        return advance(self, fed)

    step_module.contrastive_loss, Loop._advance = loss, noting


def command(logs: Path, name: str, ranks: int = 2, **changes) -> Path:
    how = {k: v() if callable(v) else v for k, v in {**HOW, **changes}.items()}
    words = small(logs=logs, name=name, batch_size=8 // ranks, **how)
    codes = run(ranks, words, logs / f"{name}.log", spoil)
    if any(codes):
        raise RuntimeError((logs / f"{name}.log").read_text()[-3000:])
    return logs / name


class Two(NamedTuple):
    """A run under DDP and one in shares."""

    ddp: Path
    fsdp: Path


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Iterator[Two]:
    logs = tmp_path_factory.mktemp("two")
    yield Two(command(logs, "ddp"), command(logs, "fsdp", fsdp=True))
    shutil.rmtree(logs)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "open_clip_model.safetensors")


def steps_of(folder: Path) -> list[float]:
    """Loss (NaN where it was not finite) and scale of each step."""
    kept = [line for line in metrics(folder) if "train/loss" in line]
    nan = float("nan")
    return [v for m in kept for v in (m["train/loss"] or nan, m["logit_scale"])]


def lines(folder: Path, *names: str) -> list[list]:
    return [[line.get(name) for name in ("step", *names)] for line in metrics(folder)]


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_in_shares_leaves_what_a_run_under_ddp_leaves(two):
    assert steps_of(two.fsdp) == pytest.approx(steps_of(two.ddp), rel=ROUNDING, nan_ok=True)
    assert lines(two.fsdp, "lr", "samples", "probe/top1") == lines(
        two.ddp, "lr", "samples", "probe/top1"
    )
    ours, theirs = (
        {str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (two.fsdp, two.ddp)
    )
    assert ours == theirs
    for part in ("model", f"checkpoints/{STEP}"):
        close(weights(two.fsdp / part), weights(two.ddp / part), ROUNDING)
    state, other = (
        torch.load(f / "checkpoints" / STEP / STATE_FILE, weights_only=True)
        for f in (two.fsdp, two.ddp)
    )
    same = set(other) - {"args", "optimizer", "random"}
    assert {k: state[k] for k in same} == {k: other[k] for k in same}
    assert state["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    for number, held in other["optimizer"]["state"].items():
        close(state["optimizer"]["state"][number], held, ROUNDING)


@pytest.mark.slow
@pytest.mark.dist
def test_what_is_not_finite_is_skipped_and_gone_back_from_as_under_ddp(two):
    for folder in two:
        for rank in (0, 1):
            events = [
                (line["step"], line["event"])
                for line in read_lines(folder / f"ledger-rank{rank}.jsonl")
            ]
            assert events == [
                *((step, "not finite") for step in (2, 5, 6)), (6, "went back")
            ]  # fmt: skip
    scales = [line["logit_scale"] for line in metrics(two.fsdp) if "logit_scale" in line]
    assert scales[0] == scales[1] != scales[2] == scales[5]


def going_on(two: Two, tmp_path: Path, source: str, ranks: int, **flags) -> Path:
    """Go on from the first checkpoint of a run, in a folder of its own."""
    kept = tmp_path / source / "checkpoints" / STEP
    shutil.copytree(getattr(two, source) / "checkpoints" / STEP, kept)
    return command(tmp_path, source, ranks, resume="latest", **flags)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("source", "ranks", "flags"),
    [
        ("fsdp", 2, {}),
        ("fsdp", 2, {"no_fsdp": True}),
        ("ddp", 2, {"fsdp": True}),
        ("fsdp", 1, {}),
        ("ddp", 4, {"fsdp": True}),
    ],
    ids=["shares", "shares to DDP", "DDP to shares", "shares to one process", "DDP to four shares"],
)
def test_a_run_goes_on_in_shares_and_without(two, tmp_path, source, ranks, flags):
    folder = going_on(two, tmp_path, source, ranks, **flags)
    got, want = steps_of(folder), steps_of(getattr(two, source))[2 * 3 :]
    ours, theirs = weights(folder / "model"), weights(getattr(two, source) / "model")
    if source == "fsdp" and not flags and ranks == 2:  # nothing changed: no digit does
        assert lines(folder, "train/loss", "logit_scale", "lr", "probe/top1") == [
            line
            for line in lines(two.fsdp, "train/loss", "logit_scale", "lr", "probe/top1")
            if line[0] > 3
        ]
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert got == pytest.approx(want, rel=ROUNDING, nan_ok=True)
    close(ours, theirs, ROUNDING)
    log = (tmp_path / f"{source}.log").read_text()
    assert ("sharding: 3 blocks and the rest over" in log) == (ranks > 1 and "no_fsdp" not in flags)
    shutil.rmtree(tmp_path / source)


def test_one_process_has_nothing_to_share_and_says_so(tmp_path):
    ran = train(tmp_path, train_data=world(), model=TINY, fsdp=True, dry_run=True)
    assert ran.code == 0
    assert "sharding: --fsdp does nothing in one process" in ran.out


def test_shares_and_compiling_together_are_refused(tmp_path):
    ran = train(tmp_path, train_data=world(), model=TINY, fsdp=True, torchcompile=True)
    assert ran.code == 2
    assert ran.err.splitlines()[-1] == (
        "error: --fsdp with --torchcompile is not offered; drop one of the two"
    )
    assert not list(tmp_path.iterdir())
