"""Every benchmark's layout as it lies on disk: both label forms, exact names, and the real data."""

import dataclasses
import json
import pickle
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from eval.segmentation.confusion import count, score
from eval.segmentation.pairs import open_reader, pairs_of, read_pair
from eval.segmentation.protocol import read_task
from eval.segmentation.readers import READERS, NotHereError, check_files
from lazyclip.base.errors import UserError
from tests import toy_seg

DATASETS = tuple(toy_seg.MAKERS)
COCO_FOLDERS = [
    ("coco_stuff164k", "images", "annotations"),
    ("coco_stuff164k", ".", "annotations"),
    ("coco_stuff164k", "images", "stuffthingmaps"),
    ("coco", "images", "stuffthingmaps"),
    ("coco", ".", "annotations"),
]


def labels_of(task, root):
    """Read all scored labels; returns the task and name -> label."""
    task, reader = open_reader(task, root)
    check_files(reader, reader.ids)
    return task, {name: read_pair(task, reader, name)[1] for name in reader.ids}


def stored_of(index, values):
    return toy_seg.blocks(index, toy_seg.SIZES[index], toy_seg.STORED[values])


# --- every benchmark ------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_copy_in_its_own_form_is_read_whole(dataset, tmp_path):
    toy_seg.make_benchmark(tmp_path, dataset)
    task = read_task(dataset)
    opened, reader = open_reader(task, tmp_path)
    assert opened == task
    assert len(reader.ids) == 3
    total = np.zeros((task.protocol.classes,) * 2, dtype=np.int64)
    for name in reader.ids:
        image, label = read_pair(task, reader, name)
        assert image.shape == (*label.shape, 3)
        assert image.dtype == np.uint8
        assert set(np.unique(label)) <= {*range(task.protocol.classes), 255}
        assert np.array_equal(reader.read(name)[1], reader.read_label(name))
        total += count(label, np.where(label == 255, 0, label), task.protocol.classes)
    assert score(total).miou == 1.0


@pytest.mark.parametrize("dataset", DATASETS)
def test_readers_can_be_sent_to_worker_processes(dataset, tmp_path):
    toy_seg.make_benchmark(tmp_path, dataset)
    task, reader = open_reader(read_task(dataset), tmp_path)
    pairs = pairs_of(task, reader)
    sent = pickle.loads(pickle.dumps(pairs))
    for here, there in zip(pairs.read(reader.ids[1]), sent.read(reader.ids[1]), strict=True):
        assert np.array_equal(here, there)


@pytest.mark.parametrize("dataset", DATASETS)
def test_an_empty_data_root_says_what_should_be_there(dataset, tmp_path):
    task = read_task(dataset)
    with pytest.raises(NotHereError, match=r"^no .* in data root .* --data-root") as caught:
        open_reader(task, tmp_path)
    assert task.benchmark.folder in str(caught.value)
    for other in task.benchmark.folders:
        assert other in str(caught.value)
    with pytest.raises(NotHereError, match="nowhere is no folder"):
        open_reader(task, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("make", "dataset"),
    [
        (toy_seg.make_context, "context59"),
        (toy_seg.make_cityscapes, "cityscapes"),
        (toy_seg.make_ade20k, "ade20k"),
        (toy_seg.make_coco, "coco_stuff"),
        (toy_seg.make_panoptic, "coco_object"),
    ],
)
def test_the_train_split_is_read_and_changes_the_hash(make, dataset, tmp_path):
    make(tmp_path, split="train")
    task = read_task(dataset, split="train")
    opened, labels = labels_of(task, tmp_path)
    assert len(labels) == 3
    assert opened.protocol.split == "train"
    assert task.protocol.hash != read_task(dataset).protocol.hash
    with pytest.raises(UserError, match="unknown split 'trian'; known: train"):
        open_reader(read_task(dataset, split="trian"), tmp_path)


# --- two forms of one truth -----------------------------------------------------------------------


def test_cityscapes_label_ids_and_train_ids_give_the_same_labels(tmp_path):
    task = read_task("cityscapes")
    found = []
    for forms in (["labelIds"], ["labelTrainIds"], ["labelIds", "labelTrainIds"]):
        root = tmp_path / "-".join(forms)
        toy_seg.make_cityscapes(root, forms=forms)
        opened, labels = labels_of(task, root)
        assert opened.protocol.hash == task.protocol.hash
        found.append(labels)
    to_train = toy_seg.table("cityscapes_id_to_train", "label_id", "train_id")
    expected = np.vectorize(to_train.get)(stored_of(0, "cityscapes"))
    for labels in found:
        assert np.array_equal(labels["frankfurt/frankfurt_000000_000294"], expected)
        for name, label in labels.items():
            assert np.array_equal(label, found[0][name])


def test_a_train_id_outside_its_range_is_named(tmp_path):
    folder = toy_seg.make_cityscapes(tmp_path, forms=["labelTrainIds"])
    file = folder / "gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelTrainIds.png"
    toy_seg.grey_png(file, np.full((50, 70), 19))
    task, reader = open_reader(read_task("cityscapes"), tmp_path)
    with pytest.raises(UserError, match=r"labelTrainIds\.png: 3500 pixels hold train ids 19;"):
        read_pair(task, reader, reader.ids[0])


def test_context_png_and_mat_give_the_same_labels(tmp_path):
    pytest.importorskip("scipy.io")
    for dataset, shift in (("context60", 0), ("context59", 1)):
        task = read_task(dataset)
        found = []
        for form in ("png", "mat"):
            toy_seg.make_context(tmp_path / dataset / form, forms=[form])
            opened, labels = labels_of(task, tmp_path / dataset / form)
            assert opened.protocol.hash == task.protocol.hash
            found.append(labels)
        for index, name in enumerate(found[0]):
            stored = stored_of(index, "context")
            expected = np.where(stored == 0, 255, stored - 1) if shift else stored
            assert np.array_equal(found[0][name], expected)
            assert np.array_equal(found[1][name], expected)


def test_mat_labels_may_lie_where_the_pngs_would(tmp_path):
    pytest.importorskip("scipy.io")
    folder = toy_seg.make_context(tmp_path, forms=["mat"])
    (folder / "trainval").rename(folder / "SegmentationClassContext")
    _, labels = labels_of(read_task("context60"), tmp_path)
    assert np.array_equal(labels["2008_000001"], stored_of(1, "context"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no mat", "not readable as a .mat file with the array LabelMap"),
        ({"Other": np.zeros((50, 70))}, "not readable as a .mat file with the array LabelMap"),
        ({"LabelMap": np.full((50, 70), 460)}, "3500 pixels hold label ids 460; expected 0..459"),
        ({"LabelMap": np.zeros((2, 50, 70))}, r"LabelMap has shape \(2, 50, 70\)"),
    ],
)
def test_a_mat_that_cannot_be_right_is_named(tmp_path, content, words):
    io = pytest.importorskip("scipy.io")
    folder = toy_seg.make_context(tmp_path, forms=["mat"])
    file = folder / "trainval" / "2008_000000.mat"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        io.savemat(file, content)
    task, reader = open_reader(read_task("context60"), tmp_path)
    with pytest.raises(UserError, match=rf"2008_000000\.mat: {words}"):
        read_pair(task, reader, reader.ids[0])


def test_without_scipy_the_mat_labels_say_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("scipy.io")
    toy_seg.make_context(tmp_path, forms=["mat"])
    task, reader = open_reader(read_task("context60"), tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io.matlab", None)
    with pytest.raises(UserError, match=r"2008_000000\.mat: .* needs scipy; pip install scipy"):
        read_pair(task, reader, reader.ids[0])


# --- COCO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "images", "labels"), COCO_FOLDERS)
@pytest.mark.parametrize("dataset", ["coco_stuff", "coco_object"])
def test_coco_is_found_in_both_folder_forms(tmp_path, dataset, folder, images, labels):
    toy_seg.make_coco(tmp_path, folder=folder, images=images, labels=labels)
    name, wanted = {
        "coco_stuff": ("coco_stuff_raw_to_train", "train_id"),
        "coco_object": ("coco_stuff_raw_to_object", "object_id"),
    }[dataset]
    expected = np.vectorize(toy_seg.table(name, "raw_id", wanted).get)(stored_of(2, "coco"))
    for root in (tmp_path, tmp_path / folder):
        _, found = labels_of(read_task(dataset), root)
        assert list(found) == ["000000000139", "000000000285", "000000000632"]
        assert np.array_equal(found["000000000632"], expected)


def test_converted_copies_beside_the_raw_maps_change_nothing(tmp_path):
    toy_seg.make_coco(tmp_path / "with", decoys=True)
    toy_seg.make_coco(tmp_path / "without", decoys=False)
    for dataset in ("coco_stuff", "coco_object"):
        one = labels_of(read_task(dataset), tmp_path / "with")
        other = labels_of(read_task(dataset), tmp_path / "without")
        assert one[0] == other[0]
        assert list(one[1]) == list(other[1])
        for name, label in one[1].items():
            assert np.array_equal(label, other[1][name])


def test_a_folder_of_converted_copies_alone_is_not_taken(tmp_path):
    folder = toy_seg.make_coco(tmp_path)
    for file in (folder / "annotations" / "val2017").glob("????????????.png"):
        file.unlink()
    with pytest.raises(
        NotHereError, match=r"holds no file named 000000000139\.png \(the raw map\)"
    ):
        open_reader(read_task("coco_stuff"), tmp_path)


def test_panoptic_maps_are_another_truth_and_show_in_the_hash(tmp_path):
    toy_seg.make_panoptic(tmp_path)
    task = read_task("coco_object")
    opened, labels = labels_of(task, tmp_path)
    assert opened.protocol.labels == "coco_object_panoptic"
    assert opened.protocol.hash != task.protocol.hash
    assert dataclasses.replace(opened, protocol=task.protocol) == task
    things = {0: 0, 1: 1, 11: 11, 13: 12, 90: 80, 92: 0, 200: 0}
    expected = np.vectorize(things.get)(stored_of(1, "panoptic"))
    assert np.array_equal(labels["000000000285"], expected)
    with pytest.raises(
        NotHereError, match=r"^no coco/stuffthingmaps/val2017 or .*; also looked for as coco_stu"
    ):
        open_reader(read_task("coco_stuff"), tmp_path)  # 133 classes do not give 171
    toy_seg.make_coco(tmp_path)
    assert open_reader(task, tmp_path)[0] == task  # the benchmark's own truth goes first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda j: j["annotations"][0]["segments_info"].clear(), r"139\.png: segments 40016, "),
        (lambda j: j["annotations"][0].pop("file_name"), r"json: no COCO panoptic json \(KeyErr"),
        (lambda j: j.pop("annotations"), r"json: no COCO panoptic json \(KeyErr"),
        (lambda j: j["annotations"].clear(), r"json holds no file named"),
        (
            lambda j: j["annotations"][0]["segments_info"][0].update(category_id=12),
            r"139\.png: \d+ pixels hold label ids 12; expected 0\.\.11 and 13",
        ),
    ],
)
def test_a_panoptic_json_that_does_not_fit_is_refused(tmp_path, change, words):
    file = toy_seg.make_panoptic(tmp_path) / "annotations" / "panoptic_val2017.json"
    listed = json.loads(file.read_text())
    change(listed)
    file.write_text(json.dumps(listed))
    with pytest.raises(UserError, match=words):
        labels_of(read_task("coco_object"), tmp_path)


def test_a_grey_panoptic_map_is_refused(tmp_path):
    folder = toy_seg.make_panoptic(tmp_path)
    file = folder / "annotations" / "panoptic_val2017" / "000000000139.png"
    Image.new("L", (70, 50)).save(file)
    with pytest.raises(UserError, match=r"139\.png has mode L; expected the colours RGB"):
        labels_of(read_task("coco_object"), tmp_path)


# --- files that do not belong ---------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["ade20k", "cityscapes", "coco_stuff"])
def test_other_files_in_the_folders_are_no_images(dataset, tmp_path):
    toy_seg.make_benchmark(tmp_path, dataset)
    task, reader = open_reader(read_task(dataset), tmp_path)
    first = reader.image_file(reader.ids[0])
    for name in (f"._{first.name}", "Thumbs.db", f"{first.name}.txt", "readme.md"):
        first.with_name(name).write_bytes(b"x")
    assert open_reader(task, tmp_path)[1] == reader


@pytest.mark.parametrize("dataset", DATASETS)
def test_an_image_without_label_is_named_before_any_work(dataset, tmp_path):
    toy_seg.make_benchmark(tmp_path, dataset)
    _, reader = open_reader(read_task(dataset), tmp_path)
    lost = reader.label_file(reader.ids[2])
    lost.unlink()
    lost.with_name(lost.name.replace("labelIds", "labelTrainIds")).unlink(missing_ok=True)
    _, reader = open_reader(read_task(dataset), tmp_path)
    with pytest.raises(UserError, match=f"1 of 3 ids .* no label file; .*{lost.name}"):
        check_files(reader, reader.ids)


# --- real data ------------------------------------------------------------------------------------

REAL = [  # tar, data set, split, pairs
    ("voc2012_sample", "voc20", "val", 29),
    ("voc2012_sample", "voc21", "val", 29),
    ("voc2012_sample", "voc21", "official_val", 14),
    ("pascal_context_sample", "context59", "val", 2),
    ("pascal_context_sample", "context60", "val", 2),
    ("cityscapes_sample", "cityscapes", "train", 3),
    ("ade20k_sample", "ade20k", "val", 5),
    ("ade20k_sample", "ade20k", "train", 3),
    ("coco_stuff164k_sample", "coco_stuff", "val", 4),
    ("coco_stuff164k_sample", "coco_stuff", "train", 7),
    ("coco_stuff164k_sample", "coco_object", "val", 4),
    ("coco_stuff164k_sample", "coco_object", "train", 7),
    ("coco2017_panoptic_sample", "coco_object", "val", 50),
]


def unpack(shared_data, name, folder):
    tar = shared_data / "segmentation" / name
    if not tar.is_file():
        pytest.skip(f"{tar.name} is not among the real data")
    with tarfile.open(tar) as opened:
        opened.extractall(folder, filter="data")


@pytest.mark.data
@pytest.mark.parametrize(("tar", "dataset", "split", "pairs"), REAL)
def test_real_samples_are_read_whole(shared_data, tmp_path, tar, dataset, split, pairs):
    unpack(shared_data, f"{tar}.tar", tmp_path)
    task, reader = open_reader(read_task(dataset, split=split), tmp_path)
    check_files(reader, reader.ids)
    assert len(reader.ids) == pairs
    seen = set()
    for name in reader.ids:
        image, label = read_pair(task, reader, name)
        assert image.shape[:2] == label.shape
        seen |= set(np.unique(label))
    assert seen <= {*range(task.protocol.classes), 255}
    assert len(seen - {255}) >= 3


@pytest.mark.data
def test_both_truths_of_coco_object_agree_on_the_real_pictures_they_share(shared_data, tmp_path):
    unpack(shared_data, "coco_stuff164k_sample.tar", tmp_path / "maps")
    unpack(shared_data, "coco2017_panoptic_sample.tar", tmp_path / "panoptic")
    task = read_task("coco_object")
    maps, panoptic = (open_reader(task, tmp_path / name) for name in ("maps", "panoptic"))
    assert maps[0].protocol.hash != panoptic[0].protocol.hash
    for name in maps[1].ids:
        one, other = (read_pair(*opened, name)[1] for opened in (maps, panoptic))
        assert np.mean(one == other) > 0.999


@pytest.mark.data
def test_real_label_maps_of_cityscapes_without_pictures_hold_known_ids(shared_data, tmp_path):
    unpack(shared_data, "cityscapes_sample.tar", tmp_path)
    reader = READERS["cityscapes"](tmp_path, "cityscapes", "train")
    files = sorted((tmp_path / "cityscapes/gtFine/val").glob("*/*_labelIds.png"))
    assert len(files) == 8
    for file in files:
        found = np.unique(reader.decode(file))
        assert found.min() >= 0
        assert 18 < found.max() <= 33
