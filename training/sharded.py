"""A model whose weights, gradients and optimiser state lie in shares on the ranks (FSDP2).

Each block of both towers is gathered when it computes and let go afterwards; what lies outside the
blocks forms one more such unit. Weights stay float32, and bf16 comes from autocast, as under
DistributedDataParallel: the two ways to train differ in where numbers lie, not in what they are.
Files hold the model and the optimiser in one piece, laid out as a run without shares writes them.
Not here: the step (`step`), the files (`state`, `resume`).
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lazyclip import bridge

from .distributed import Place


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of both towers; none of a tower that has no such blocks."""
    trunk = bridge.trunk_of(model)
    seeing = [] if bridge.refusal(trunk) else bridge.blocks_of(trunk)
    return [*seeing, *bridge.text_blocks_of(model)]


def describe_shares(model: nn.Module, place: Place) -> str:
    """Phrase how the model is shared out."""
    if place.world == 1:
        return "sharding: --fsdp does nothing in one process"
    held = sum(p.numel() for p in model.parameters()) / place.world
    return (
        f"sharding: {len(blocks_of(model))} blocks and the rest over {place.world} ranks, "
        f"{held:,.0f} parameters on each"
    )


def shard(model: nn.Module, place: Place) -> "Sharded":
    """Spread a model's weights over the ranks, in place; its parameters become `DTensor`s.

    Every rank keeps its share of its own weights, so all must have built the same model. The
    optimiser is made afterwards.
    """
    twin = _without_weights(model)
    mesh = init_device_mesh(place.device.type, (place.world,))
    # fully_shard refuses parameters without an axis (the logit scale): each rank keeps them.
    scalars = {p for p in model.parameters() if not p.dim()}
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(_average)
    return Sharded(model, twin)


def _average(parameter: Tensor) -> None:
    """Make a gradient the ranks' mean; once more changes nothing, so pieces may be added up."""
    grad = cast(Tensor, parameter.grad)
    dist.all_reduce(grad)
    grad.div_(dist.get_world_size())


def _without_weights(model: nn.Module) -> nn.Module:
    """Copy a model whose parameters have shapes and take no memory; buffers are copied."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


@dataclasses.dataclass(frozen=True)
class OptimizerState:
    """An optimiser's state in one piece, to be saved as one is."""

    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """Return the state, laid out as that of a run without shares."""
        return self.state


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A model in shares, and what brings it together again.

    Fields: model, in shares; twin, the same plain model without weights, filled when something
    needs it whole.
    """

    model: nn.Module
    twin: nn.Module

    @contextlib.contextmanager
    def whole(self, device: torch.device, here: bool = True) -> Iterator[nn.Module]:
        """Hold the model in one piece, outside of FSDP; every rank calls, none waits for another
        inside.

        Args:
            device: where the weights come to.
            here: whether this rank needs them; else what it gets has no weights.
        """
        weights = {
            name: _gather(value, device if here else None)
            for name, value in self.model.state_dict().items()
        }
        try:
            if here:
                self.twin.load_state_dict(weights, assign=True)
                weights = {}
            yield self.twin
        finally:
            empty = {name: value.to("meta") for name, value in self.twin.state_dict().items()}
            self.twin.load_state_dict(empty, assign=True)

    def optimizer_state(self, optimizer: torch.optim.Optimizer, here: bool) -> OptimizerState:
        """Gather an optimiser's state on the CPU; every rank calls.

        Args:
            optimizer: of the model in shares.
            here: whether this rank needs it; else what it gets has no tensors.
        """
        device = torch.device("cpu") if here else None
        held = optimizer.state_dict()
        state = {
            number: {name: _gather(value, device) for name, value in values.items()}
            for number, values in held["state"].items()
        }
        return OptimizerState({**held, "state": state})

    def restore(
        self, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Put a checkpoint's weights and optimiser state back, each rank its share.

        Args:
            weights: by name, in one piece; the same on every rank.
            optimizer: of the model in shares.
            state: of an optimiser, in one piece; the same on every rank.
        """
        own = self.model.state_dict()
        self.model.load_state_dict(
            {name: _share(value.to(own[name].dtype), own[name]) for name, value in weights.items()}
        )
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        shares = {
            number: {name: _share(value, parameters[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": shares})


@contextlib.contextmanager
def in_one_piece(
    sharded: Sharded | None, model: nn.Module, device: torch.device, here: bool = True
) -> Iterator[nn.Module]:
    """Hold a model in one piece: gathered, where it lies in shares (`Sharded.whole`), or itself."""
    if sharded is None:
        yield model
        return
    with sharded.whole(device, here) as whole:
        yield whole


def _gather(value: Any, device: torch.device | None) -> Any:
    """Return a tensor in one piece on a device; with None take part, and keep nothing of it.

    A collective for each share, so that no more than one is whole on the device at a time.
    """
    if not isinstance(value, Tensor):
        return value
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return None if device is None else full.detach().to(device, copy=full is value)


def _share(value: Any, like: Tensor) -> Any:
    """Return this rank's share of a tensor, cut as another one is; without an axis, all of it.

    Copied: the file it comes from is only mapped, and may be pruned.
    """
    if not isinstance(value, Tensor):
        return value
    if not isinstance(like, DTensor) or not value.dim():
        return value.clone()
    # Every rank has the whole tensor: it cuts, and nothing is sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).clone()


def gradient_norm(grads: Sequence[Tensor], clip: float | None) -> Tensor:
    """Return the norm of gradients that lie in shares, the same on every rank, and clip them.

    Args:
        grads: shares, and whole ones that are equal on all ranks.
        clip: largest norm, None for any.
    """
    shares = [g.to_local() for g in grads if isinstance(g, DTensor)]
    whole = [g for g in grads if not isinstance(g, DTensor)]
    squared = nn.utils.get_total_norm(shares).square()
    dist.all_reduce(squared)
    norm = (squared + nn.utils.get_total_norm(whole).square().to(squared.device)).sqrt()
    if clip:
        factor = (clip / (norm + 1e-6)).clamp(max=1.0)  # as torch's own clip_grad_norm_
        for grad in (*shares, *whole):
            grad.mul_(factor)
    return norm
