"""Running the segmentation command on the toy data set, and looking at what it left."""

import numpy as np
from PIL import Image

from eval import zeroshot_seg
from tests.toy_voc import palette_png

MODEL = ("--model", "LaSt-ViT-nano", "--random-weights")


def command(toy, *more, model=MODEL, root="data", dataset="toy.yaml", output="out"):
    words = ["--dataset", str(toy / dataset), "--data-root", str(toy / root), *model]
    return [*words, *(("--output", str(toy / output)) if output else ()), *more]


def refused(capsys, words):
    """Run, expect exit code 2 and one line on stderr, and return that line."""
    assert zeroshot_seg.main([str(w) for w in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    errors = [line for line in printed.err.splitlines() if " | " not in line]
    assert len(errors) == 1, printed.err
    assert errors[0].startswith("error: ")
    return errors[0]


def ids_of(file):
    with Image.open(file) as opened:
        return np.asarray(opened).astype(int)


def read_pairs(masks, labels, ids):
    pairs = []
    for name in ids:
        stored = ids_of(labels / f"{name}.png")
        label = np.where((stored == 0) | (stored == 255), 255, stored - 1)
        pairs.append((label, ids_of(masks / f"{name}.png")))
    return pairs


def spoil_labels(toy, *names):
    """Give label files an id that is no class."""
    for name in names:
        file = toy / "data/VOCdevkit/VOC2012/SegmentationClass" / f"{name}.png"
        palette_png(file, np.full(ids_of(file).shape, 9))
