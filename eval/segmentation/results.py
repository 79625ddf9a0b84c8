"""Scores as people and programs read them: the table, the csv by class, the parts of the JSON.

Not here: how they were made, and which results can be set side by side.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .confusion import Counts, Scores
from .protocol import Protocol


def percent(value: float | None, digits: int = 1) -> str:
    """Write a fraction in per cent; `-` where there is none."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def class_table(names: Sequence[str], scores: Scores) -> list[str]:
    """Return the lines of the table class, IoU, Acc, in per cent."""
    wide = max(len("class"), *map(len, names))
    lines = [f"{'class':<{wide}}  {'IoU':>5}  {'Acc':>5}"]
    for name, iou, accuracy in zip(names, scores.iou, scores.accuracy, strict=True):
        lines.append(f"{name:<{wide}}  {percent(iou):>5}  {percent(accuracy):>5}")
    return lines


def summary(protocol: Protocol, scores: Scores, images: int, method: str, pooling: str) -> str:
    """Return the line that may be copied: scores with what they depend on."""
    return (
        f"{protocol.dataset}  mIoU {percent(scores.miou, 2)}  aAcc {percent(scores.aacc)}  "
        f"mAcc {percent(scores.macc)}  ({images} images, protocol {protocol.name}:{protocol.hash}, "
        f"method {method}, pooling {pooling})"
    )


def result_parts(names: Sequence[str], protocol: Protocol, scores: Scores) -> dict[str, Any]:
    """Return data set, scores as fractions and protocol for a result file."""
    return {
        "dataset": protocol.dataset,
        "miou": scores.miou,
        "aacc": scores.aacc,
        "macc": scores.macc,
        "iou": dict(zip(names, scores.iou, strict=True)),
        "protocol": protocol.to_dict(),
    }


def write_classes(file: Path, names: Sequence[str], scores: Scores, confusion: Counts) -> None:
    """Write one row a class: scores as fractions, and the pixel counts they are made from."""
    truth, found = confusion.sum(axis=1), confusion.sum(axis=0)
    with file.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("id", "class", "iou", "accuracy", "truth_px", "predicted_px", "both_px"))
        for i, name in enumerate(names):
            ratios = (scores.iou[i], scores.accuracy[i])
            table.writerow((i, name, *ratios, truth[i], found[i], confusion[i, i]))
