"""The loss: softmax contrastive over the global batch, as CLIP trains.

Not here: the towers, the optimiser.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .distributed import current_rank, gather, gather_plain


def contrastive_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, masked: Tensor | None = None
) -> Tensor:
    """Return this rank's share of the contrastive loss over all ranks.

    Each rank scores its own rows against everybody's columns, both ways. The mean of the ranks'
    values is the loss of the one big batch, and so is the mean of their gradients, which is what
    DistributedDataParallel takes. A masked slot is neither a row nor a column of that batch.

    Args:
        images: image features, B x E, unit length.
        texts: text features, B x E, unit length, row by row the images' own.
        logit_scale: factor on the cosines, a scalar.
        masked: B, true where a slot holds no sample; given on all ranks or on none.

    Returns:
        A scalar, float32 (float64 for float64 features).
    """
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    images, texts, scale = images.to(wide), texts.to(wide), logit_scale.to(wide)
    B = images.shape[0]
    own = torch.arange(B, device=images.device) + current_rank() * B
    by_image = scale * images @ gather(texts).T  # B x world * B
    by_text = scale * texts @ gather(images).T
    if masked is None:
        both = functional.cross_entropy(by_image, own) + functional.cross_entropy(by_text, own)
        return both / 2
    everybodys = gather_plain(masked)  # world * B
    # A masked row keeps its columns, so that its value stays finite; it weighs nothing.
    hidden = everybodys[None, :] & ~masked[:, None]
    weight = (~masked).to(wide) * (len(everybodys) // B) / (~everybodys).sum().clamp(min=1)
    total = torch.zeros((), dtype=wide, device=images.device)
    for logits in (by_image, by_text):
        rows = functional.cross_entropy(
            logits.masked_fill(hidden, -torch.inf), own, reduction="none"
        )
        total = total + (rows * weight).sum()
    return total / 2
