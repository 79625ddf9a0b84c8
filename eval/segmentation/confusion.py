"""Confusion counts and the scores made from them: IoU, mIoU, aAcc, mAcc.

Counts are summed over the whole split before any division; the mean of per-image IoUs is another
number. Not here: label rules, files.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .readers import IGNORE

Counts = npt.NDArray[np.int64]


def count(label: Counts, prediction: Counts, classes: int) -> Counts:
    """Count pixels by truth and prediction, ignored pixels (255) left out.

    Args:
        label: H x W int64, 0..C-1 or 255.
        prediction: H x W int64, 0..C-1.
        classes: number of classes C.

    Returns:
        C x C int64, rows truth, columns prediction.

    Raises:
        ValueError: two shapes, or an id outside the classes.
    """
    if label.shape != prediction.shape:
        raise ValueError(f"label is {label.shape}, prediction {prediction.shape}")
    kept = label != IGNORE
    truth, guess = label[kept].astype(np.int64), prediction[kept].astype(np.int64)
    for name, ids in (("label", truth), ("prediction", guess)):
        if ids.size and (ids.min() < 0 or ids.max() >= classes):
            raise ValueError(f"{name} ids {ids.min()}..{ids.max()} are outside 0..{classes - 1}")
    return np.bincount(truth * classes + guess, minlength=classes**2).reshape(classes, classes)


def count_on(label: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Count as `count` does, on the device of the tensors.

    Args:
        label: H x W uint8 or int64, 0..C-1 or 255.
        prediction: H x W uint8 or int64, 0..C-1.
        classes: number of classes C, at most 255.

    Returns:
        C x C int64, rows truth, columns prediction.

    Raises:
        ValueError: two shapes, or an id outside the classes.
    """
    if label.shape != prediction.shape:
        raise ValueError(f"label is {tuple(label.shape)}, prediction {tuple(prediction.shape)}")
    for name, ids in (("label", label), ("prediction", prediction)):
        if ids.dtype != torch.uint8 and ids.numel():
            low, high = (int(v) for v in ids.aminmax())
            if low < 0 or high > IGNORE:
                raise ValueError(f"{name} ids {low}..{high} are outside 0..{classes - 1}")
    # A table of all bytes holds every pair, so that filtering and checking look at it alone.
    side = IGNORE + 1
    pairs = label.to(torch.int32).mul_(side).add_(prediction).flatten()
    table = torch.bincount(pairs, minlength=side**2).view(side, side)[:IGNORE]
    if bool(table[classes:].any()) or bool(table[:, classes:].any()):
        truth, guess = table.sum(dim=1).nonzero(), table.sum(dim=0).nonzero()
        name, ids = ("label", truth) if truth[-1] >= classes else ("prediction", guess)
        raise ValueError(f"{name} ids {ids.min()}..{ids.max()} are outside 0..{classes - 1}")
    return table[:classes, :classes].clone()


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a split as fractions; None where nothing was there to divide by.

    Attributes:
        iou: per class, None for a class neither labelled nor predicted.
        accuracy: per class, share of its labelled pixels found, None for an unlabelled class.
        miou: mean of the IoUs that are not None.
        aacc: share of all labelled pixels found.
        macc: mean of the accuracies that are not None.
    """

    iou: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    miou: float | None
    aacc: float | None
    macc: float | None


def _ratios(top: Counts, bottom: Counts) -> tuple[float | None, ...]:
    return tuple(int(t) / int(b) if b else None for t, b in zip(top, bottom, strict=True))


def _mean(values: tuple[float | None, ...]) -> float | None:
    there = [v for v in values if v is not None]
    return math.fsum(there) / len(there) if there else None


def score(confusion: Counts) -> Scores:
    """Make the scores from counts C x C (rows truth, columns prediction) of a whole split."""
    found = np.diagonal(confusion)
    labelled, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    iou = _ratios(found, labelled + predicted - found)
    accuracy = _ratios(found, labelled)
    total = int(labelled.sum())
    return Scores(
        iou=iou,
        accuracy=accuracy,
        miou=_mean(iou),
        aacc=int(found.sum()) / total if total else None,
        macc=_mean(accuracy),
    )
