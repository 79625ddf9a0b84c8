"""Forward and backward of one step, in one piece or in several with the gradient of one.

Not here: when a step is taken and what becomes of its gradient (`loop`).
"""

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .data.pixels import to_float
from .distributed import Place
from .feed import Fed
from .objectives import contrastive_loss
from .sharded import gradient_norm as norm_of_shares


@dataclasses.dataclass(frozen=True)
class Towers:
    """A model as a step needs it.

    Fields: bare model; wrapped, the same for gradients over several ranks; place; precision
    `fp32` or `amp_bf16`; pieces, a batch is computed in so many parts; mean and std of each
    channel, by which uint8 images are normalised.
    """

    bare: nn.Module
    wrapped: nn.Module
    place: Place
    precision: str
    pieces: int = 1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which a forward runs."""
        on = self.precision == "amp_bf16"
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=on)

    def quiet(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which gradients may stay with their rank.

        Those of a model in shares do not: kept back, each rank would hold all of them.
        """
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return self.wrapped.no_sync()
        return contextlib.nullcontext()


def backward(towers: Towers, fed: Fed) -> Tensor:
    """Add a batch's gradients to the parameters, averaged over the ranks.

    Returns:
        This rank's loss, detached.
    """
    device = towers.place.device
    # As bytes a batch travels to the device in a quarter of the time.
    images = to_float(fed.images.to(device, non_blocking=True), towers.mean, towers.std)
    texts = fed.texts.to(device, non_blocking=True)
    masked = None if fed.masked is None else fed.masked.to(device, non_blocking=True)
    if towers.pieces > 1:
        return _in_pieces(towers, images, texts, masked)
    with towers.autocast():
        out = towers.wrapped(images, texts)
    loss = contrastive_loss(out["image_features"], out["text_features"], out["logit_scale"], masked)
    loss.backward()
    return loss.detach()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), gpu


def _put_back(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _in_pieces(towers: Towers, images: Tensor, texts: Tensor, masked: Tensor | None) -> Tensor:
    """Do the same by features first, all of them, and then one piece after another with gradient.

    The loss of the whole batch gives the gradient at each feature; a second forward of each piece
    carries it to the parameters. What a tower draws (dropped patches) is drawn alike both times.
    """
    device = towers.place.device
    parts = list(zip(images.chunk(towers.pieces), texts.chunk(towers.pieces), strict=True))
    states, features = [], []
    with torch.no_grad(), towers.autocast():
        for part in parts:
            states.append(_random_state(device))
            out = towers.bare(*part)
            features.append((out["image_features"], out["text_features"]))
        scale = out["logit_scale"].detach().clone().requires_grad_()
    x = torch.cat([image for image, _ in features]).requires_grad_()
    y = torch.cat([text for _, text in features]).requires_grad_()
    loss = contrastive_loss(x, y, scale, masked)
    wanted = torch.autograd.grad(loss, (x, y, scale))
    sizes = [len(part[0]) for part in parts]
    grads = list(zip(wanted[0].split(sizes), wanted[1].split(sizes), strict=True))
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        _put_back(states[number], device)
        # Gradients travel between the ranks once, with the last piece.
        with contextlib.nullcontext() if last else towers.quiet():
            with towers.autocast():
                out = towers.wrapped(*part)
            # The scale has one gradient, not one for each piece.
            of_scale = wanted[2] if last else torch.zeros_like(wanted[2])
            roots = (out["image_features"], out["text_features"], out["logit_scale"])
            given = zip(roots, (*grads[number], of_scale), strict=True)
            # A frozen tower's features take none.
            taken = [(root, grad) for root, grad in given if root.requires_grad]
            torch.autograd.backward([root for root, _ in taken], [grad for _, grad in taken])
    return loss.detach()


def gradient_norm(model: nn.Module, clip: float | None) -> Tensor:
    """Return the norm of all gradients, and clip them where asked for."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if any(isinstance(grad, DTensor) for grad in grads):
        return norm_of_shares(grads, clip)
    if clip:
        return nn.utils.clip_grad_norm_(model.parameters(), clip)
    return nn.utils.get_total_norm(grads)
