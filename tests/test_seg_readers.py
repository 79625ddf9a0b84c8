"""Label rules, files, and the VOC layout: what is read, and what is refused by name."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from eval.segmentation.confusion import count, score
from eval.segmentation.readers import LABEL_RULES, READERS, check_files, to_ids
from eval.segmentation.readers.files import find_root, read_ids, read_image, read_labels
from lazyclip.base.errors import UserError
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


@pytest.mark.parametrize("rule", list(LABEL_RULES))
def test_an_id_without_a_class_is_an_error_and_not_a_dropped_pixel(rule, tmp_path):
    stored = np.array([[1, 1, 22, 22], [1, 1, 23, 255]])
    with pytest.raises(UserError, match=r"x\.png: 3 pixels hold label ids 22, 23; expected 0\.\."):
        to_ids(stored, rule, 20, tmp_path / "x.png")


def test_the_expected_ids_in_the_message_are_those_of_the_file(tmp_path):
    with pytest.raises(UserError, match=r"ids 21; expected 0\.\.20 and 255"):
        to_ids(np.array([[21]]), "zero_ignored", 20, tmp_path)
    with pytest.raises(UserError, match=r"ids 20; expected 0\.\.19 and 255"):
        to_ids(np.array([[20]]), "as_is", 20, tmp_path)


# --- files ----------------------------------------------------------------------------------------


def test_palette_labels_are_read_by_index(tmp_path):
    ids = np.array([[0, 1, 20], [255, 7, 7]])
    palette_png(tmp_path / "label.png", ids)
    read = read_labels(tmp_path / "label.png")
    assert read.tolist() == ids.tolist()
    assert read.dtype == np.int64


def test_colour_coded_labels_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    with pytest.raises(
        UserError, match=r"rgb\.png has mode RGB; expected an 8-bit palette or grey"
    ):
        read_labels(tmp_path / "rgb.png")


def test_grey_pictures_become_three_channels(tmp_path):
    Image.new("L", (5, 4), 77).save(tmp_path / "grey.jpg")
    image, turned = read_image(tmp_path / "grey.jpg")
    assert image.shape == (4, 5, 3)
    assert np.all(np.abs(image.astype(int) - 77) <= 1)
    assert not turned


def rotated_jpeg(file, size):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.new("RGB", size).save(file, exif=exif)


def test_the_orientation_of_exif_turns_the_picture(tmp_path):
    rotated_jpeg(tmp_path / "turned.jpg", (30, 20))
    image, turned = read_image(tmp_path / "turned.jpg")
    assert image.shape == (30, 20, 3)
    assert turned


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
