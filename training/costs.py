"""What a run costs before it is started: work, memory, reading, checkpoints.

Everything follows from the shapes of the model's parameters and from the plan; nothing is run. The
model may lie on torch's meta device. Sizes of letters: B samples of a rank and step, T tokens with
prefix, N patch tokens, D width, H width inside the MLP, E joint width. FLOP counts a multiplication
and an addition as two. Not here: how the figures are phrased (`dryrun`).

Checked against `torch.utils.flop_counter`, the tensors that autograd keeps, a checkpoint's files
(`tests/test_costs.py`) and open_clip's docs/model_profile.csv: 41.1 (B/16), 175.3 (L/14) and 395.2
GFLOP (L/14 at 336 px) forward per sample.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from lazyclip import bridge
from lazyclip.base.checkpoint import first_of_spans
from lazyclip.factory import ModelInfo

from .params import TrainArgs
from .preflight import Plan
from .state import KEPT_EVERY

# Dense peak of the data sheets, FLOP/s, by precision; float32 without TF32, torch's default.
PEAKS = {
    "a100": {"amp_bf16": 312e12, "fp32": 19.5e12},
    "h100": {"amp_bf16": 989e12, "fp32": 67e12},
}
# Bytes of memory of the larger card of each kind that torch finds free of 80 GB.
GPU_MEMORY = {"a100": 79.1 * 2**30, "h100": 79.1 * 2**30}
MFU = 0.3
# Bytes of a sample in its shard, and samples that a core reads, decodes and tokenises in a second:
# shards cut at 256 px, and at 512 px. Bytes: LAION as img2dataset writes it. Rates: measured,
# results/2026-11-25-loader-speed.
SMALL, LARGE = (33_000, 691.0), (120_000, 211.0)
SMALL_UP_TO = 256


@dataclasses.dataclass(frozen=True)
class Tower:
    """One tower in figures.

    Fields: tokens T; width D; hidden H; gated, the MLP multiplies two branches (EVA's SwiGLU);
    quick, its activation is QuickGELU; work, forward FLOP per sample of each layer (0 embeddings,
    i + 1 block i, last the projection); trained, the layers with a trained parameter.
    """

    tokens: int
    width: int
    hidden: int
    gated: bool
    quick: bool
    work: tuple[float, ...]
    trained: frozenset[int]

    @property
    def forward(self) -> float:
        """FLOP of a forward, per sample."""
        return sum(self.work)

    def training(self) -> float:
        """FLOP of a forward and a backward, per sample: trained layers three times, others once."""
        return sum(work * (3 if i in self.trained else 1) for i, work in enumerate(self.work))

    def blocks_trained(self) -> list[int]:
        """Return the layer numbers of the trained blocks."""
        return [i for i in range(1, len(self.work) - 1) if i in self.trained]

    def bytes_of_block(self, precision: str) -> float:
        """Bytes that autograd keeps of a block, per sample (counted, see `tests/test_costs.py`).

        Per token, for a plain MLP: two inputs and two outputs of a norm, q, k and v, what attention
        gives: 8 D; before and behind the activation 2 H, with QuickGELU 3 H. For EVA: q and k
        before and behind the rotation too, 10 D, and 5 H. With amp_bf16 a norm's input is kept in
        float32, and a norm's output of EVA's once for each projection that takes it.
        """
        if self.gated:
            wide = 30 * self.width + 12 * self.hidden
            return self.tokens * (wide if precision == "amp_bf16" else self._floats(10, 5))
        inner = 3 if self.quick else 2
        if precision == "amp_bf16":
            return self.tokens * (20 * self.width + 2 * inner * self.hidden)
        return self.tokens * self._floats(8, inner)

    def _floats(self, of_width: int, of_hidden: int) -> float:
        return 4.0 * (of_width * self.width + of_hidden * self.hidden)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the height of a step; CUDA's own and fragmentation are not in it.

    Fields: weights; gradients; optimizer, AdamW's two moments; buckets, DDP's gradients again;
    copies, weights in bfloat16; activations, what autograd keeps; workspace, one block's gradients;
    loss, gathered features and logits.
    """

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    copies: float
    activations: float
    workspace: float
    loss: float

    @property
    def total(self) -> float:
        """All of it together."""
        return sum(dataclasses.astuple(self))

    @property
    def needed(self) -> float:
        """What a card must have: CUDA's own gibibyte and a tenth for fragmentation are guesses."""
        return 1.1 * self.total + 2**30


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a run costs; bytes, FLOP, seconds and samples, of all ranks where nothing is said.

    Fields: forward, FLOP per sample of `image`, `text` and `pooling`; training, FLOP per sample of
    forward and backward; again, FLOP per sample that checkpointing and pieces compute twice; memory
    of each GPU; bytes_per_sample and samples_per_core, with measured telling whether the bytes were
    counted in the shards.
    """

    gpu: str
    gpus: int
    peak: float
    mfu: float
    samples: int
    steps: int
    forward: Mapping[str, float]
    training: float
    again: float
    memory: Memory
    bytes_per_sample: float
    measured: bool
    samples_per_core: float
    model_bytes: int
    checkpoint_bytes: int
    checkpoints: int

    @property
    def flop(self) -> float:
        """FLOP of the whole run."""
        return self.samples * (self.training + self.again)

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs together, at `mfu` of the peak, all that is computed counted."""
        return self.flop / (self.peak * self.mfu) / 3600

    @property
    def hours(self) -> float:
        """Hours by the clock."""
        return self.gpu_hours / self.gpus

    @property
    def samples_per_s(self) -> float:
        """Samples in a second."""
        return self.samples / (3600 * self.hours)

    @property
    def read_per_s(self) -> float:
        """Bytes read in a second."""
        return self.samples_per_s * self.bytes_per_sample

    @property
    def decode_cores(self) -> float:
        """Cores that keep up with the GPUs."""
        return self.samples_per_s / self.samples_per_core

    @property
    def kept_bytes(self) -> int:
        """Bytes of the checkpoints that stay, and of the model at the end."""
        return self.checkpoints * self.checkpoint_bytes + self.model_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return fields and what follows from them, for JSON."""
        derived = ("flop", "gpu_hours", "hours", "samples_per_s", "read_per_s", "decode_cores",
                   "kept_bytes")  # fmt: skip
        about = {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}
        about["memory"].update(total=self.memory.total, needed=self.memory.needed)
        return about


def _prefix(model: nn.Module) -> int:
    """Count the image tower's prefix tokens by their own parameters."""
    names = ("class_embedding", "cls_token", "reg_token")
    found = [
        p for n, p in model.named_parameters() if n.startswith("visual.") and n.endswith(names)
    ]
    return sum(p.shape[-2] if p.dim() == 3 else 1 for p in found)


def towers_of(model: nn.Module, info: ModelInfo) -> dict[str, Tower]:
    """Return the figures of `image` and `text` from the shapes of a model's parameters.

    A matrix of a block works on every token, a projection behind the blocks on one; attention is
    4 T^2 D for each block, masked or not, as open_clip counts it.

    Raises:
        UserError: a tower whose layers are not known (`bridge.layer_places`).
    """
    places = bridge.layer_places(model)
    parameters = dict(model.named_parameters())
    patches = info.grid[0] * info.grid[1]
    tokens = {"image": patches + _prefix(model), "text": info.context_length}
    made = {}
    for tower, count in tokens.items():
        mine = {name: place for name, place in places.items() if place.tower == tower}
        depth = next(iter(mine.values())).depth
        work = [0.0] * (depth + 2)
        inner = {n.split(".", 3)[-1]: parameters[n] for n, p in mine.items() if p.layer == 1}
        width = next(p.shape[-1] for n, p in parameters.items() if n in mine and _is_table(n))
        for name, place in mine.items():
            parameter = parameters[name]
            if place.in_block and parameter.dim() >= 2:
                work[place.layer] += 2.0 * parameter.numel() * count
            elif place.layer == depth + 1 and parameter.dim() >= 2:
                work[-1] += 2.0 * parameter.numel()
            elif name.endswith(("conv1.weight", "patch_embed.proj.weight")):
                work[0] += 2.0 * parameter.numel() * patches
        for layer in range(1, depth + 1):
            work[layer] += 4.0 * count * count * width
        hidden = next(p.shape[0] for n, p in inner.items() if n.endswith(_WIDENS))
        made[tower] = Tower(
            count, width, hidden, any(n.endswith("mlp.fc1_g.weight") for n in inner),
            info.activation == "quickgelu", tuple(work),
            frozenset(p.layer for n, p in mine.items() if parameters[n].requires_grad),
        )  # fmt: skip
    return made


_WIDENS = ("mlp.c_fc.weight", "mlp.fc1.weight", "mlp.fc1_g.weight")


def _is_table(name: str) -> bool:
    return name.endswith(("positional_embedding", "pos_embed"))


def pooling_flop(info: ModelInfo) -> float:
    """Return the FLOP of LaSt pooling, per image: two real FFTs along D, score, choice and mean.

    A real transform of length D counts 2.5 D log2 D; the rest 7 for each of N x D entries. Computed
    without gradient. Well under 1 % of a tower, what it costs is memory traffic.
    """
    if info.pooling["pooling"] != "last":
        return 0.0
    entries = info.grid[0] * info.grid[1] * info.width
    return entries * (5 * math.log2(info.width) + 7)


def _recomputed(towers: Mapping[str, Tower], args: TrainArgs) -> float:
    """FLOP per sample of the second forwards: of trained blocks, and of all when in pieces."""
    again = 0.0
    for tower in towers.values():
        if args.grad_checkpointing:
            again += sum(tower.work[i] for i in tower.blocks_trained())
        if args.accum_freq > 1:
            again += tower.forward
    return again


def memory_of(
    model: nn.Module,
    towers: Mapping[str, Tower],
    args: TrainArgs,
    info: ModelInfo,
    world: int,
    precision: str,
) -> Memory:
    """Estimate the bytes on each GPU at the height of a step."""
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    amp = precision == "amp_bf16"
    share = world if args.fsdp else 1
    kept, largest = 0.0, 0.0
    for tower in towers.values():
        blocks = tower.blocks_trained()
        block = tower.bytes_of_block(precision)
        largest = max(largest, block if blocks else 0.0)
        stream = tower.tokens * tower.width * 4.0
        kept += len(blocks) * (stream if args.grad_checkpointing else block)
        # The embeddings' sum and the final norm's input and output.
        kept += 3 * stream if tower.trained else 0.0
    kept += 3 * info.image_size[0] * info.image_size[1] * 4
    if args.grad_checkpointing:
        kept += largest
    rows, total = args.batch_size, args.batch_size * args.accum_freq * world
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() >= 2 and not _bare(n))
    return Memory(
        weights=4.0 * every / share,
        gradients=4.0 * trained / share,
        optimizer=8.0 * trained / share,
        buckets=4.0 * trained if world > 1 and not args.fsdp else 0.0,
        copies=2.0 * matrices if amp else 0.0,
        activations=rows * kept,
        workspace=rows * largest,
        # Both towers' features of all ranks and their gradients; both logits, their softmax and
        # gradient.
        loss=4.0 * (4 * total * info.embed_dim + 6 * rows * args.accum_freq * total),
    )


def _bare(name: str) -> bool:
    """Tell whether a table is looked up or added, and so never copied to bfloat16."""
    return _is_table(name) or name.endswith(("token_embedding.weight", "cls_token", "cls_emb"))


def checkpoint_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of a saved model's tensors, and of a whole checkpoint's.

    The model in float32; in a checkpoint AdamW's two moments and its count of steps beside it. The
    containers add some kilobytes.
    """
    state = model.state_dict().values()
    weights = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in state)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    return weights, weights + sum(8 * count + 4 for count in trained)


def checkpoints_kept(plan: Plan, keep: int, by_clock: bool = False) -> int:
    """Count the checkpoints that lie on the disk at the end.

    Args:
        plan: of the run.
        keep: the newest that stay; 0: all, of which those by the clock are not counted.
        by_clock: there are checkpoints by the clock too: all the newest may be such ones.
    """
    saved = sorted({*range(plan.save_every, plan.steps + 1, plan.save_every), plan.steps})
    if keep == 0:
        return len(saved)
    if by_clock:
        return plan.steps // KEPT_EVERY + keep
    return len(first_of_spans(saved, KEPT_EVERY) | {*saved[-keep:]})


def estimate(
    model: nn.Module,
    info: ModelInfo,
    args: TrainArgs,
    plan: Plan,
    *,
    gpus: int,
    gpu: str = "a100",
    mfu: float = MFU,
    precision: str = "amp_bf16",
    bytes_per_sample: float | None = None,
) -> Costs:
    """Estimate what a run costs.

    Args:
        model: as it will be trained, towers locked; its weights are not looked at.
        info: of the model.
        args: settings; the batch is that of a rank.
        plan: steps and samples.
        gpus: ranks.
        gpu: `a100` or `h100`.
        mfu: share of the GPU's peak that the run reaches.
        precision: `amp_bf16` or `fp32`.
        bytes_per_sample: of the shards; None for what LAION's have.

    Raises:
        UserError: a tower whose layers are not known.
    """
    towers = towers_of(model, info)
    pooling = pooling_flop(info)
    usual = SMALL if max(info.image_size) <= SMALL_UP_TO else LARGE
    weights, whole = checkpoint_bytes(model)
    return Costs(
        gpu=gpu,
        gpus=gpus,
        peak=PEAKS[gpu][precision],
        mfu=mfu,
        samples=plan.samples,
        steps=plan.steps,
        forward={"image": towers["image"].forward, "text": towers["text"].forward,
                 "pooling": pooling},
        training=sum(tower.training() for tower in towers.values()) + pooling,
        again=_recomputed(towers, args) + (pooling if args.accum_freq > 1 else 0.0),
        memory=memory_of(model, towers, args, info, gpus, precision),
        bytes_per_sample=usual[0] if bytes_per_sample is None else bytes_per_sample,
        measured=bytes_per_sample is not None,
        samples_per_core=usual[1],
        model_bytes=weights,
        checkpoint_bytes=whole,
        checkpoints=checkpoints_kept(plan, args.keep, bool(args.save_every_minutes)),
    )  # fmt: skip
