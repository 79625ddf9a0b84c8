"""The one module that reaches into open_clip and into the towers it builds.

Everything here leans on names that open_clip and timm do not promise; `check_open_clip` looks at
them once, at import. Not here: what LaSt pooling computes (`pooling`), when a tower gets it
(`tower`, `factory`).

Letters: B images, T tokens with prefix, N patch tokens, P prefix tokens, D tower width, E joint
width, h, w patch grid.
"""

import contextlib
import copy
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import open_clip
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from lazyclip.base.errors import UserError
from lazyclip.pooling import PoolSpec, pool_tokens

SUPPORTED = ">=3.0,<4"
StateDict = dict[str, Tensor]

# By name, not `import open_clip.model`: the package rebinds some of these names to functions.
_model = importlib.import_module("open_clip.model")
_factory = importlib.import_module("open_clip.factory")
_pretrained = importlib.import_module("open_clip.pretrained")
_towers = importlib.import_module("open_clip.timm_model")
_transform = importlib.import_module("open_clip.transform")

_BUILDER_PARAMETERS = ("embed_dim", "vision_cfg", "quick_gelu", "cast_dtype")
_CREATE_PARAMETERS = (
    "model_name", "pretrained", "load_weights", "precision", "device", "force_quick_gelu",
    "force_image_size",
)  # fmt: skip


def check_open_clip() -> None:
    """Check that the installed open_clip is one we fit.

    Raises:
        ImportError: one line that names the installed version and the supported range.
    """
    version = getattr(open_clip, "__version__", "unknown")
    faults = []
    if version.split(".")[0] != "3":
        faults.append("another major version")
    for owner, name, wanted in (
        (_model, "_build_vision_tower", _BUILDER_PARAMETERS),
        (_factory, "create_model", _CREATE_PARAMETERS),
    ):
        function = inspect.unwrap(getattr(owner, name, lambda: None))
        missing = set(wanted) - set(inspect.signature(function).parameters)
        if missing:
            faults.append(f"{name} lacks {', '.join(sorted(missing))}")
    for name in ("_global_pool", "_pool", "_embeds", "forward_intermediates"):
        if not hasattr(VisionTransformer, name):
            faults.append(f"VisionTransformer lacks {name}")
    if not isinstance(getattr(_pretrained, "_PRETRAINED", None), dict):
        faults.append("the table of pretrained tags is gone")
    if not (hasattr(Eva, "pool") and hasattr(TimmVisionTransformer, "pool")):
        faults.append("timm towers lack pool()")
    if faults:
        raise ImportError(
            f"lazyclip does not fit open_clip_torch {version} ({'; '.join(faults)}); "
            f"install open_clip_torch{SUPPORTED} and timm>=1.0.17"
        )


# --- towers with a pooling of ours -------------------------------------------------------------


class LaStVisionTransformer(VisionTransformer):
    """open_clip's own ViT with its global pool replaced; no parameter and no buffer is added."""

    last: PoolSpec

    def _global_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Called by forward and by forward_intermediates, after ln_post.
        return pool_tokens(x[:, 1:], x[:, :1], self.last), x[:, 1:]


class _LaStTimm:
    """What the timm towers share: `pool` is the one place where the tokens become a vector."""

    last: PoolSpec
    num_prefix_tokens: int

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        if pool_type is not None and pool_type != "token":
            raise ValueError(f"pool_type '{pool_type}' would bypass pooling '{self.last.pooling}'")
        prefix = self.num_prefix_tokens
        return pool_tokens(x[:, prefix:], x[:, :prefix], self.last)


class LaStEva(_LaStTimm, Eva):
    """timm's EVA tower with its global pool replaced."""


class LaStTimmVisionTransformer(_LaStTimm, TimmVisionTransformer):
    """timm's ViT with its global pool replaced."""


_LAST_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: LaStVisionTransformer,
    Eva: LaStEva,
    TimmVisionTransformer: LaStTimmVisionTransformer,
}
_PLAIN_CLASS = {last: plain for plain, last in _LAST_CLASS.items()}


def trunk_of(model: nn.Module) -> nn.Module:
    """Return the module that pools: of a CLIP model, a visual tower, or a timm model itself."""
    visual = cast(nn.Module, getattr(model, "visual", model))
    return cast(nn.Module, visual.trunk) if isinstance(visual, _towers.TimmModel) else visual


def refusal(trunk: nn.Module) -> str | None:
    """Say why a tower cannot take a pooling over patch tokens; None when it can."""
    name = type(trunk).__name__
    if type(trunk) not in _LAST_CLASS and type(trunk) not in _PLAIN_CLASS:
        return f"{name} is no plain ViT or EVA tower, it has no patch tokens before its pooling"
    if getattr(trunk, "attn_pool", None) is not None:
        return f"{name} pools by attention (as SigLIP and CoCa do), its projection sits in the pool"
    if getattr(trunk, "final_ln_after_pool", False):
        return f"{name} normalises after pooling; LaSt pools normalised tokens"
    if isinstance(trunk, VisionTransformer):
        return None if trunk.pool_type in ("tok", "avg") else f"{name} has pool_type none"
    if not isinstance(getattr(trunk, "fc_norm", nn.Identity()), nn.Identity):
        return f"{name} normalises after pooling; LaSt pools normalised tokens"
    return None


def set_pooling(trunk: nn.Module, spec: PoolSpec) -> None:
    """Give a tower a pooling of ours, in place; what cannot take one raises `UserError`."""
    reason = refusal(trunk)
    if not reason and spec.pooling == "token" and getattr(trunk, "num_prefix_tokens", 1) == 0:
        reason = f"{type(trunk).__name__} was built without a CLS token; use mean, max or last"
    if reason:
        raise UserError(f"pooling '{spec.pooling}' cannot be attached: {reason}")
    if type(trunk) in _LAST_CLASS:
        trunk.__class__ = _LAST_CLASS[type(trunk)]
    trunk.last = spec  # type: ignore[assignment]  # a plain attribute, no module or tensor


def clear_pooling(trunk: nn.Module) -> None:
    """Give a tower its own aggregation back, in place."""
    if type(trunk) in _PLAIN_CLASS:
        trunk.__class__ = _PLAIN_CLASS[type(trunk)]
        del trunk.last


def pooling_of(trunk: nn.Module) -> PoolSpec:
    """Return how a tower pools, a plain one included; `UserError` where no spec says it."""
    spec = getattr(trunk, "last", None)
    if isinstance(spec, PoolSpec):
        return spec
    reason = refusal(trunk)
    if reason:
        raise UserError(f"this tower's pooling has no name here: {reason}")
    own = getattr(trunk, "pool_type", None) or getattr(trunk, "global_pool", None)
    return PoolSpec(pooling="token" if own in ("tok", "token") else "mean")


# --- tokens out of a tower ------------------------------------------------------------------------


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


def final_tokens(trunk: nn.Module, images: Tensor) -> tuple[Tensor, int, tuple[int, int]]:
    """Run a tower up to its final norm, at any image size that its patches divide.

    Args:
        trunk: a native ViT, or a timm ViT or EVA.
        images: B x 3 x H x W.

    Returns:
        Tokens after the final norm, B x T x D; the number of prefix tokens P; the grid (h, w).
        Patch dropout is left out: every patch has its token.
    """
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
        return _native_tokens(trunk, images, size), 1, size
    timm_trunk = cast(Any, trunk)
    with _whole_grid(timm_trunk), _other_grid(timm_trunk, size, size != grid):
        return timm_trunk.forward_features(images), int(timm_trunk.num_prefix_tokens), size


def _native_tokens(trunk: VisionTransformer, images: Tensor, size: tuple[int, int]) -> Tensor:
    x = trunk.conv1(images).flatten(2).transpose(1, 2)  # B x N x D
    cls = trunk.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
    x = torch.cat([cls, x], dim=1)  # B x T x D
    x = x + resize_positions(trunk.positional_embedding, trunk.grid_size, size).to(x.dtype)
    return trunk.ln_post(trunk.transformer(trunk.ln_pre(x)))


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 1
) -> Tensor:
    """Interpolate position embeddings from one patch grid to another, by height and width.

    Bicubic with antialias, as open_clip resizes on loading, so that a tower loaded at a size and
    one called at that size agree. Equal counts with other shapes (7 x 28 and 14 x 14) differ.

    Args:
        positions: (P + N) x D.
        old: their grid (h, w).
        new: the wanted grid (h, w).
        prefix: leading rows that are no patches; they are kept.
    """
    if tuple(old) == tuple(new):
        return positions
    kept, patches = positions[:prefix], positions[prefix:]
    plane = patches.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    plane = functional.interpolate(
        plane, size=tuple(new), mode="bicubic", antialias=True, align_corners=False
    )
    rows = plane.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(positions.dtype)
    return torch.cat([kept, rows], dim=0)


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
def _other_grid(trunk: Any, size: tuple[int, int], needed: bool) -> Iterator[None]:
    """Switch on timm's own handling of another grid (h, w) for the time of one call."""
    if not needed:
        yield
        return
    embed: Any = trunk.patch_embed
    rope: Any = getattr(trunk, "rope", None)
    for_one_grid = getattr(rope, "feat_shape", None) is not None
    fields = [(trunk, "dynamic_img_size", True), (embed, "strict_img_size", False)]
    # With dynamic sizes timm expects the patches as B x h x w x D.
    fields += [(embed, "flatten", False), (embed, "output_fmt", type(embed.output_fmt)("NHWC"))]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in fields]
    if for_one_grid:
        # Built for one grid, rotary positions are kept for it, whatever grid a call asks for.
        before.append((rope, "feat_shape", rope.feat_shape))
        before += [(rope, name, value) for name, value in rope.named_buffers(recurse=False)]
    try:
        if for_one_grid:
            rope.update_feat_shape(list(size))
        for owner, name, value in fields:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def project(model: nn.Module, x: Tensor) -> Tensor:
    """Carry tower features into the joint space by the tower's projection, ... x D to ... x E."""
    visual = cast(Any, getattr(model, "visual", model))
    trunk = cast(Any, trunk_of(model))
    if isinstance(trunk, VisionTransformer):
        return x if trunk.proj is None else x @ trunk.proj.to(x.dtype)
    x = trunk.head(trunk.head_drop(trunk.fc_norm(x)))
    return visual.head(x) if isinstance(visual, _towers.TimmModel) else x


def activation_of(model: nn.Module) -> str:
    """Return the activation the model was built with: `quickgelu` or `gelu` (text tower counts)."""
    found = any(isinstance(module, QuickGELU) for module in model.modules())
    return "quickgelu" if found else "gelu"


# --- open_clip's factory ------------------------------------------------------------------------


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


def context_length_of(model: nn.Module) -> int:
    """Return the number of text positions."""
    owner: Any = model if hasattr(model, "context_length") else model.text
    return int(owner.context_length)
