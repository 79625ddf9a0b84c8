"""Dense features aligned with text: images -> B x E x h x w.

A dense method is one function and one registration. LaSt needs no change of the last attention:
`vanilla` takes the patch tokens through the same norm and projection as the pooled vector.
Not here: windows, upsampling and decisions (the evaluation).
"""

from collections.abc import Callable

from torch import Tensor, nn

from lazyclip.base.registry import Registry
from lazyclip.tower import encode_patches, project

# (model, images B x 3 x H x W) -> B x E x h x w, not normalised.
DenseMethod = Callable[[nn.Module, Tensor], Tensor]
METHODS: Registry[DenseMethod] = Registry("dense method")


@METHODS.add("vanilla")
def _vanilla(model: nn.Module, images: Tensor) -> Tensor:
    patches, grid = encode_patches(model, images)
    dense = project(model, patches)  # B x N x E
    B, _, E = dense.shape
    return dense.transpose(1, 2).reshape(B, E, *grid)


def encode_dense(model: nn.Module, images: Tensor, method: str = "vanilla") -> Tensor:
    """Encode images into dense features in text space.

    Args:
        model: a CLIP model of open_clip with a ViT or EVA image tower.
        images: B x 3 x H x W, normalised; H and W multiples of the patch.
        method: a name in `METHODS`.

    Returns:
        Dense features, B x E x h x w, not normalised.

    Raises:
        UserError: unknown method, sides that the patch does not divide, or a tower without patch
            tokens (attention-pooled SigLIP, ConvNeXt, ResNet).
    """
    return METHODS[method](model, images)
