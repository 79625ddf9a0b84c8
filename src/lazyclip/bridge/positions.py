"""Position embeddings on another patch grid.

Letters: N patch tokens, P prefix tokens, D tower width, h, w patch grid.
Not here: which tower needs it (`tokens` for one call, `hooks` for a state dict).
"""

import torch
from torch import Tensor
from torch.nn import functional

from lazyclip.base.errors import unknown

POSITIONS = ("antialias", "offset")


def check_positions(how: str) -> None:
    """Raise `UserError` for an interpolation of positions that is not known."""
    if how not in POSITIONS:
        raise unknown("interpolation of positions", how, POSITIONS)


def resize_positions(
    positions: Tensor,
    old: tuple[int, int],
    new: tuple[int, int],
    prefix: int = 1,
    how: str = "antialias",
) -> Tensor:
    """Interpolate position embeddings from one patch grid to another, by height and width.

    Bicubic over the patch rows. Equal counts with other shapes (7 x 28 and 14 x 14) differ.

    Args:
        positions: (P + N) x D.
        old: their grid (h, w).
        new: the wanted grid (h, w).
        prefix: leading rows that are no patches; they are kept.
        how: `antialias` is open_clip's own on loading, so that a tower loaded at a size and one
            called at that size agree. `offset` is that of the published training-free methods
            (DINO's scale of (n + 0.1) / old, no antialias), whose samples lie slightly aside; it
            is theirs on any grid but the tower's own, where both leave the rows alone.

    Raises:
        UserError: another `how`.
    """
    check_positions(how)
    if tuple(old) == tuple(new):
        return positions
    kept, patches = positions[:prefix], positions[prefix:]
    plane = patches.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    if how == "antialias":
        plane = functional.interpolate(
            plane, size=tuple(new), mode="bicubic", antialias=True, align_corners=False
        )
    else:
        # The tenth keeps floor(old * scale) at new, whatever the division rounds to.
        scale = [(n + 0.1) / o for n, o in zip(new, old, strict=True)]
        plane = functional.interpolate(
            plane, scale_factor=scale, mode="bicubic", align_corners=False
        )
    rows = plane.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(positions.dtype)
    return torch.cat([kept, rows], dim=0)
