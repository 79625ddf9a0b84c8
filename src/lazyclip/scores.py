"""Patch Score and Point-in-Box (paper, Eq. 3 and its section on localisation), with references.

Needs torch only. A Point-in-Box share means little alone: print `chance_share` and `centre_share`
beside it. Not here: which patches a box holds (`boxes`), images, models.

Letters: B images, N patch tokens, D channels, h, w patch grid.
"""

import math

import torch
from torch import Tensor

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def _unit(x: Tensor) -> Tensor:
    """Scale vectors (last axis) to length 1; zero vectors stay zero, sizes may be extreme."""
    wide = x if x.dtype == torch.float64 else x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    # Dividing by the largest entry first: squares of 1e-30 or 1e30 leave float32.
    scaled = wide / torch.where(largest == 0, torch.ones_like(largest), largest)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(length == 0, torch.ones_like(length), length)


def patch_score(x: Tensor, q: Tensor) -> Tensor:
    """Score each patch by its cosine with the image's global feature (paper, Eq. 3).

    Both must come from the same space: after the final norm before the projection, or both after
    it.

    Args:
        x: patch tokens, B x N x D, prefix tokens already removed.
        q: global features, B x D: the CLS output of a plain ViT, the pooled vector of a LaSt tower;
            or a text feature per image.

    Returns:
        Cosines, B x N; float64 when both are, float32 otherwise. A zero vector scores 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim != 3 or q.ndim != 2 or x.shape[0] != q.shape[0] or x.shape[2] != q.shape[1]:
        raise ValueError(
            f"patch tokens B x N x D and q B x D do not fit: {tuple(x.shape)} and {tuple(q.shape)}"
        )
    if not (x.dtype == q.dtype == torch.float64):
        x, q = x.float(), q.float()
    with torch.autocast(x.device.type, enabled=False):
        return (_unit(x) * _unit(q)[:, None, :]).sum(dim=-1)


def first_maximum(scores: Tensor) -> Tensor:
    """Return the lowest patch index of the largest float32 score, B int64.

    Raises:
        ValueError: another shape, or NaN scores.
    """
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must be B x N; got {tuple(scores.shape)}")
    single = scores.float()
    if bool(single.isnan().any()):
        rows = int(single.isnan().any(dim=1).sum())
        raise ValueError(f"the scores of {rows} of {len(single)} images hold NaN")
    N = single.shape[1]
    index = torch.arange(N, device=single.device).expand_as(single)
    best = single == single.amax(dim=1, keepdim=True)
    return torch.where(best, index, N).amin(dim=1)


def _check_hits(hits: Tensor) -> None:
    if hits.ndim != 2 or hits.dtype != torch.bool or hits.shape[1] == 0:
        raise ValueError(f"hits must be B x N bool; got {tuple(hits.shape)} {hits.dtype}")


def point_in_box(scores: Tensor, hits: Tensor) -> Tensor:
    """Tell for each image whether its best patch lies in its box; the mean is the PiB.

    Args:
        scores: B x N; the first maximum of the float32 values counts.
        hits: B x N bool, the patches that count as in the box (`boxes.patch_hits`).

    Returns:
        B bool.

    Raises:
        ValueError: shapes that do not fit, or NaN scores.
    """
    _check_hits(hits)
    if scores.shape != hits.shape:
        raise ValueError(
            f"scores and hits do not fit: {tuple(scores.shape)} and {tuple(hits.shape)}"
        )
    return hits.gather(1, first_maximum(scores).to(hits.device)[:, None])[:, 0]


def chance_share(hits: Tensor) -> Tensor:
    """Return each image's share of patches counted as hits, B float64: a blind guess's PiB."""
    _check_hits(hits)
    return hits.double().mean(dim=1)


def centre_share(hits: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return each image's share of centre patches counted as hits, B float64.

    The PiB of "always the middle", the photographer's bias. An odd side has one middle row; of an
    even one both middle rows count, so that an even grid averages its four centre patches.

    Args:
        hits: B x N bool, row by row.
        grid: (h, w), h * w = N.
    """
    _check_hits(hits)
    h, w = grid
    if h * w != hits.shape[1]:
        raise ValueError(f"a grid of {h} x {w} does not fit {hits.shape[1]} patches")
    plane = hits.reshape(-1, h, w)[:, (h - 1) // 2 : h // 2 + 1, (w - 1) // 2 : w // 2 + 1]
    return plane.double().mean(dim=(1, 2))


def wilson_interval(count: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's interval of a share, by default with 95 % coverage.

    Args:
        count: hits, 0..n.
        n: trials, at least 1.
        z: half-width in standard normal units.
    """
    if not 0 <= count <= n or n < 1:
        raise ValueError(f"{count} of {n} is no share")
    share = count / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends rounding would leave 1e-17 instead of 0.
    low = 0.0 if count == 0 else middle - half
    high = 1.0 if count == n else middle + half
    return low, high
