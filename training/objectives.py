"""The loss: softmax contrastive over the global batch, as CLIP trains.

Not here: the towers, the optimiser.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .distributed import current_rank, gather


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Return this rank's share of the contrastive loss over all ranks.

    Each rank scores its own rows against everybody's columns, both ways. The mean of the ranks'
    values is the loss of the one big batch, and so is the mean of their gradients, which is what
    DistributedDataParallel takes.

    Args:
        images: image features, B x E, unit length.
        texts: text features, B x E, unit length, row by row the images' own.
        logit_scale: factor on the cosines, a scalar.

    Returns:
        A scalar, float32 (float64 for float64 features).
    """
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    images, texts, scale = images.to(wide), texts.to(wide), logit_scale.to(wide)
    B = images.shape[0]
    own = torch.arange(B, device=images.device) + current_rank() * B
    by_image = scale * images @ gather(texts).T  # B x world * B
    by_text = scale * texts @ gather(images).T
    return (functional.cross_entropy(by_image, own) + functional.cross_entropy(by_text, own)) / 2
