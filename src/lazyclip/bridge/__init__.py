"""The one room that reaches into open_clip and into the towers it builds.

Everything here leans on names that open_clip and timm do not promise; `check_open_clip` looks at
them once, at import. `guard`: the submodules leaned on; `pooled`: towers with a
pooling of ours; `positions`, `tokens`: images to tokens on any grid; `last_block`: the last block
with another attention; `layers`: parameters by tower and layer; `text`: the text tower; `shadow`:
other tensors for one call; `hooks`: open_clip's factory. Not here: what LaSt pooling computes
(`pooling`), when a tower gets it (`tower`, `factory`).
"""

from lazyclip.bridge.guard import SUPPORTED, _factory, _model, _pretrained, check_open_clip
from lazyclip.bridge.hooks import (
    StateDict,
    adapt_state_dict,
    add_tags,
    install,
    preprocess_of,
    tags_of,
    transforms_of,
)
from lazyclip.bridge.last_block import Attend, Heads, Route, blocks_of, route_refusal
from lazyclip.bridge.layers import LayerPlace, layer_places, tower_of
from lazyclip.bridge.pooled import (
    _LAST_CLASS,
    LaStEva,
    LaStTimmVisionTransformer,
    LaStVisionTransformer,
    clear_pooling,
    pooling_of,
    refusal,
    set_pooling,
    trunk_of,
)
from lazyclip.bridge.positions import POSITIONS, resize_positions
from lazyclip.bridge.text import (
    activation_of,
    context_length_of,
    encode_text,
    text_blocks_of,
    text_lengths,
)
from lazyclip.bridge.tokens import final_tokens, geometry, project, width_of

__all__ = [
    "POSITIONS",
    "SUPPORTED",
    "_LAST_CLASS",
    "Attend",
    "Heads",
    "LaStEva",
    "LaStTimmVisionTransformer",
    "LaStVisionTransformer",
    "LayerPlace",
    "Route",
    "StateDict",
    "_factory",
    "_model",
    "_pretrained",
    "activation_of",
    "adapt_state_dict",
    "add_tags",
    "blocks_of",
    "check_open_clip",
    "clear_pooling",
    "context_length_of",
    "encode_text",
    "final_tokens",
    "geometry",
    "install",
    "layer_places",
    "pooling_of",
    "preprocess_of",
    "project",
    "refusal",
    "resize_positions",
    "route_refusal",
    "set_pooling",
    "tags_of",
    "text_blocks_of",
    "text_lengths",
    "tower_of",
    "transforms_of",
    "trunk_of",
    "width_of",
]
