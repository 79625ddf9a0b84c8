"""Label rules, files, and the VOC layout: what is read, and what is refused by name."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from eval.segmentation.confusion import count, score
from eval.segmentation.readers import LABEL_RULES, READERS, check_files, to_ids
from eval.segmentation.readers.files import (
    find_root,
    picture_size,
    read_ids,
    read_image,
    read_labels,
)
from lazyclip.base.errors import UserError
from lazyclip.zeroshot import read_classes
from tests.toy_seg import table
from tests.toy_voc import FOLDER, make_voc, palette_png


def open_voc(root, split="val"):
    return READERS["voc"](root, str(FOLDER), split)


# --- label rules ----------------------------------------------------------------------------------


def test_zero_ignored_golden_case(tmp_path):
    stored = np.array([[0, 1], [150, 255]])
    assert to_ids(stored, "zero_ignored", 150, tmp_path).tolist() == [[255, 0], [149, 255]]


def test_as_is_keeps_the_ids(tmp_path):
    stored = np.array([[0, 20, 255]])
    assert to_ids(stored, "as_is", 21, tmp_path).tolist() == stored.tolist()


GOLDEN = {  # rule -> classes, stored, expected
    "coco_stuff": (171, (0, 10, 12, 89, 91, 181, 255), (0, 10, 11, 79, 80, 170, 255)),
    "coco_object": (81, (0, 10, 12, 89, 91, 181, 255), (1, 11, 12, 80, 0, 0, 0)),
    "cityscapes_ids": (19, (0, 7, 9, 24, 31, 33), (255, 0, 255, 11, 16, 18)),
    "coco_object_panoptic": (81, (0, 1, 11, 13, 90, 92, 200), (0, 1, 11, 12, 80, 0, 0)),
}


@pytest.mark.parametrize("rule", GOLDEN)
def test_tables_give_the_golden_ids(rule, tmp_path):
    classes, stored, expected = GOLDEN[rule]
    assert to_ids(np.array([stored]), rule, classes, tmp_path).tolist() == [list(expected)]


TABLES = {  # rule -> table, columns, classes, rows that name an id which occurs
    "coco_stuff": ("coco_stuff_raw_to_train", "raw_id", "train_id", 171, 172),
    "coco_object": ("coco_stuff_raw_to_object", "raw_id", "object_id", 81, 172),
    "cityscapes_ids": ("cityscapes_id_to_train", "label_id", "train_id", 19, 34),
}
REMOVED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)


@pytest.mark.parametrize("rule", TABLES)
def test_every_row_of_a_table_is_mapped_and_every_other_id_is_refused(rule, tmp_path):
    name, stored, wanted, classes, rows = TABLES[rule]
    expected = {raw: to for raw, to in table(name, stored, wanted).items() if raw >= 0}
    if rule.startswith("coco"):
        expected = {raw: to for raw, to in expected.items() if raw not in REMOVED}
    assert len(expected) == rows
    for raw in range(256):
        if raw in expected:
            assert to_ids(np.array([[raw]]), rule, classes, tmp_path)[0, 0] == expected[raw]
        else:
            with pytest.raises(UserError, match=rf"1 pixels hold label ids {raw}; expected 0\.\."):
                to_ids(np.array([[raw]]), rule, classes, tmp_path)
    assert set(expected.values()) - {255} == set(range(classes))


def test_the_eleven_coco_ids_that_never_occur_are_refused(tmp_path):
    # They occur in converted copies only, so that they show such a copy under a raw map's name.
    for rule, classes in (("coco_stuff", 171), ("coco_object", 81)):
        with pytest.raises(UserError, match=r"11 pixels hold label ids 11, 25, 28, 29, 44, \.\.\."):
            to_ids(np.array([REMOVED]), rule, classes, tmp_path)


def test_the_context_table_agrees_with_the_class_file(tmp_path):
    names = read_classes("context60").names
    to_60 = table("context459_to_60_59", "id459", "id60")
    assert sorted(to_60) == list(range(460))
    assert sorted(to for to in to_60.values() if to) == list(range(1, 60))
    to_59 = table("context459_to_60_59", "id459", "id59")
    assert to_59 == {raw: to - 1 if to else 255 for raw, to in to_60.items()}
    assert names[0] == "background"


@pytest.mark.parametrize("rule", list(LABEL_RULES))
def test_an_id_without_a_class_is_an_error_and_not_a_dropped_pixel(rule, tmp_path):
    classes = GOLDEN[rule][0] if rule in GOLDEN else 20
    stored = np.array([[1, 1, 222, 222], [1, 1, 223, 0]])
    words = r"x\.png: 3 pixels hold label ids 222, 223; expected 0\.\."
    with pytest.raises(UserError, match=words):
        to_ids(stored, rule, classes, tmp_path / "x.png")


@pytest.mark.parametrize("wrong", [-1, 256, 70000])
def test_ids_outside_eight_bits_are_refused_too(wrong, tmp_path):
    with pytest.raises(UserError, match=f"1 pixels hold label ids {wrong};"):
        to_ids(np.array([[0, wrong, 255]]), "as_is", 21, tmp_path)


def test_a_rule_for_another_number_of_classes_is_refused(tmp_path):
    with pytest.raises(UserError, match="cityscapes_ids gives 19 classes, the class file has 20"):
        to_ids(np.array([[0]]), "cityscapes_ids", 20, tmp_path)


def test_the_expected_ids_in_the_message_are_those_of_the_file(tmp_path):
    with pytest.raises(UserError, match=r"ids 21; expected 0\.\.20 and 255"):
        to_ids(np.array([[21]]), "zero_ignored", 20, tmp_path)
    with pytest.raises(UserError, match=r"ids 20; expected 0\.\.19 and 255"):
        to_ids(np.array([[20]]), "as_is", 20, tmp_path)
    with pytest.raises(
        UserError, match=r"expected 0\.\.10 and 12\.\.24 and 26\.\.27 and \.\.\. and 255"
    ):
        to_ids(np.array([[11]]), "coco_stuff", 171, tmp_path)
    with pytest.raises(UserError, match=r"expected 0\.\.33 \(rule cityscapes_ids"):
        to_ids(np.array([[255]]), "cityscapes_ids", 19, tmp_path)


# --- files ----------------------------------------------------------------------------------------


def test_palette_labels_are_read_by_index(tmp_path):
    ids = np.array([[0, 1, 20], [255, 7, 7]])
    palette_png(tmp_path / "label.png", ids)
    read = read_labels(tmp_path / "label.png")
    assert read.tolist() == ids.tolist()
    assert read.dtype == np.int64


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16", "I", "F"])
def test_labels_of_another_mode_are_refused_by_name(tmp_path, mode):
    file = tmp_path / ("label.tif" if mode in ("I", "F") else "label.png")
    Image.new(mode, (4, 4)).save(file)
    with pytest.raises(UserError, match=rf"label\.\w+ has mode {mode}; expected an 8-bit palette"):
        read_labels(file)


def damaged(file, kind):
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes({
        "cut": content[:half],
        "flipped": content[:half] + bytes(255 - b for b in content[half : half + 9])
        + content[half + 9 :],
        "head": content[:20],
        "empty": b"",
        "text": b"no picture",
    }[kind])  # fmt: skip


@pytest.mark.parametrize("kind", ["cut", "flipped", "head", "empty", "text"])
def test_a_corrupt_label_is_one_line_with_its_name(tmp_path, kind):
    file = tmp_path / "label.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 20, (90, 90), dtype=np.uint8)).save(file)
    damaged(file, kind)
    with pytest.raises(UserError, match=r"label\.png: not readable as a picture") as caught:
        read_labels(file)
    assert "\n" not in str(caught.value)
    assert ("the file is empty" in str(caught.value)) == (kind == "empty")


def test_grey_pictures_become_three_channels(tmp_path):
    Image.new("L", (5, 4), 77).save(tmp_path / "grey.jpg")
    image, turned = read_image(tmp_path / "grey.jpg")
    assert image.shape == (4, 5, 3)
    assert np.all(np.abs(image.astype(int) - 77) <= 1)
    assert not turned


def rotated_jpeg(file, size, orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation  # 6: to be shown turned by 90 degrees
    Image.new("RGB", size).save(file, exif=exif)


def test_the_orientation_of_exif_turns_the_picture(tmp_path):
    rotated_jpeg(tmp_path / "turned.jpg", (30, 20))
    image, turned = read_image(tmp_path / "turned.jpg")
    assert image.shape == (30, 20, 3)
    assert turned


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 8])
def test_size_and_orientation_agree_with_the_picture_read(tmp_path, suffix, orientation):
    file = tmp_path / f"picture{suffix}"
    rotated_jpeg(file, (30, 20), orientation)
    height, width, found = picture_size(file)
    image, turned = read_image(file)
    assert (height, width) == image.shape[:2]
    assert found == (orientation or 1)
    assert turned == (found != 1)


@pytest.mark.parametrize("content", [b"no picture", b""])
def test_a_broken_picture_is_named(tmp_path, content):
    (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.jpg: not readable as a picture"):
        read_image(tmp_path / "broken.jpg")


def test_a_picture_cut_short_is_named(tmp_path):
    folder = make_voc(tmp_path)
    file = folder / "JPEGImages" / "a1.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"a1\.jpg: not readable as a picture"):
        open_voc(tmp_path).read("a1")


def test_split_lists_may_have_blank_lines_carriage_returns_and_a_byte_order_mark(tmp_path):
    (tmp_path / "val.txt").write_bytes(b"\xef\xbb\xbfa1\r\n\r\n a2 \n")
    assert read_ids(tmp_path / "val.txt") == ["a1", "a2"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("\n\n", "lists no image"),
        ("a\nb\na\n", "1 ids stand twice, the first is a"),
        ("../../etc\n", "leads out of the data set"),
        ("/abs\n", "leads out of the data set"),
    ],
)
def test_a_split_list_that_cannot_be_right_is_refused(tmp_path, content, words):
    (tmp_path / "val.txt").write_text(content)
    with pytest.raises(UserError, match=words):
        read_ids(tmp_path / "val.txt")


# --- layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_the_data_root_may_be_any_folder_on_the_way_down(tmp_path, start):
    folder = make_voc(tmp_path)
    found = find_root(tmp_path / start, str(FOLDER), "ImageSets/Segmentation")
    assert found.resolve() == folder.resolve()
    assert open_voc(tmp_path / start).ids == ("a1", "a2", "a3")


def test_a_data_root_without_the_data_set_names_what_was_expected(tmp_path):
    with pytest.raises(UserError, match=r"no VOCdevkit/VOC2012/.*give its place with --data-root"):
        open_voc(tmp_path)
    with pytest.raises(UserError, match=r"nowhere is no folder; it should hold VOCdevkit/VOC2012"):
        open_voc(tmp_path / "nowhere")


def test_an_unknown_split_names_the_lists_that_are_there(tmp_path):
    make_voc(tmp_path, lists={"val": ["a1"], "train": ["a2"]})
    with pytest.raises(UserError, match=r"unknown split 'vall'; known: val, train"):
        open_voc(tmp_path, "vall")


def test_a_missing_label_folder_is_named(tmp_path):
    folder = make_voc(tmp_path)
    (folder / "SegmentationClass").rename(folder / "Other")
    with pytest.raises(UserError, match="SegmentationClass does not exist"):
        open_voc(tmp_path)


def test_missing_files_are_counted_and_the_first_is_named(tmp_path):
    folder = make_voc(tmp_path)
    (folder / "SegmentationClass" / "a2.png").unlink()
    (folder / "SegmentationClass" / "a3.png").unlink()
    reader = open_voc(tmp_path)
    with pytest.raises(UserError, match=r"2 of 3 ids .* no label file; .*a2\.png"):
        check_files(reader, reader.ids)
    check_files(reader, reader.ids[:1])


def test_picture_and_label_are_read_unresized(tmp_path):
    make_voc(tmp_path, size=(50, 70))
    image, label = open_voc(tmp_path).read("a2")
    assert image.shape == (53, 68, 3)
    assert label.shape == (53, 68)
    assert set(np.unique(label)) <= {0, 1, 2, 3, 255}


def test_picture_and_label_of_two_sizes_are_refused(tmp_path):
    folder = make_voc(tmp_path)
    palette_png(folder / "SegmentationClass" / "a1.png", np.zeros((50, 60)))
    with pytest.raises(UserError, match=r"a1\.jpg: picture is 70x50, its label 60x50"):
        open_voc(tmp_path).read("a1")


def test_a_turned_picture_that_no_longer_fits_its_label_says_why(tmp_path):
    folder = make_voc(tmp_path)
    rotated_jpeg(folder / "JPEGImages" / "a1.jpg", (70, 50))
    with pytest.raises(UserError, match=r"50x70 \(the picture's EXIF orientation turned it\)"):
        open_voc(tmp_path).read("a1")


# --- real label maps ------------------------------------------------------------------------------


@pytest.mark.data
def test_real_label_maps_of_voc_hold_the_ids_of_both_voc_benchmarks(shared_data, tmp_path):
    tar = shared_data / "segmentation" / "voc2012_val_masks.tar.gz"
    if not tar.is_file():
        pytest.skip(f"{tar.name} is not among the real data")
    total = np.zeros((20, 20), dtype=np.int64)
    pixels, read = 0, 0
    with tarfile.open(tar) as opened:
        for member in opened:
            if not member.name.endswith(".png"):
                continue
            (tmp_path / "label.png").write_bytes(opened.extractfile(member).read())
            stored = read_labels(tmp_path / "label.png")
            to_ids(stored, "as_is", 21, tmp_path / "label.png")
            ids = to_ids(stored, "zero_ignored", 20, tmp_path / "label.png")
            pixels += int(((stored >= 1) & (stored <= 20)).sum())
            total += count(ids, np.where(ids == 255, 7, ids), 20)
            read += 1
            if read == 60:
                break
    assert read == 60
    assert total.sum() == pixels > 0
    assert np.array_equal(total, np.diag(np.diagonal(total)))
    assert score(total).miou == 1.0


def test_pictures_of_16_bits_keep_their_range_and_those_of_32_are_refused(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    found, _ = read_image(tmp_path / "ramp.png")
    assert np.array_equal(found[..., 0].ravel(), np.arange(256))
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "real.tif")
    with pytest.raises(UserError, match=r"real\.tif has mode F"):
        read_image(tmp_path / "real.tif")
