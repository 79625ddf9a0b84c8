"""The real samples of every benchmark: examined, scored by every method, counted once more."""

import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from eval import zeroshot_seg
from eval.segmentation.confusion import count, score
from eval.segmentation.readers.labels import to_ids
from lazyclip.dense import METHODS

pytestmark = [pytest.mark.data, pytest.mark.slow]

# data set, sample, split, pairs in the sample
SETS = [
    ("voc20", "voc2012_sample", "val", 29),
    ("voc21", "voc2012_sample", "official_val", 14),
    ("context59", "pascal_context_sample", "val", 2),
    ("context60", "pascal_context_sample", "val", 2),
    ("cityscapes", "cityscapes_sample", "train", 3),
    ("ade20k", "ade20k_sample", "val", 5),
    ("coco_stuff", "coco_stuff164k_sample", "val", 4),
    ("coco_object", "coco_stuff164k_sample", "train", 7),
    ("coco_object", "coco2017_panoptic_sample", "val", 50),
]
QUICK = ("--short", "112", "--window", "64", "--stride", "48", "--templates", "plain",
         "--model", "ViT-nano", "--random-weights")  # fmt: skip


@pytest.fixture(scope="module")
def unpacked(shared_data, tmp_path_factory):
    """Unpack a sample once, each into a data root of its own."""
    roots = {}

    def root_of(name):
        tar = shared_data / "segmentation" / f"{name}.tar"
        if not tar.is_file():
            pytest.skip(f"{tar.name} is not among the real data")
        if name not in roots:
            roots[name] = tmp_path_factory.mktemp(name)
            with tarfile.open(tar) as opened:
                opened.extractall(roots[name], filter="data")
        return roots[name]

    return root_of


@pytest.mark.parametrize(("dataset", "sample", "split", "pairs"), SETS)
def test_a_sample_is_scored_whole_by_every_method(
    unpacked, tmp_path, capsys, dataset, sample, split, pairs
):
    scores = {}
    for method in METHODS:
        limit = () if method == "vanilla" else ("--limit", "1")
        out = tmp_path / method
        words = ["--dataset", dataset, "--data-root", unpacked(sample), "--split", split,
                 "--method", method, "--output", out, "--overlays", "1",
                 "--save-predictions", out / "masks", *limit, *QUICK]  # fmt: skip
        assert zeroshot_seg.main([str(word) for word in words]) == 0, capsys.readouterr().err
        results = json.loads((out / "results.json").read_text())
        assert results["images"] == (pairs if not limit else 1)
        assert results["bad"] == []
        # No count is known for the list `official_val`; the others are smaller than the benchmark.
        assert results["complete"] is (split == "official_val" and not limit)
        scores[method] = results["miou"]
    assert len(list((tmp_path / "vanilla" / "masks").rglob("*.png"))) == pairs
    assert all(0 <= value <= 1 for value in scores.values())
    first = sorted((tmp_path / "sclip" / "masks").rglob("*.png"))[0]
    name = first.relative_to(tmp_path / "sclip")
    maps = {(tmp_path / method / name).read_bytes() for method in METHODS}
    assert len(maps) == len(list(METHODS))


def test_shifted_masks_of_voc_are_counted_as_an_independent_count_does(shared_data):
    tar = shared_data / "segmentation" / "voc2012_val_masks.tar.gz"
    if not tar.is_file():
        pytest.skip(f"{tar.name} is not among the real data")
    total = np.zeros((21, 21), dtype=np.int64)
    both, found, truth = (np.zeros(21, dtype=np.int64) for _ in range(3))
    masks = 0
    with tarfile.open(tar) as opened:
        for member in opened:
            if not member.name.endswith(".png"):
                continue
            masks += 1
            with Image.open(opened.extractfile(member)) as picture:
                stored = np.asarray(picture, dtype=np.int64)
            label = to_ids(stored, "as_is", 21, member.name)
            shifted = np.roll(label, (3, -2), axis=(0, 1))
            guess = np.where(shifted == 255, 0, shifted)
            total += count(label, guess, 21)
            there = label != 255
            same = label[there][label[there] == guess[there]]
            both += np.bincount(same, minlength=21)
            found += np.bincount(guess[there], minlength=21)
            truth += np.bincount(label[there], minlength=21)
    iou = both / (truth + found - both)
    scores = score(total)
    assert masks == 725
    assert scores.iou == pytest.approx(iou.tolist(), abs=1e-12)
    assert scores.miou == pytest.approx(iou.mean(), abs=1e-12)
    assert 0.5 < scores.miou < 0.99
