"""From cosine maps to a label map: scale, softmax, synonym maximum, area and background rule.

The order of steps is that of wangf3014/SCLIP `clip_segmentor.py`, on maps of the picture's size.
Not here: where the windows' maps come from, and the same without maps of that size (`separable`).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .pamr import refine
from .protocol import Protocol
from .windows import Plan, normalise, resize_image, stitch, upsample


def merge_queries(maps: Tensor, query_class: Sequence[int], classes: int) -> Tensor:
    """Keep, per class, the maximum over its queries.

    Args:
        maps: Q x H x W, probabilities or cosines.
        query_class: class id of each query, length Q.
        classes: number of classes C; each needs a query.

    Returns:
        C x H x W; not renormalised.

    Raises:
        ValueError: the lengths differ, or a class has no query.
    """
    if maps.shape[0] != len(query_class) or set(query_class) != set(range(classes)):
        raise ValueError(
            f"{maps.shape[0]} maps, {len(query_class)} queries for {len(set(query_class))} of "
            f"{classes} classes; each map needs a class and each class a query"
        )
    owner = torch.tensor(query_class, device=maps.device)
    merged = maps.new_full((classes, *maps.shape[1:]), -torch.inf)
    # Not by a one-hot product: that would make C x Q x H x W numbers.
    return merged.scatter_reduce_(0, owner.view(-1, 1, 1).expand_as(maps), maps, "amax")


def class_scores(
    cosines: Tensor, query_class: Sequence[int], classes: int, logit_scale: float
) -> Tensor:
    """Return class probabilities C x H x W: softmax over all queries, maximum over synonyms.

    Args:
        cosines: Q x H x W.
        query_class: class id of each query.
        classes: number of classes C.
        logit_scale: factor on the cosines.
    """
    probabilities = (cosines * logit_scale).softmax(dim=0, dtype=torch.float32)
    return merge_queries(probabilities, query_class, classes)


def small_classes(counts: Sequence[int], area: float) -> frozenset[int]:
    """Name the classes that the area rule removes.

    Args:
        counts: pixels of each class when every pixel takes its best one; class 0 is background.
        area: share of the foreground pixels up to which a class is removed.
    """
    most = area * sum(counts[1:])
    return frozenset(c for c, n in enumerate(counts) if c > 0 and n <= most)


def label_map(scores: Tensor, threshold: float = 0.0, area: float = 0.0) -> Tensor:
    """Choose a class at each pixel.

    Args:
        scores: C x H x W; class 0 is the background when a rule below is used.
        threshold: a pixel whose best score lies below becomes class 0; exactly equal stays.
        area: a class that holds at most this share of the pixels not argmax 0 is left out.

    Returns:
        H x W int64, ids 0..C-1.
    """
    if area > 0:
        first = scores.argmax(dim=0)
        counts = torch.bincount(first.flatten(), minlength=scores.shape[0])
        scores = scores.clone()
        scores[sorted(small_classes(counts.tolist(), area))] = 0.0
    best, chosen = scores.max(dim=0)
    if threshold > 0:
        chosen = chosen.masked_fill(best < threshold, 0)
    return chosen


def decide(
    cosines: Tensor,
    query_class: Sequence[int],
    classes: int,
    *,
    logit_scale: float,
    threshold: float = 0.0,
    area: float = 0.0,
) -> Tensor:
    """Make the label map H x W int64 from cosine maps Q x H x W.

    Without a threshold and an area rule the softmax is left out: it and the scale are monotonic and
    the same for all queries of a pixel, so they do not move the maximum.
    """
    if threshold == 0 and area == 0 and logit_scale > 0:
        return label_map(merge_queries(cosines, query_class, classes))
    scores = class_scores(cosines, query_class, classes, logit_scale)
    return label_map(scores, threshold, area)


def by_canvas(
    maps: Tensor,
    plan: Plan,
    protocol: Protocol,
    query_class: Sequence[int],
    image: npt.NDArray[np.uint8] | None = None,
) -> Tensor:
    """Make the label map from the windows' cosine maps step by step, Q maps of the picture's size.

    Args:
        maps: n x Q x h x w, in the order of the plan's windows.
        plan: sizes and windows.
        protocol: decision, and refinement by the picture.
        query_class: class id of each query.
        image: the picture, H x W x 3 uint8; only a protocol with PAMR needs it.

    Returns:
        H x W uint8, ids 0..C-1, on the device of the maps.

    Raises:
        ValueError: PAMR without the picture.
    """
    canvas = stitch(maps, plan.boxes, plan.size, plan.stretched, plan.pad)
    full = upsample(canvas, plan.original)
    del canvas
    if protocol.pamr != "off":
        if image is None:
            raise ValueError(f"pamr '{protocol.pamr}' needs the picture")
        small = normalise(resize_image(image, plan.size), protocol.mean, protocol.std)
        full = refine(full, small.to(full.device), protocol.pamr)
    labels = decide(
        full,
        query_class,
        protocol.classes,
        logit_scale=protocol.logit_scale,
        threshold=protocol.threshold,
        area=protocol.area,
    )
    return labels.to(torch.uint8)
