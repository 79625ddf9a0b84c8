"""The demo's world: sizes, shares, exact masks and boxes, textures, captions, determinism."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
from PIL import Image

from demo import scene, sets
from demo.sets import CLASSES, OWN_TEXTURE, draw_single, draw_two
from demo.world import Sizes, make_world
from eval.segmentation.protocol import read_task
from eval.segmentation.readers import READERS, to_ids
from lazyclip.shards import expand, iterate_samples, read_json_part

SIZES = Sizes(train=850, decorrelated=120, correlated=60, two=40)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "world"
    make_world(folder, seed=3, sizes=SIZES)
    return folder


def samples(folder):
    return [s for shard in expand(str(folder)) for s in iterate_samples(shard)]


def metas(folder):
    return [read_json_part(s) for s in samples(folder)]


def stored_labels(root, folder):
    files = sorted((root / "seg" / "VOCdevkit" / folder / "SegmentationClass").glob("*.png"))
    labels = []
    for file in files:
        with Image.open(file) as opened:
            labels.append(np.asarray(opened))
    return labels


def test_sets_have_their_sizes_in_shards_of_at_most_800(root):
    assert [f.name for f in expand(str(root / "train"))] == ["00000.tar", "00001.tar"]
    found = {name: len(samples(root / name)) for name in
             ("train", "test-decorrelated", "test-correlated")}  # fmt: skip
    assert found == {"train": 850, "test-decorrelated": 120, "test-correlated": 60}
    assert len(stored_labels(root, "Toy")) == 40
    assert len(stored_labels(root, "ToyOne")) == 120


def test_a_sample_carries_picture_caption_class_and_box(root):
    for sample in samples(root / "train")[795:805]:
        meta = read_json_part(sample)
        assert set(sample.parts) == {"jpg", "txt", "json"}
        assert meta["key"] == sample.key
        assert meta["class_name"] == CLASSES[meta["class_index"]]
        assert sample.parts["txt"].decode() == meta["caption"]
        assert f"{meta['class_name']} {meta['shape']}" in meta["caption"]
        assert (meta["width"], meta["height"]) == (64, 64)
    keys = [s.key for s in samples(root / "train")]
    assert len(set(keys)) == 850


def test_own_texture_comes_in_seven_of_ten_training_pictures_and_never_or_always_in_tests(root):
    share = {
        name: np.mean([m["texture"] == OWN_TEXTURE[m["class_index"]] for m in metas(root / name)])
        for name in ("train", "test-decorrelated", "test-correlated")
    }
    assert share["test-decorrelated"] == 0
    assert share["test-correlated"] == 1
    assert 0.64 < share["train"] < 0.76
    assert json.loads((root / "world.json").read_text())["own_texture_share"] == share["train"]


def test_the_other_textures_are_drawn_evenly():
    owned = np.full((11000, 1), 4)
    counts = np.bincount(sets._other_texture(owned, np.random.default_rng(0)), minlength=12)
    assert counts[4] == 0
    assert np.delete(counts, 4).min() > 850
    assert np.delete(counts, 4).max() < 1150


def test_objects_cover_six_to_eighteen_per_cent(root):
    shares = [(label > 0).mean() for label in stored_labels(root, "ToyOne")]
    assert min(shares) > 0.055
    assert max(shares) < 0.18
    assert 0.105 < np.mean(shares) < 0.125


def test_boxes_are_the_bounds_of_the_masks(root):
    boxes = [m["box"] for m in metas(root / "test-decorrelated")]
    classes = [m["class_index"] for m in metas(root / "test-decorrelated")]
    labels = stored_labels(root, "ToyOne")
    for box, index, label in zip(boxes, classes, labels, strict=True):
        assert set(np.unique(label)) == {0, index + 1}
        y, x = np.nonzero(label)
        assert box == [x.min(), y.min(), x.max(), y.max()]


@pytest.mark.parametrize("shape", range(8))
def test_masks_are_exactly_the_pixels_the_object_paints(shape):
    n = 6
    rng = np.random.default_rng(shape)
    objects, _ = sets._draw_objects(n, np.zeros(n, np.int64), rng)
    objects = scene.Objects(**{**vars(objects), "shape": np.full(n, shape)})
    masks = scene.object_masks(objects)
    grounds = sets._draw_grounds(np.arange(n), rng)
    blue = scene.Objects(**{**vars(objects), "colour": np.full(n, 2)})
    red, other = (
        scene.compose(grounds, [item], [masks], np.random.default_rng(1))
        for item in (objects, blue)
    )
    assert np.array_equal((red != other).any(axis=-1), masks)
    area = scene.scale_for(np.full(n, shape), np.full(n, 0.1, np.float32))
    at_ten = scene.Objects(
        **{**vars(objects), "scale": area, "x": np.full(n, 32.0), "y": np.full(n, 32.0)}
    )
    assert scene.object_masks(at_ten).mean(axis=(1, 2)) == pytest.approx(0.1, abs=0.006)


def test_a_circle_is_the_pixels_whose_centres_are_within_its_radius():
    one = dict.fromkeys(("colour", "fill", "shape"), np.zeros(1, np.int64))
    real = {"scale": 9.3, "angle": 0.2, "x": 30.2, "y": 25.7, "turn": 0.0, "period": 8.0}
    objects = scene.Objects(
        **one, **{k: np.array([v], np.float32) for k, v in real.items()}, phase=np.zeros((1, 2))
    )
    expected = [
        [(x + 0.5 - 30.2) ** 2 + (y + 0.5 - 25.7) ** 2 <= 9.3**2 for x in range(64)]
        for y in range(64)
    ]
    assert np.array_equal(scene.object_masks(objects)[0], expected)


def test_objects_lie_inside_the_picture():
    objects, bounds = sets._draw_objects(400, np.zeros(400, np.int64), np.random.default_rng(2))
    boxes = scene.mask_boxes(scene.object_masks(objects))
    assert bounds.min() >= -1e-3
    assert bounds.max() <= 64 + 1e-3
    # Pixels reach to the bounds, within the pixel whose centre is asked.
    assert np.abs(boxes[:, :2] - bounds[:, :2]).max() < 1.5
    assert np.abs(boxes[:, 2:] + 1 - bounds[:, 2:]).max() < 1.5


def test_two_objects_are_of_different_classes_apart_and_on_neithers_texture():
    drawn = draw_two(60, np.random.default_rng(5))
    assert not (drawn.masks[:, 0] & drawn.masks[:, 1]).any()
    assert (drawn.classes[:, 0] != drawn.classes[:, 1]).all()
    own = np.array(OWN_TEXTURE)[drawn.classes]
    assert not (own == drawn.textures[:, None]).any()
    labels = drawn.label_maps()
    for label, classes in zip(labels, drawn.classes, strict=True):
        assert set(np.unique(label)) == {0, *(classes + 1)}
    shares = drawn.masks.mean(axis=(2, 3))
    assert shares.min() > 0.055
    assert shares.max() < 0.18


def test_own_textures_are_a_permutation_away_from_the_objects_hue():
    assert sorted(OWN_TEXTURE) == list(range(12))
    for name, texture in zip(CLASSES, OWN_TEXTURE, strict=True):
        apart = abs(scene.HUES[name.split()[1]] - texture / 12) % 1
        assert min(apart, 1 - apart) >= 0.25 - 1e-9, name


def test_a_texture_has_its_hue():
    rgb = scene.hue_rgb(np.array([0, 1 / 6, 1 / 3, 2 / 3]), 1.0)
    assert rgb == pytest.approx(np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]]), abs=1e-6)


def test_there_are_768_captions_and_none_is_cut_by_a_context_of_16():
    captions = {
        sets.caption_of(c, s, t)
        for c, s, t in itertools.product(range(12), range(8), range(len(sets.CAPTIONS)))
    }
    assert len(captions) == 768
    tokens = open_clip.SimpleTokenizer(context_length=20)(sorted(captions))
    assert int((tokens != 0).sum(dim=1).max()) <= 16
    assert not any(word in " ".join(captions) for word in (*scene.PATTERNS, "background"))


def test_prompts_look_like_captions():
    assert len(sets.PROMPTS) == 8
    prompts = {prompt.format("striped red") for prompt in sets.PROMPTS}
    assert len(prompts) == 8
    assert "a photo of a striped red circle" in prompts
    captions = {
        sets.caption_of(1, s, t) for s, t in itertools.product(range(8), range(len(sets.CAPTIONS)))
    }
    assert prompts <= captions


@pytest.mark.parametrize(
    ("file", "count", "objects"), [("protocol.yaml", 40, 2), ("protocol-one.yaml", 120, 1)]
)
def test_the_evaluation_reads_the_protocols_and_labels(root, file, count, objects):
    task = read_task(str(root / file))
    bench = task.benchmark
    assert task.classes.names == CLASSES
    assert len(task.templates) == 8
    assert bench.images == {"val": count}
    reader = READERS[bench.layout](root / "seg", bench.folder, bench.split)
    assert len(reader.ids) == count
    for name in reader.ids[:5]:
        image, stored = reader.read(name)
        assert image.shape == (64, 64, 3)
        ids = to_ids(stored, task.protocol.labels, 12, reader.label_file(name))
        assert len(np.unique(ids)) == objects + 1  # and 255
        with Image.open(reader.label_file(name)) as opened:
            assert opened.mode == "P"


def test_the_one_object_pictures_are_those_of_the_decorrelated_shards(root):
    for index, sample in enumerate(samples(root / "test-decorrelated")[:5]):
        file = root / "seg" / "VOCdevkit" / "ToyOne" / "JPEGImages" / f"{index:06d}.jpg"
        assert file.read_bytes() == sample.parts["jpg"]


def digest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    text = b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)
    return hashlib.sha256(text).hexdigest()


def test_a_seed_makes_the_same_bytes_again_and_another_seed_others(tmp_path):
    small = Sizes(train=12, decorrelated=6, correlated=6, two=4)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_world(tmp_path / name, seed, small)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a" / "train") != digest(tmp_path / "c" / "train")


def test_pictures_of_a_set_are_distinct():
    drawn = draw_single(200, 0.7, np.random.default_rng(0))
    assert len({p.tobytes() for p in drawn.pictures}) == 200
    assert set(np.unique(drawn.classes)) == set(range(12))
