"""The text tower: what it was built with, and prompts through it no longer than they need be.

Not here: prompts and their mean (`lazyclip.zeroshot`).

Letters: B texts, L text positions.
"""

from typing import Any, cast

import torch
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

from lazyclip.bridge.guard import _model
from lazyclip.bridge.shadow import shadowed


def activation_of(model: nn.Module) -> str:
    """Return the activation the model was built with: `quickgelu` or `gelu` (text tower counts)."""
    found = any(isinstance(module, QuickGELU) for module in model.modules())
    return "quickgelu" if found else "gelu"


def context_length_of(model: nn.Module) -> int:
    """Return the number of text positions."""
    owner: Any = model if hasattr(model, "context_length") else model.text
    return int(owner.context_length)


def _text_owner(model: nn.Module) -> tuple[nn.Module, str, int] | None:
    """Return who holds the text tower, how it pools, and its end token; None when not open_clip's.

    By exact type: what a subclass or a wrapper does with the tokens is not known here.
    """
    owner: Any = getattr(model, "text", None)
    if type(model) is _model.CLIP:
        owner = model
        return owner, str(owner.text_pool_type), int(getattr(owner, "text_eos_id", -1))
    if type(model) is _model.CustomTextCLIP and type(owner) is TextTransformer:
        return owner, str(owner.pool_type), int(getattr(owner, "eos_id", -1))
    return None


def text_blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the text tower's blocks; none where the tower is not open_clip's own."""
    found = _text_owner(model)
    return [] if found is None else list(cast(Any, found[0]).transformer.resblocks)


def _is_causal(owner: nn.Module) -> bool:
    """Say whether no text position sees a later one."""
    mask = getattr(owner, "attn_mask", None)
    if not isinstance(mask, Tensor) or getattr(owner, "cls_emb", None) is not None:
        return False
    later = torch.ones_like(mask, dtype=torch.bool).triu(1)
    return bool((mask[later] == -torch.inf).all())


def text_lengths(model: nn.Module, tokens: Tensor) -> Tensor:
    """Count the leading positions that each text's feature depends on.

    In a causal text tower that pools at the end-of-text token nothing behind that token plays a
    part. Where that does not hold (a tower from Hugging Face, one without causal mask, one that
    pools elsewhere, as CoCa's and SigLIP's) each text keeps its full length.

    Args:
        model: a CLIP model of open_clip.
        tokens: B x L int64.

    Returns:
        Lengths, B int64, 1..L.
    """
    full = torch.full(tokens.shape[:1], tokens.shape[1], device=tokens.device)
    found = _text_owner(model)
    if found is None or not tokens.shape[1]:
        return full
    owner, pooling, end = found
    if not _is_causal(owner):
        return full
    if pooling == "argmax":  # the end token has the largest id
        return tokens.argmax(dim=1) + 1
    if pooling == "eos":
        return (tokens == end).int().argmax(dim=1) + 1
    return full


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Encode texts, cut to the longest of them where that is exact (`text_lengths`).

    Args:
        model: a CLIP model of open_clip.
        tokens: B x L int64, on any device.

    Returns:
        Text features as the model's `encode_text` gives them, B x E, on the model's device.
    """
    device = next(model.parameters()).device
    encode = cast(Any, model).encode_text
    length = int(text_lengths(model, tokens).max()) if len(tokens) else tokens.shape[1]
    found = _text_owner(model)
    if found is None or length == tokens.shape[1]:
        return encode(tokens.to(device))
    owner = cast(Any, found[0])
    short = {
        "positional_embedding": owner.positional_embedding[:length],
        "attn_mask": owner.attn_mask[:length, :length],
    }
    with shadowed(owner, **short):
        return encode(tokens[:, :length].to(device))
