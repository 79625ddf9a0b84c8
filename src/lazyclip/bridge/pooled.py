"""Towers that pool as we say: open_clip's and timm's own classes, one method replaced.

Not here: what the poolings compute (`lazyclip.pooling`), when a tower gets one (`factory`).
"""

from typing import cast

from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from lazyclip.base.errors import UserError
from lazyclip.bridge.guard import _towers
from lazyclip.pooling import PoolSpec, pool_tokens


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
