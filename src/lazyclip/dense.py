"""Dense features aligned with text: images -> B x E x h x w.

A dense method is one small function, the attention of the tower's last block, and two switches:
whether that block's input is added to it, and whether its MLP follows. All earlier blocks, the
final norm and the projection are the tower's own. LaSt needs none of it: `vanilla` takes the patch
tokens through the same norm and projection as the pooled vector.
Not here: windows, upsampling and decisions (the evaluation), where a tower keeps q, k and v
(`bridge.last_block`).

On towers with rotary positions (EVA) q and k reach each method after the rotary step, the q-q and
k-k attentions included; v carries none. No source fixes this: the methods were published for CLIP.

Letters: B images, T tokens with prefix, E joint width, d the width of a head, h, w patch grid.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lazyclip import bridge
from lazyclip.base.errors import UserError
from lazyclip.base.registry import Registry
from lazyclip.bridge import Attend, Heads
from lazyclip.tower import encode_patches, project

DenseMethod = bridge.Route
METHODS: Registry[DenseMethod] = Registry("dense method")
NACLIP_SIGMA = 5.0  # in patches

METHODS.add("vanilla")(DenseMethod())


def dense_method(name: str, *, residual: bool, mlp: bool) -> Callable[[Attend], Attend]:
    """File an attention as a dense method.

    Args:
        name: what `--method` calls it.
        residual: whether the last block's input is added to the attention's output.
        mlp: whether the last block's MLP follows, with its own residual.

    Returns:
        A decorator of a function from `Heads` to the attended values, B x heads x T x d.
    """

    def file(attend: Attend) -> Attend:
        METHODS.add(name)(DenseMethod(attend, residual, mlp))
        return attend

    return file


@dense_method("maskclip", residual=True, mlp=True)
def _identity(heads: Heads) -> Tensor:
    """Let each token see itself (MaskCLIP, as its own code has it: residual and MLP stay).

    ClearCLIP's code calls another thing MaskCLIP: it drops the residual and the MLP as well.
    """
    return heads.v


@dense_method("sclip", residual=True, mlp=True)
def _query_and_key(heads: Heads) -> Tensor:
    """Add the q-q and the k-k attention, rows summing to 2 (SCLIP; its code does not halve)."""
    return _attend(heads, heads.q) + _attend(heads, heads.k)


@dense_method("clearclip", residual=False, mlp=False)
def _query_query(heads: Heads) -> Tensor:
    """Let queries attend to queries (ClearCLIP)."""
    return _attend(heads, heads.q)


@dense_method("naclip", residual=False, mlp=False)
def _neighbour_key(heads: Heads) -> Tensor:
    """Let keys attend to keys, near patches favoured (NACLIP, its `reduced` architecture)."""
    return _attend(heads, heads.k, _cached_nearness(heads.grid, heads.prefix, heads.k.device))


def _attend(heads: Heads, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(x x^T scale + bias) v, B x heads x T x d."""
    bias = None if bias is None else bias.to(x.dtype)
    return scaled_dot_product_attention(x, x, heads.v, attn_mask=bias, scale=heads.scale)


def nearness(grid: tuple[int, int], prefix: int = 1, sigma: float = NACLIP_SIGMA) -> Tensor:
    """Compute what NACLIP adds to the scaled logits: exp(-r^2 / (2 sigma^2)).

    Args:
        grid: patch grid (h, w).
        prefix: leading tokens that are no patches; their rows and columns are 0.
        sigma: deviation in patches, above 0.

    Returns:
        T x T float32, r the distance of two patches on the grid.
    """
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}; use a number above 0")
    y, x = (torch.arange(side, dtype=torch.float64) for side in grid)
    places = torch.cartesian_prod(y, x)  # N x 2, row by row
    squared = (places[:, None] - places[None]).square().sum(dim=-1)
    near = torch.exp(-squared / (2 * sigma**2)).float()
    return torch.nn.functional.pad(near, (prefix, 0, prefix, 0))


@functools.lru_cache(maxsize=64)
def _cached_nearness(grid: tuple[int, int], prefix: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return nearness(grid, prefix).to(device)


def refuse_method(model: nn.Module, method: str) -> None:
    """Raise `UserError` where a method does not run on a model's image tower."""
    route = METHODS[method]
    trunk = bridge.trunk_of(model)
    reason = bridge.refusal(trunk)
    if reason:
        raise UserError(f"no dense features come out of this tower: {reason}")
    reason = None if route.attend is None else bridge.route_refusal(trunk)
    if reason:
        raise UserError(f"method '{method}' does not run on this tower: {reason}; use vanilla")


def encode_dense(
    model: nn.Module,
    images: Tensor,
    method: str = "vanilla",
    positions: str = "antialias",
) -> Tensor:
    """Encode images into dense features in text space.

    Args:
        model: a CLIP model of open_clip with a ViT or EVA image tower.
        images: B x 3 x H x W, normalised; H and W multiples of the patch.
        method: a name in `METHODS`.
        positions: how learned position embeddings come to a grid that is not the tower's own:
            `antialias` as open_clip loads weights, or `offset` as the published code of SCLIP,
            NACLIP and ClearCLIP does (see `bridge.resize_positions`).

    Returns:
        Dense features, B x E x h x w, not normalised.

    Raises:
        UserError: unknown method or interpolation, sides that the patch does not divide, a tower
            without patch tokens (attention-pooled SigLIP, ConvNeXt, ResNet), or one whose last
            block the method cannot take apart.
    """
    refuse_method(model, method)
    route = METHODS[method]
    patches, grid = encode_patches(
        model, images, positions, None if route.attend is None else route
    )
    dense = project(model, patches)  # B x N x E
    B, _, E = dense.shape
    return dense.transpose(1, 2).reshape(B, E, *grid)
