"""From cosine maps to a label map: scale, softmax, synonym maximum, area and background rule.

The order of steps is that of wangf3014/SCLIP `clip_segmentor.py`. Not here: where the maps come
from.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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
        small = counts <= area * counts[1:].sum()
        small[0] = False
        scores = scores.masked_fill(small.view(-1, 1, 1), 0.0)
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
