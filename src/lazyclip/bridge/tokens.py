"""Images through a tower to tokens, and tokens into the joint space.

Letters: B images, T tokens with prefix, N patch tokens, P prefix tokens, D tower width, E joint
width, h, w patch grid. Not here: how tokens become a vector (`pooled`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from lazyclip.base.errors import UserError
from lazyclip.bridge.guard import _towers
from lazyclip.bridge.last_block import Route, blocks_of, run_route
from lazyclip.bridge.pooled import refusal, trunk_of
from lazyclip.bridge.positions import check_positions, resize_positions
from lazyclip.bridge.shadow import shadowed


def geometry(trunk: nn.Module) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return image size, patch size and patch grid, each (height, width)."""
    if isinstance(trunk, VisionTransformer):
        size, patch, grid = trunk.image_size, trunk.patch_size, trunk.grid_size
    elif isinstance(trunk, Eva | TimmVisionTransformer):
        embed = trunk.patch_embed
        size, patch, grid = embed.img_size, embed.patch_size, embed.grid_size
    else:
        raise UserError(f"this tower has no patch grid: {refusal(trunk)}")
    return _pair(size), _pair(patch), _pair(grid)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1]))


def width_of(trunk: nn.Module) -> int:
    """Return the tower's width D."""
    if isinstance(trunk, VisionTransformer):
        return int(trunk.ln_post.weight.shape[0])
    return int(cast(Any, trunk).num_features)


def final_tokens(
    trunk: nn.Module,
    images: Tensor,
    positions: str = "antialias",
    route: Route | None = None,
) -> tuple[Tensor, int, tuple[int, int]]:
    """Run a tower up to its final norm, at any image size that its patches divide.

    Args:
        trunk: a native ViT, or a timm ViT or EVA.
        images: B x 3 x H x W.
        positions: how learned position embeddings come to another grid (`resize_positions`).
            Rotary positions are computed for the grid of the call and never interpolated.
        route: another way through the last block, for a tower that `route_refusal` lets pass.

    Returns:
        Tokens after the final norm, B x T x D; the number of prefix tokens P; the grid (h, w).
        Patch dropout is left out: every patch has its token.
    """
    check_positions(positions)
    (_, patch, grid) = geometry(trunk)
    if images.ndim != 4:
        raise ValueError(f"images must be B x 3 x H x W; got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % patch[0] or width % patch[1] or not height or not width:
        raise UserError(
            f"images of {height} x {width} pixels do not divide into patches of "
            f"{patch[0]} x {patch[1]}; cut or pad the sides to multiples of the patch"
        )
    size = (height // patch[0], width // patch[1])
    if isinstance(trunk, VisionTransformer):
        return _native_tokens(trunk, images, size, positions, route), 1, size
    timm_trunk = cast(Any, trunk)
    with _whole_grid(timm_trunk), _other_grid(timm_trunk, size, grid, positions):
        tokens = (
            timm_trunk.forward_features(images)
            if route is None
            else _timm_tokens(timm_trunk, images, size, route)
        )
    return tokens, int(timm_trunk.num_prefix_tokens), size


def _native_tokens(
    trunk: VisionTransformer,
    images: Tensor,
    size: tuple[int, int],
    positions: str,
    route: Route | None,
) -> Tensor:
    x = trunk.conv1(images).flatten(2).transpose(1, 2)  # B x N x D
    cls = trunk.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
    x = torch.cat([cls, x], dim=1)  # B x T x D
    rows = resize_positions(trunk.positional_embedding, trunk.grid_size, size, how=positions)
    x = trunk.ln_pre(x + rows.to(x.dtype))
    if route is None:
        return trunk.ln_post(trunk.transformer(x))
    for block in blocks_of(trunk)[:-1]:
        x = block(x)
    return trunk.ln_post(run_route(trunk, x, None, size, route))


def _timm_tokens(trunk: Any, images: Tensor, size: tuple[int, int], route: Route) -> Tensor:
    x = trunk.patch_embed(images)
    blocks = blocks_of(trunk)
    ropes: list[Tensor | None] = [None] * len(blocks)
    if isinstance(trunk, Eva):
        x, rope = trunk._pos_embed(x)
        # A mixed rotary table has one part a block.
        mixed = rope is not None and getattr(trunk, "rope_mixed", False)
        ropes = list(rope) if mixed else [rope] * len(blocks)
    else:
        x = trunk.patch_drop(trunk._pos_embed(x))
    x = trunk.norm_pre(x)
    for block, own in zip(blocks[:-1], ropes[:-1], strict=True):
        x = block(x) if own is None else block(x, rope=own)
    return trunk.norm(run_route(trunk, x, ropes[-1], size, route))


@contextlib.contextmanager
def _whole_grid(trunk: Any) -> Iterator[None]:
    """Leave a timm tower's patch dropout out for the time of one call."""
    drop = getattr(trunk, "patch_drop", None)
    if drop is None or not drop.training:
        yield
        return
    drop.training = False
    try:
        yield
    finally:
        drop.training = True


@contextlib.contextmanager
def _other_grid(
    trunk: Any, size: tuple[int, int], own: tuple[int, int], positions: str
) -> Iterator[None]:
    """Let a timm tower take another grid (h, w) for the time of one call."""
    if size == own:
        yield
        return
    embed: Any = trunk.patch_embed
    rope: Any = getattr(trunk, "rope", None)
    for_one_grid = getattr(rope, "feat_shape", None) is not None
    fields: list[tuple[Any, str, object]]
    fields = [(trunk, "dynamic_img_size", True), (embed, "strict_img_size", False)]
    # With dynamic sizes timm expects the patches as B x h x w x D, and interpolates the positions
    # from `grid_size`: at the size of the call it leaves ours alone.
    fields += [(embed, "flatten", False), (embed, "output_fmt", type(embed.output_fmt)("NHWC"))]
    fields += [(embed, "grid_size", size)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in fields]
    if for_one_grid:
        # Built for one grid, rotary positions are kept for it, whatever grid a call asks for.
        before.append((rope, "feat_shape", rope.feat_shape))
        before += [(rope, name, value) for name, value in rope.named_buffers(recurse=False)]
    try:
        with shadowed(trunk, **_resized_embedding(trunk, own, size, positions)):
            if for_one_grid:
                rope.update_feat_shape(list(size))
            for owner, name, value in fields:
                setattr(owner, name, value)
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _resized_embedding(
    trunk: Any, own: tuple[int, int], size: tuple[int, int], how: str
) -> dict[str, Tensor]:
    if getattr(trunk, "pos_embed", None) is None:
        return {}
    prefix = 0 if trunk.no_embed_class else int(trunk.num_prefix_tokens)
    return {"pos_embed": resize_positions(trunk.pos_embed[0], own, size, prefix, how)[None]}


def project(model: nn.Module, x: Tensor) -> Tensor:
    """Carry tower features into the joint space by the tower's projection, ... x D to ... x E."""
    visual = cast(Any, getattr(model, "visual", model))
    trunk = cast(Any, trunk_of(model))
    if isinstance(trunk, VisionTransformer):
        return x if trunk.proj is None else x @ trunk.proj.to(x.dtype)
    x = trunk.head(trunk.head_drop(trunk.fc_norm(x)))
    return visual.head(x) if isinstance(visual, _towers.TimmModel) else x
