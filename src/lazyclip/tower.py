"""Give a tower LaSt pooling, take it away, and read its tokens.

Works on any CLIP model of open_clip with a ViT or EVA image tower, and on timm ViT and EVA models.
Not here: dense maps in text space (`dense`), names and weights (`factory`, `weights`).
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from lazyclip import bridge
from lazyclip.base.errors import UserError
from lazyclip.lowpass import Kernel
from lazyclip.pooling import PoolSpec, Score, pool_tokens, resolve_k


class Tokens(NamedTuple):
    """A tower's output after its final norm, before the projection.

    Fields: patches B x N x D; prefix B x P x D (CLS first); pooled B x D, by the tower's own
    pooling; grid (h, w) with h * w = N.
    """

    patches: Tensor
    prefix: Tensor
    pooled: Tensor
    grid: tuple[int, int]


def attach_spec(model: nn.Module, spec: PoolSpec) -> nn.Module:
    """Give a model's image tower a pooling, in place; see `attach`."""
    trunk = bridge.trunk_of(model)
    reason = bridge.refusal(trunk)
    if reason:
        raise UserError(f"pooling '{spec.pooling}' cannot be attached: {reason}")
    (h, w), (height, width) = bridge.geometry(trunk)[2], bridge.geometry(trunk)[0]
    try:
        resolve_k(spec.k, h * w)
    except ValueError:
        raise UserError(
            f"--last-k {spec.k} exceeds the {h * w} patches of this tower at {height} x {width} "
            f"px; use 1..{h * w}, or a fraction such as 0.5"
        ) from None
    bridge.set_pooling(trunk, spec)
    return model


def attach(
    model: nn.Module,
    pooling: str = "last",
    k: int | float = 0.5,
    score: Score = "paper",
    sigma: float | None = None,
    kernel: Kernel = "centred",
    eps: float = 1e-6,
) -> nn.Module:
    """Replace the aggregation of a model's image tower, in place and without a new parameter.

    Args:
        model: a CLIP model of open_clip, its visual tower, or a timm ViT or EVA.
        pooling: `token`, `mean`, `max` or `last`.
        k: patches kept per channel, a count or a fraction (`pooling.resolve_k`).
        score: see `pooling.stability_score`.
        sigma: see `lowpass.low_pass`.
        kernel: see `lowpass.low_pass`.
        eps: see `pooling.stability_score`.

    Returns:
        The same model.

    Raises:
        UserError: a tower without patch tokens before its pooling, an unknown option, or K > N.
    """
    return attach_spec(model, PoolSpec(pooling, score, k, sigma, kernel, eps))


def attach_mapping(tower: nn.Module, values: Mapping[str, object]) -> None:
    """Attach what a model config's `vision_cfg.last` says; unknown keys raise `UserError`."""
    attach_spec(tower, PoolSpec.from_mapping(values, "vision_cfg.last"))


def detach(model: nn.Module) -> nn.Module:
    """Give a model's image tower its own aggregation back, in place; returns the model."""
    bridge.clear_pooling(bridge.trunk_of(model))
    return model


def pooling_of(model: nn.Module) -> PoolSpec:
    """Return how the model's image tower pools."""
    return bridge.pooling_of(bridge.trunk_of(model))


def encode_tokens(model: nn.Module, images: Tensor) -> Tokens:
    """Encode images into tokens after the final norm, before the projection.

    Args:
        model: a CLIP model of open_clip, its visual tower, or a timm ViT or EVA.
        images: B x 3 x H x W, normalised; H and W multiples of the patch. Positions are
            interpolated by height and width when the grid is not the tower's own.

    Raises:
        UserError: a side is no multiple of the patch, or the tower has no patch tokens.
    """
    trunk = bridge.trunk_of(model)
    spec = bridge.pooling_of(trunk)
    tokens, prefix, grid = bridge.final_tokens(trunk, images)
    patches, cls = tokens[:, prefix:], tokens[:, :prefix]
    return Tokens(patches, cls, pool_tokens(patches, cls, spec), grid)


def encode_patches(
    model: nn.Module,
    images: Tensor,
    positions: str = "antialias",
    route: bridge.Route | None = None,
) -> tuple[Tensor, tuple[int, int]]:
    """Encode images into patch tokens alone: nothing is pooled, so any K fits any grid.

    Args and errors as for `encode_tokens`, and:
        positions: interpolation on another grid, `antialias` or `offset` (published code's).
        route: another way through the last block; None is the tower's own.

    Returns:
        Patch tokens after the final norm, B x N x D, and their grid (h, w).
    """
    trunk = bridge.trunk_of(model)
    reason = bridge.refusal(trunk) if route is None else bridge.route_refusal(trunk)
    if reason:
        raise UserError(f"no dense features come out of this tower: {reason}")
    tokens, prefix, grid = bridge.final_tokens(trunk, images, positions, route)
    return tokens[:, prefix:], grid


def project(model: nn.Module, x: Tensor) -> Tensor:
    """Carry tower features into the joint image-text space, ... x D to ... x E."""
    return bridge.project(model, x)
