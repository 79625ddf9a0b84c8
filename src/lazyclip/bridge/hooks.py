"""open_clip's factory: our hooks in it, its tags, transforms and state dicts.

Not here: which models and tags are ours (`factory`, `weights`).
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from lazyclip.bridge.guard import _factory, _model, _pretrained, _transform, check_open_clip
from lazyclip.bridge.pooled import trunk_of
from lazyclip.bridge.positions import resize_positions
from lazyclip.bridge.tokens import geometry

StateDict = dict[str, Tensor]


def install(
    attach_tower: Callable[[nn.Module, Mapping[str, object]], None],
    make_create: Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]],
) -> None:
    """Hook into open_clip's model building; a second call replaces the first, it does not stack.

    Args:
        attach_tower: gets each built tower whose `vision_cfg` held a `last` dictionary.
        make_create: takes open_clip's own `create_model` and returns the one to use in its place.
    """
    check_open_clip()
    plain_builder = getattr(
        _model._build_vision_tower, "lazyclip_plain", _model._build_vision_tower
    )
    plain_create = getattr(_factory.create_model, "lazyclip_plain", _factory.create_model)

    def build_vision_tower(
        embed_dim: int,
        vision_cfg: Any,
        quick_gelu: bool = False,
        cast_dtype: torch.dtype | None = None,
    ) -> nn.Module:
        last = None
        if isinstance(vision_cfg, dict) and "last" in vision_cfg:
            vision_cfg = dict(vision_cfg)
            last = vision_cfg.pop("last")
        tower = plain_builder(embed_dim, vision_cfg, quick_gelu, cast_dtype)
        if last is not None:
            attach_tower(tower, last)
        return tower

    create = make_create(plain_create)
    for wrapper, plain in ((build_vision_tower, plain_builder), (create, plain_create)):
        vars(wrapper).update(lazyclip_plain=plain, __wrapped__=plain)
    vars(_model)["_build_vision_tower"] = build_vision_tower
    vars(_factory)["create_model"] = create
    open_clip.create_model = create


def tags_of(name: str) -> dict[str, dict[str, Any]]:
    """Return a copy of open_clip's table of tags for one model name (empty when it has none)."""
    return copy.deepcopy(_pretrained._PRETRAINED.get(name, {}))


def add_tags(name: str, tags: Mapping[str, Mapping[str, Any]]) -> None:
    """File tags under a model name in open_clip's own table."""
    _pretrained._PRETRAINED[name] = {tag: dict(entry) for tag, entry in tags.items()}


def adapt_state_dict(
    model: nn.Module, state: StateDict, size: tuple[int, int] | None = None
) -> StateDict:
    """Fit a state dict to the model's layout, without changing what its tensors say.

    Moves a text tower at the top level under `text.` where the model keeps it there, reshapes the
    logit scale, and interpolates position embeddings to the model's grid.

    Args:
        model: the model that will take it.
        state: tensors by key; left as it is, a new one is returned.
        size: image size (height, width) the weights were saved at; None: a square one.
    """
    state = dict(state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = dict(_model.convert_to_custom_text_state_dict(state))
    own = model.state_dict()
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in own and state[key].numel() == own[key].numel():
            state[key] = state[key].reshape(own[key].shape)
    for key in ("visual.positional_embedding", "visual.trunk.pos_embed"):
        if key in state and key in own:
            state[key] = _fit_positions(trunk_of(model), state[key], own[key], size)
    return state


def _fit_positions(
    trunk: nn.Module, positions: Tensor, own: Tensor, size: tuple[int, int] | None
) -> Tensor:
    known = isinstance(trunk, VisionTransformer | Eva | TimmVisionTransformer)
    if not known or positions.ndim != own.ndim or positions.shape[-1] != own.shape[-1]:
        return positions
    (_, patch, grid) = geometry(trunk)
    plain = getattr(trunk, "no_embed_class", False)
    prefix = 0 if plain else int(cast(Any, getattr(trunk, "num_prefix_tokens", 1)))
    rows = positions.shape[-2] - prefix
    old = (size[0] // patch[0], size[1] // patch[1]) if size else (0, 0)
    if old[0] * old[1] != rows:  # not recorded: the own grid when the count fits, else a square
        side = math.isqrt(max(rows, 0))
        if positions.shape == own.shape or side * side != rows:
            return positions
        old = (side, side)
    flat = positions.reshape(-1, positions.shape[-1])  # (P + N) x D
    fitted = resize_positions(flat, old, grid, prefix)
    return fitted.reshape(*positions.shape[:-2], *fitted.shape)


def preprocess_of(model: nn.Module) -> dict[str, Any]:
    """Return the model's preprocessing: size, mean, std, interpolation, resize mode."""
    return copy.deepcopy(dict(open_clip.get_model_preprocess_cfg(model)))


def transforms_of(
    model: nn.Module,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return the model's transforms for training and evaluation, PIL image -> 3 x H x W."""
    config = _transform.PreprocessCfg(**preprocess_of(model))
    train, val = (_transform.image_transform_v2(config, is_train=flag) for flag in (True, False))
    return train, val
