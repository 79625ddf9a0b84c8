"""The last block of a tower with another attention, and with or without residual and MLP.

The one place that knows how open_clip's and timm's blocks hold their projections. Not here: which
attention a dense method takes (`lazyclip.dense`), the blocks before (`tokens`).

Letters: B images, T tokens with prefix, D tower width; d the width of a head; h, w patch grid.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional

from lazyclip.bridge.pooled import refusal


class Heads(NamedTuple):
    """What an attention works on, as the block's own would get it.

    Fields: q, k, v B x heads x T x d, biases, norms and rotary step done (the latter on q and k);
    scale, the factor on q k^T (d^-1/2); prefix, leading tokens that are no patches; grid (h, w).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    prefix: int
    grid: tuple[int, int]


# Heads -> the attended values, B x heads x T x d.
Attend = Callable[[Heads], Tensor]


@dataclasses.dataclass(frozen=True)
class Route:
    """Three switches of the last block.

    Fields: attend, the attention (None: the block's own); residual, whether the block's input is
    added to the attention's output; mlp, whether the MLP follows.
    """

    attend: Attend | None = None
    residual: bool = True
    mlp: bool = True


def blocks_of(trunk: nn.Module) -> list[nn.Module]:
    """Return a tower's blocks, native or timm."""
    tower = cast(Any, trunk)
    native = isinstance(trunk, VisionTransformer)
    return list(tower.transformer.resblocks if native else tower.blocks)


def route_refusal(trunk: nn.Module) -> str | None:
    """Say why the last block cannot take another attention; None when it can."""
    reason = refusal(trunk)
    if reason:
        return reason
    block = blocks_of(trunk)[-1]
    attention = cast(Any, block).attn
    name = f"the last block is a {type(block).__name__} with a {type(attention).__name__}"
    if type(block) is ResidualAttentionBlock and type(attention) is nn.MultiheadAttention:
        return None if attention.batch_first else f"{name} that takes tokens before batch"
    known: dict[type, tuple[type, ...]]
    known = {EvaBlock: (EvaAttention, AttentionRope), Block: (Attention,)}
    if type(attention) in known.get(type(block), ()):
        return None
    return f"{name}, which is not known here"


def run_route(
    trunk: nn.Module, x: Tensor, rope: Tensor | None, grid: tuple[int, int], route: Route
) -> Tensor:
    """Run the last block by another route, without attention dropout and stochastic depth.

    Args:
        trunk: a tower that `route_refusal` lets pass.
        x: the block's input, B x T x D.
        rope: the rotary table of timm's towers, None where they have none.
        grid: patch grid (h, w) of this call.
        route: the switches, with an attention.

    Returns:
        The block's output, B x T x D. A layer scale belongs to its branch: it stays on the
        attention's output where the residual is left out.
    """
    block = cast(Any, blocks_of(trunk)[-1])
    if route.attend is None:
        raise ValueError("a route without an attention is the block itself; call the block")
    native = isinstance(block, ResidualAttentionBlock)
    z = block.ln_1(x) if native else block.norm1(x)
    q, k, v = _native_heads(block.attn, z) if native else _timm_heads(block.attn, z, rope)
    prefix = x.shape[1] - grid[0] * grid[1]
    values = route.attend(Heads(q, k, v, q.shape[-1] ** -0.5, prefix, grid))
    joined = values.transpose(1, 2).flatten(2)  # B x T x D
    attended = _scaled(
        block, 1, block.attn.out_proj(joined) if native else _timm_out(block.attn, joined, z)
    )
    y = x + attended if route.residual else attended
    if not route.mlp:
        return y
    return y + _scaled(block, 2, block.mlp(block.ln_2(y) if native else block.norm2(y)))


def _split(x: Tensor, heads: int) -> Tensor:
    """B x T x (heads d) -> B x heads x T x d."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _native_heads(attention: nn.MultiheadAttention, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    packed = functional.linear(z, cast(Tensor, attention.in_proj_weight), attention.in_proj_bias)
    q, k, v = (_split(part, attention.num_heads) for part in packed.chunk(3, dim=-1))
    return q, k, v


def _timm_heads(attention: Any, z: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = attention.num_heads, getattr(attention, "num_kv_heads", attention.num_heads)
    if getattr(attention, "q_proj", None) is not None:
        packed = (attention.q_proj(z), attention.k_proj(z), attention.v_proj(z))
    else:
        # EVA keeps the biases of q and v beside the packed layer; k has none.
        packed = attention.qkv(z).chunk(3, dim=-1)
        if getattr(attention, "q_bias", None) is not None:
            packed = (packed[0] + attention.q_bias, packed[1], packed[2] + attention.v_bias)
    q, k, v = (_split(x, n) for x, n in zip(packed, (heads, kv_heads, kv_heads), strict=True))
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        q, k = (_rotate(x, attention, rope).type_as(v) for x in (q, k))
    if kv_heads != heads:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    return q, k, v


def _rotate(x: Tensor, attention: Any, rope: Tensor) -> Tensor:
    prefix = attention.num_prefix_tokens
    half = {"half": True} if getattr(attention, "rotate_half", False) else {}
    turned = apply_rot_embed_cat(x[:, :, prefix:], rope, **half)
    return torch.cat([x[:, :, :prefix], turned], dim=2)


def _timm_out(attention: Any, joined: Tensor, z: Tensor) -> Tensor:
    joined = getattr(attention, "norm", nn.Identity())(joined)
    if getattr(attention, "gate", None) is not None:
        joined = joined * attention.gate(z).sigmoid()
    return attention.proj(joined)


def _scaled(block: Any, branch: int, x: Tensor) -> Tensor:
    """Apply the layer scale of branch 1 (attention) or 2 (MLP), under whatever name it has."""
    for name in (f"ls_{branch}", f"ls{branch}"):
        if hasattr(block, name):
            return getattr(block, name)(x)
    gamma = getattr(block, f"gamma_{branch}", None)
    return x if gamma is None else gamma * x
