"""Zero-shot segmentation once more, step by step in numpy float64 with loops.

Slow on purpose and independent of `eval.segmentation`: imports numpy only. Images are H x W x 3,
maps Q x h x w, label maps H x W.
"""

import math

import numpy as np

IGNORE = 255


def target_size(height, width, short, cap):
    """New height and width: short side to `short` unless the long side would pass `cap`."""
    factor = short / min(height, width)
    if factor * max(height, width) > cap:
        factor = cap / max(height, width)
    return math.floor(height * factor + 0.5), math.floor(width * factor + 0.5)


def bilinear(array, height, width):
    """Resize H x W x ... by half-pixel bilinear interpolation, no antialias."""
    array = np.asarray(array, dtype=np.float64)
    old_height, old_width = array.shape[:2]

    def taps(place, old, new):
        centre = (place + 0.5) * old / new - 0.5
        centre = min(max(centre, 0.0), old - 1.0)
        low = min(math.floor(centre), old - 1)
        return low, min(low + 1, old - 1), centre - low

    out = np.zeros((height, width, *array.shape[2:]))
    columns = [taps(x, old_width, width) for x in range(width)]
    for y in range(height):
        top, bottom, down = taps(y, old_height, height)
        for x, (left, right, across) in enumerate(columns):
            upper = array[top, left] * (1 - across) + array[top, right] * across
            lower = array[bottom, left] * (1 - across) + array[bottom, right] * across
            out[y, x] = upper * (1 - down) + lower * down
    return out


def bilinear_maps(maps, height, width):
    """Resize Q x h x w."""
    return np.moveaxis(bilinear(np.moveaxis(maps, 0, -1), height, width), -1, 0)


def resize_uint8(image, height, width):
    """Resize a picture and round to whole grey levels."""
    if image.shape[:2] == (height, width):
        return image.copy()
    return np.clip(np.floor(bilinear(image, height, width) + 0.5), 0, 255).astype(np.uint8)


def windows(height, width, crop, stride):
    """Boxes (y0, y1, x0, x1) row by row; the last of a row or column is moved back."""
    if crop == 0:
        return [(0, height, 0, width)]
    boxes = []
    y = 0
    while True:
        y1 = min(y + crop, height)
        x = 0
        while True:
            x1 = min(x + crop, width)
            boxes.append((max(y1 - crop, 0), y1, max(x1 - crop, 0), x1))
            if x1 == width:
                break
            x += stride
        if y1 == height:
            return boxes
        y += stride


def cosines(features, queries):
    """Cosine of features E x h x w with queries Q x E: Q x h x w."""
    _, height, width = features.shape
    out = np.zeros((len(queries), height, width))
    for q, query in enumerate(queries):
        for y in range(height):
            for x in range(width):
                token = features[:, y, x]
                lengths = math.sqrt(float(token @ token)) * math.sqrt(float(query @ query))
                out[q, y, x] = float(token @ query) / lengths
    return out


def stitch(maps, boxes, height, width, stretched=None, pad=(0, 0)):
    """Average maps resized to their windows; or to `stretched`, the window cut out at `pad`."""
    total, count = np.zeros((len(maps[0]), height, width)), np.zeros((height, width))
    for one, (y0, y1, x0, x1) in zip(maps, boxes, strict=True):
        grown = bilinear_maps(one, *(stretched or (y1 - y0, x1 - x0)))
        top, left = pad
        total[:, y0:y1, x0:x1] += grown[:, top : top + y1 - y0, left : left + x1 - x0]
        count[y0:y1, x0:x1] += 1
    return total / count


def padded(window, patch):
    """Zeros around H x W x 3 up to whole patches, the smaller half above and left; and where."""
    down, across = -window.shape[0] % patch, -window.shape[1] % patch
    top, left = down // 2, across // 2
    return np.pad(window, ((top, down - top), (left, across - left), (0, 0))), (top, left)


def canvas_of(image, f, short, cap, crop, stride, mean, std, pad_patch=None):
    """Resize, normalise, run f on each window, average the stretched maps: Q x H' x W'.

    Windows are padded to whole patches of `pad_patch` pixels where that is given.
    """
    height, width = target_size(*image.shape[:2], short, cap)
    pixels = (resize_uint8(image, height, width) - np.array(mean)) / np.array(std)
    boxes = windows(height, width, crop, stride)
    maps, stretched, at = [], None, (0, 0)
    for y0, y1, x0, x1 in boxes:
        window = pixels[y0:y1, x0:x1]
        if pad_patch:
            window, at = padded(window, pad_patch)
            stretched = window.shape[:2]
        maps.append(f(window))
    return stitch(maps, boxes, height, width, stretched, at)


def pamr(maps, image, iterations, dilations):
    """Refine maps Q x H x W by an image 3 x H x W, pixel by pixel, borders repeated."""
    _, height, width = maps.shape

    def place(y, x):
        return min(max(y, 0), height - 1), min(max(x, 0), width - 1)

    weights = {}
    for y in range(height):
        for x in range(width):
            box = [
                place(y + d * down, x + d * across)
                for d in dilations
                for down in (-1, 0, 1)
                for across in (-1, 0, 1)
            ]
            colours = np.array([image[:, v, u] for v, u in box])
            spread = 1e-8 + 0.1 * colours.std(axis=0, ddof=1)
            around = [i for i in range(len(box)) if i % 9 != 4]
            near = [np.mean(-np.abs(image[:, y, x] - colours[i]) / spread) for i in around]
            grown = np.exp(np.array(near) - max(near))
            weights[y, x] = [box[i] for i in around], grown / grown.sum()
    for _ in range(iterations):
        fresh = np.zeros(maps.shape)
        for (y, x), (around, shares) in weights.items():
            for (v, u), share in zip(around, shares, strict=True):
                fresh[:, y, x] += share * maps[:, v, u]
        maps = fresh
    return maps


def class_scores(maps, owners, classes, scale):
    """Softmax over all queries, then the maximum of each class's queries: C x H x W."""
    scaled = maps * scale
    grown = np.exp(scaled - scaled.max(axis=0))
    shares = grown / grown.sum(axis=0)
    out = np.zeros((classes, *maps.shape[1:]))
    for q, owner in enumerate(owners):
        out[owner] = np.maximum(out[owner], shares[q])
    return out


def decide(scores, threshold=0.0, area=0.0):
    """Area rule, argmax, threshold: label map and the margin between the two best scores."""
    scores = scores.copy()
    if area > 0:
        first = scores.argmax(axis=0)
        sizes = [(first == c).sum() for c in range(len(scores))]
        for c in range(1, len(scores)):
            if sizes[c] <= area * sum(sizes[1:]):
                scores[c] = 0.0
    best = scores.max(axis=0)
    ranked = np.sort(scores, axis=0)
    labels = scores.argmax(axis=0)
    labels[best < threshold] = 0
    margin = np.minimum(ranked[-1] - ranked[-2], np.abs(best - threshold))
    return labels, margin


def scores_of(pairs, classes):
    """IoU and accuracy of each class, mIoU, aAcc, mAcc from (label, prediction) pairs."""
    both, found, truth = [0] * classes, [0] * classes, [0] * classes
    for label, prediction in pairs:
        for wanted, given in zip(label.ravel().tolist(), prediction.ravel().tolist(), strict=True):
            if wanted == IGNORE:
                continue
            truth[wanted] += 1
            found[given] += 1
            both[wanted] += wanted == given
    unions = [t + p - b for t, p, b in zip(truth, found, both, strict=True)]
    iou = [b / u if u else None for b, u in zip(both, unions, strict=True)]
    accuracy = [b / t if t else None for b, t in zip(both, truth, strict=True)]
    there = [v for v in iou if v is not None]
    known = [v for v in accuracy if v is not None]
    return {
        "iou": iou,
        "accuracy": accuracy,
        "miou": sum(there) / len(there) if there else None,
        "aacc": sum(both) / sum(truth) if sum(truth) else None,
        "macc": sum(known) / len(known) if known else None,
    }
