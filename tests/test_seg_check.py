"""The data set doctor: a sound copy gives no line, every fault gives one that names its file."""

import dataclasses
import tarfile

import numpy as np
import pytest
from PIL import Image

from eval.segmentation.check import TRAPS, check_dataset, describe_missing
from eval.segmentation.pairs import open_reader
from eval.segmentation.protocol import read_task
from lazyclip.base.config import read_yaml
from lazyclip.base.resources import config_names, config_root
from tests import toy_seg
from tests.toy_voc import FOLDER, make_protocol, make_voc, palette_png

DATASETS = tuple(toy_seg.MAKERS)


def task_of(dataset, images=3):
    """Return the task with another expected number of images, so that a toy can be complete."""
    task = read_task(dataset)
    bench = dataclasses.replace(task.benchmark, images={"val": images})
    return dataclasses.replace(task, benchmark=bench)


def faults(dataset, root, images=3):
    """Check a toy; that a toy of three does not hold all classes is no fault here."""
    return [line for line in check_dataset(task_of(dataset, images), root) if " occur in no " not in
            line]  # fmt: skip


def only(lines):
    assert len(lines) == 1, lines
    assert "\n" not in lines[0]
    return lines[0]


def reader_of(dataset, root):
    return open_reader(read_task(dataset), root)[1]


# --- sound and missing ----------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_sound_copy_gives_no_line(dataset, tmp_path):
    toy_seg.make_benchmark(tmp_path, dataset)
    assert faults(dataset, tmp_path) == []


def test_the_second_forms_are_sound_as_well(tmp_path):
    pytest.importorskip("scipy.io")
    toy_seg.make_cityscapes(tmp_path / "a", forms=["labelTrainIds"])
    toy_seg.make_context(tmp_path / "b", forms=["mat"])
    toy_seg.make_panoptic(tmp_path / "c")
    assert faults("cityscapes", tmp_path / "a") == []
    assert faults("context59", tmp_path / "b") == []
    assert faults("coco_object", tmp_path / "c") == []


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_missing_set_says_what_to_download_and_where_to_put_it(dataset, tmp_path):
    task = read_task(dataset)
    first, *rest = check_dataset(task, tmp_path)
    assert first.startswith("no ")
    assert rest == describe_missing(task)
    text = " ".join(rest)
    assert task.benchmark.folder in text
    assert any(end in text for end in (".zip", ".tar"))
    assert "page " in text
    assert "unpack" in text


def test_a_benchmark_without_notes_says_where_it_belongs(tmp_path):
    task = read_task(str(make_protocol(tmp_path)))
    assert describe_missing(task) == ["toy belongs in DATA_ROOT/VOCdevkit/VOC2012, layout voc"]


@pytest.mark.parametrize("name", config_names("protocols", ".yaml"))
def test_the_traps_and_notes_of_our_benchmarks_are_known(name):
    values = read_yaml(config_root() / "protocols" / f"{name}.yaml")
    assert values["traps"]
    assert set(values["traps"]) <= set(TRAPS)
    assert all(" ".join(line.split()) == line for line in values["download"])


def test_a_split_or_list_that_cannot_be_right_is_a_line(tmp_path):
    folder = make_voc(tmp_path)
    assert "unknown split 'vall'" in only(check_dataset(read_task("voc20", split="vall"), tmp_path))
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("a1\na1\n")
    assert "1 ids stand twice" in only(check_dataset(read_task("voc20"), tmp_path))
    (folder / "ImageSets" / "Segmentation" / "val.txt").unlink()
    assert "val.txt does not exist" in check_dataset(read_task("voc20"), tmp_path)[0]


# --- counts, pairs, files -------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", DATASETS)
def test_another_number_of_images_is_a_line(dataset, tmp_path):
    toy_seg.make_benchmark(tmp_path, dataset)
    expected = f"{dataset} val has 3 pictures here, the benchmark 5:"
    assert only(faults(dataset, tmp_path, 5)).startswith(expected)


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_picture_without_label_and_a_label_without_picture_are_named(dataset, tmp_path):
    toy_seg.make_benchmark(tmp_path, dataset)
    if dataset == "cityscapes":
        for file in tmp_path.rglob("*_labelTrainIds.png"):
            file.unlink()
    reader = reader_of(dataset, tmp_path)
    reader.label_file(reader.ids[0]).unlink()
    reader.image_file(reader.ids[2]).unlink()
    found = faults(dataset, tmp_path)
    listed = not reader.label_ids  # a list says which images there should be
    pictures = [line for line in found if "no picture" in line]
    labels = [line for line in found if "no label file" in line]
    assert str(reader.image_file(reader.ids[2])) in only(pictures)
    assert str(reader.label_file(reader.ids[0])) in only(labels)
    assert [line for line in found if "pictures here" in line] == (
        [] if listed else [found[0]]
    )  # the count of a folder falls with the picture
    extra = dataset.startswith("coco")  # the decoys beside the lost map
    assert len(found) == (2 if listed else 3) + extra


@pytest.mark.parametrize("dataset", DATASETS)
def test_two_sizes_are_named(dataset, tmp_path):
    toy_seg.make_benchmark(tmp_path, dataset)
    reader = reader_of(dataset, tmp_path)
    toy_seg.picture(reader.image_file(reader.ids[0]), 0, (51, 70))
    line = only(faults(dataset, tmp_path))
    assert line.startswith(f"{reader.image_file(reader.ids[0])}: picture is 70x51, its label 70x50")


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_label_value_outside_the_table_is_named(dataset, tmp_path):
    toy_seg.make_benchmark(tmp_path, dataset)
    reader = reader_of(dataset, tmp_path)
    file = reader.label_file(reader.ids[0])
    ids = reader.read_label(reader.ids[0])
    ids[0, 0] = 251
    toy_seg.grey_png(file, ids)
    line = only(faults(dataset, tmp_path))
    assert line.startswith(f"{file}: 1 pixels hold label ids 251; expected 0..")


@pytest.mark.parametrize("which", ["image_file", "label_file"])
@pytest.mark.parametrize("dataset", ["voc20", "cityscapes"])
def test_empty_and_cut_files_are_named(dataset, which, tmp_path):
    toy_seg.make_benchmark(tmp_path, dataset)
    reader = reader_of(dataset, tmp_path)
    first, second = (getattr(reader, which)(name) for name in reader.ids[:2])
    first.write_bytes(b"")
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    found = faults(dataset, tmp_path)
    assert len(found) == 2
    assert found[0].startswith(f"{first}: not readable as a picture (the file is empty); get it")
    assert found[1].startswith(f"{second}: not readable as a picture (")


@pytest.mark.parametrize(("orientation", "more"), [(3, 0), (6, 1)])
def test_a_picture_that_exif_turns_is_named_even_where_its_size_fits(tmp_path, orientation, more):
    folder = make_voc(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (70, 50)).save(folder / "JPEGImages" / "a1.jpg", exif=exif)
    found = faults("voc20", tmp_path)
    assert len(found) == 1 + more
    assert f"a1.jpg: EXIF orientation {orientation} turns it on reading" in found[0]
    assert not more or "picture is 50x70, its label 70x50" in found[1]


def test_many_faults_of_one_kind_are_counted(tmp_path):
    names = [f"b{i:02d}" for i in range(9)]
    folder = make_voc(tmp_path, ids=names)
    for name in names[1:]:
        (folder / "SegmentationClass" / f"{name}.png").unlink()
    found = faults("voc20", tmp_path, 9)
    assert len(found) == 6
    assert [name for name in names[1:6] if f"{name}.png" in " ".join(found[:5])] == names[1:6]
    assert found[5] == "and 3 more faults like the last (8 such)"


# --- known traps ----------------------------------------------------------------------------------


def test_colour_coded_masks_are_named(tmp_path):
    folder = make_voc(tmp_path)
    file = folder / "SegmentationClass" / "a2.png"
    Image.open(file).convert("RGB").save(file)
    assert "a2.png has mode RGB; expected an 8-bit palette" in only(faults("voc21", tmp_path))


def test_masks_without_the_void_border_are_named(tmp_path):
    make_voc(tmp_path, ids=["a1"])
    folder = tmp_path / FOLDER
    for name, ids in (("b1", [0, 1]), ("b2", [0, 20]), ("b3", [0])):
        toy_seg.picture(folder / "JPEGImages" / f"{name}.jpg", 1, (50, 70))
        label = toy_seg.blocks(1, (50, 70), ids)
        palette_png(folder / "SegmentationClass" / f"{name}.png", label)
    lists = folder / "ImageSets" / "Segmentation" / "val.txt"
    lists.write_text("a1\nb1\nb2\nb3\n")  # b3 has no object: it needs no border
    line = only(faults("voc20", tmp_path, 4))
    assert line.startswith("2 of 4 labels (first b1) have objects without the border of 255")
    task = read_task(str(make_protocol(tmp_path / "toy", classes=[f"c{i}" for i in range(20)])))
    assert not any("border" in line for line in check_dataset(task, tmp_path))


@pytest.mark.parametrize("dataset", ["context59", "context60", "ade20k"])
def test_labels_shifted_already_are_named(dataset, tmp_path):
    toy_seg.make_benchmark(tmp_path, dataset)
    reader = reader_of(dataset, tmp_path)
    for name in reader.ids:
        stored = reader.read_label(name)
        toy_seg.grey_png(reader.label_file(name), np.where(stored == 0, 255, stored - 1))
    line = only(faults(dataset, tmp_path))
    assert line.startswith(f"3 of 3 labels (first {reader.ids[0]}) hold 255")
    assert "shifted twice" in line


def test_train_ids_under_the_name_of_label_ids_are_named(tmp_path):
    folder = toy_seg.make_cityscapes(tmp_path)
    for file in folder.rglob("*_labelIds.png"):
        file.with_name(file.name.replace("labelIds", "labelTrainIds")).rename(file)
    found = faults("cityscapes", tmp_path)
    assert len(found) == 4
    assert all("pixels hold label ids 255; expected 0..33" in line for line in found[:3])
    assert "no labelIds file holds an id above 18" in found[3]


def test_the_full_release_of_ade20k_is_recognised(tmp_path):
    masks = tmp_path / "ADE20K_2021_17_01" / "images" / "ADE" / "validation"
    masks.mkdir(parents=True)
    found = check_dataset(read_task("ade20k"), tmp_path)
    assert "ADE20K_2021_17_01 belongs to the full ADE20K release" in found[1]
    toy_seg.make_ade20k(tmp_path)
    file = tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"
    Image.new("RGB", (70, 50)).save(file)
    assert any(f"{file} has mode RGB" in line for line in faults("ade20k", tmp_path))


def test_converted_coco_copies_are_recognised(tmp_path):
    folder = toy_seg.make_coco(tmp_path) / "annotations" / "val2017"
    (folder / "000000000285.png").unlink()
    found = faults("coco_stuff", tmp_path)
    assert len(found) == 2
    assert "1 of 3 raw maps are missing where a converted copy stands (first " in found[1]
    for name in ("000000000139", "000000000632"):
        (folder / f"{name}.png").unlink()
    found = check_dataset(read_task("coco_stuff"), tmp_path)
    assert "holds no file named 000000000139.png (the raw map)" in found[0]
    assert "is a converted copy, which is not read" in found[1]


def test_converted_coco_copies_under_the_raw_names_are_recognised(tmp_path):
    folder = toy_seg.make_coco(tmp_path, decoys=False) / "annotations" / "val2017"
    for index, file in enumerate(sorted(folder.iterdir())):
        toy_seg.grey_png(file, toy_seg.blocks(index, toy_seg.SIZES[index], (0, 1, 40, 80)))
    for dataset in ("coco_stuff", "coco_object"):
        line = only(faults(dataset, tmp_path))
        assert line.startswith("no map holds a stuff id (91..181) or 255: these are instanceTrain")


def test_mixed_coco_splits_are_recognised(tmp_path):
    folder = toy_seg.make_coco(tmp_path)
    assert faults("coco_stuff", tmp_path) == []
    toy_seg.picture(folder / "images" / "train2017" / "000000000285.jpg", 1, (64, 40))
    line = only(faults("coco_stuff", tmp_path))
    assert line.startswith("1 pictures lie in val2017 and in train2017 (first 000000000285)")


def test_labels_that_lack_many_classes_are_recognised(tmp_path):
    toy_seg.make_context(tmp_path)
    lines = check_dataset(task_of("context60"), tmp_path)
    assert "55 of 60 classes occur in no label of context60 val, such as " in only(lines)
    # A part of the split is no proof.
    assert not any(
        "occur in no" in line for line in check_dataset(read_task("context60"), tmp_path)
    )


# --- real data ------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("tar", "dataset", "split", "words"),
    [
        ("voc2012_sample", "voc21", "official_val", []),
        ("voc2012_sample", "voc20", "val", ["29 pictures", "13 of 29 labels"]),
        ("pascal_context_sample", "context60", "val", ["2 pictures"]),
        ("cityscapes_sample", "cityscapes", "train", ["3 pictures"]),
        ("cityscapes_sample", "cityscapes", "val", ["leftImg8bit/val does", "to get", "to get"]),
        ("ade20k_sample", "ade20k", "val", ["5 pictures"]),
        ("ade20k_sample", "ade20k", "train", ["3 pictures"]),
        ("coco_stuff164k_sample", "coco_stuff", "val", ["4 pictures"]),
        ("coco_stuff164k_sample", "coco_object", "train", ["7 pictures"]),
        ("coco2017_panoptic_sample", "coco_object", "val", ["50 pictures"]),
    ],
)
def test_real_samples_show_only_the_faults_they_are_known_for(
    shared_data, tmp_path, tar, dataset, split, words
):
    file = shared_data / "segmentation" / f"{tar}.tar"
    if not file.is_file():
        pytest.skip(f"{file.name} is not among the real data")
    with tarfile.open(file) as opened:
        opened.extractall(tmp_path, filter="data")
    found = check_dataset(read_task(dataset, split=split), tmp_path)
    assert len(found) == len(words)
    for line, word in zip(found, words, strict=True):
        assert word in line


@pytest.mark.data
def test_the_real_voc_masks_are_sound_but_for_their_pictures(shared_data, tmp_path):
    file = shared_data / "segmentation" / "voc2012_val_masks.tar.gz"
    if not file.is_file():
        pytest.skip(f"{file.name} is not among the real data")
    with tarfile.open(file) as opened:
        opened.extractall(tmp_path, filter="data")
    folder = tmp_path / FOLDER
    names = sorted(path.stem for path in (folder / "SegmentationClass").glob("*.png"))
    (folder / "JPEGImages").mkdir(exist_ok=True)
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "val.txt").write_text("\n".join(names) + "\n")
    found = faults("voc21", tmp_path, len(names))
    assert len(names) == 725
    assert len(found) == 6
    assert all("no picture" in line for line in found[:5])
    assert found[5] == "and 720 more faults like the last (725 such)"
