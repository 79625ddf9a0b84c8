"""Which tower, and which layer of it, a parameter belongs to, by open_clip's and timm's names.

Not here: what a layer's rate or its share of the work is; who needs the table reckons that.
"""

import dataclasses
import re
from typing import Literal

from torch import nn

from lazyclip.base.errors import UserError

# Names below a tower's prefix: what comes before its blocks, the blocks, and what follows them.
_NATIVE_IMAGE = (
    r"class_embedding|positional_embedding|conv1\.\w+|ln_pre\.\w+",
    r"transformer\.resblocks\.(\d+)\..+",
    r"ln_post\.\w+|proj",
)
# timm's ViT and EVA; `head` beside the trunk is open_clip's projection where timm makes none.
_TIMM_IMAGE = (
    r"trunk\.(?:cls_token|reg_token|pos_embed|patch_embed\..+|norm_pre\..+)",
    r"trunk\.blocks\.(\d+)\..+",
    r"trunk\.(?:norm|fc_norm|head)\..+|head\..+",
)
_TEXT = (
    r"token_embedding\.weight|positional_embedding|cls_emb",
    r"transformer\.resblocks\.(\d+)\..+",
    r"ln_final\.\w+|text_projection(?:\.\w+)?",
)
_SCALES = ("logit_scale", "logit_bias")


@dataclasses.dataclass(frozen=True)
class LayerPlace:
    """Where a parameter stands.

    Fields: tower, `scale` for the temperature and its bias; layer, 0 for embeddings, i + 1 for
    block i, depth + 1 for the final norm and the projection; depth, blocks of the tower (0 for
    `scale`).
    """

    tower: Literal["image", "text", "scale"]
    layer: int
    depth: int

    @property
    def below_top(self) -> int:
        """Layers between this one and the tower's end: 0 for the final norm and the projection."""
        return self.depth + 1 - self.layer if self.tower != "scale" else 0

    @property
    def in_block(self) -> bool:
        """Whether it is a block's own."""
        return 1 <= self.layer <= self.depth


def tower_of(name: str) -> Literal["image", "text", "scale"]:
    """Return the tower of a parameter by its full name."""
    if name in _SCALES:
        return "scale"
    return "image" if name.startswith("visual.") else "text"


def _layer(name: str) -> int | None:
    """Return 0 before the blocks, i + 1 in block i, -1 after them; None for an unknown name."""
    tower = tower_of(name)
    if tower == "image":
        short = name.removeprefix("visual.")
        tables: tuple[tuple[str, str, str], ...] = (_NATIVE_IMAGE, _TIMM_IMAGE)
    else:
        short, tables = name.removeprefix("text."), (_TEXT,)
    for before, block, after in tables:
        if re.fullmatch(before, short):
            return 0
        if found := re.fullmatch(block, short):
            return int(found[1]) + 1
        if re.fullmatch(after, short):
            return -1
    return None


def layer_places(model: nn.Module) -> dict[str, LayerPlace]:
    """Return the place of every parameter of a CLIP model, by full name.

    Known are open_clip's own ViT and text tower and timm's ViT and EVA.

    Raises:
        UserError: a parameter that none of them has; it would get no layer or a wrong one.
    """
    found: dict[str, int] = {}
    for name, _ in model.named_parameters():
        layer = 0 if name in _SCALES else _layer(name)
        if layer is None:
            raise UserError(
                f"the parameter {name} belongs to no layer known here (open_clip's ViT and text "
                "tower, timm's ViT and EVA); leave --layer-decay and --layer-decay-text out"
            )
        found[name] = layer
    depth = {"scale": 0}
    for tower in ("image", "text"):
        depth[tower] = max([0, *(n for name, n in found.items() if tower_of(name) == tower)])
    return {
        name: LayerPlace(
            tower_of(name),
            depth[tower_of(name)] + 1 if layer < 0 else layer,
            depth[tower_of(name)],
        )
        for name, layer in found.items()
    }
