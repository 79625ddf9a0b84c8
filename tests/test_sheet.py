"""Contact sheets: which pictures, which colours, in which column."""

import numpy as np
import pytest
from PIL import Image

from eval import table, zeroshot_seg
from eval.segmentation import sheet
from eval.segmentation.overlays import PALE, generated_colours
from eval.segmentation.sheet import CELL, Column, colours_in, contact_sheet, palette_of
from lazyclip.base.errors import UserError
from tests.toy_results import SAVED, seg
from tests.toy_voc import make_protocol, make_voc

NAMES = ("cat", "dog", "sofa")


def flat(colour, size=(20, 30)):
    return np.full((*size, 3), colour, dtype=np.uint8)


def shown(folder, predictions, image=(200, 200, 200), truth=PALE, size=(20, 30)):
    """Write the pictures of `shown/`: id -> colour of its prediction."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in predictions.items():
        for what, painted in (("image", image), ("truth", truth), ("prediction", colour)):
            Image.fromarray(flat(painted, size)).save(folder / f"{name}.{what}.png")
    return folder


def test_cells_stand_in_the_order_picture_truth_results_row_by_row(tmp_path):
    colours = generated_colours(3)
    one = shown(tmp_path / "one", {"a": colours[0], "b": colours[1]}, (1, 2, 3), colours[2])
    two = shown(tmp_path / "two", {"a": colours[1], "b": colours[2]}, (1, 2, 3), colours[2])
    made = np.asarray(contact_sheet("toy", NAMES, [Column("one", one), Column("two", two)]))
    height = CELL * 20 // 30
    rows = []
    for y in range(made.shape[0]):  # the middle of each column, where a row of cells lies
        cells = tuple(tuple(made[y, CELL // 2 + 8 + i * (CELL + 8)]) for i in range(4))
        if cells[0] == (1, 2, 3) and (not rows or rows[-1] != cells):
            rows.append(cells)
    c = [tuple(colour) for colour in colours]
    assert rows == [((1, 2, 3), c[2], c[0], c[1]), ((1, 2, 3), c[2], c[1], c[2])]
    inside = (made == (1, 2, 3)).all(axis=2).sum()
    assert inside == 2 * CELL * height


def test_only_pictures_that_every_result_shows_are_on_the_sheet(tmp_path, caplog):
    one = shown(tmp_path / "one", {"a": (1, 1, 1), "b": (1, 1, 1)})
    two = shown(tmp_path / "two", {"b": (1, 1, 1)})
    assert sheet.shared_ids([Column("", one), Column("", two)]) == ["b"]
    assert "1 pictures are not shown by every result" in caplog.text
    three = shown(tmp_path / "three", {"c": (1, 1, 1)})
    with pytest.raises(UserError, match="no picture in common"):
        contact_sheet("toy", NAMES, [Column("", one), Column("", three)])


def test_the_legend_names_what_is_painted_by_area_and_what_is_left_out():
    colours = generated_colours(3)
    painted = [flat(colours[1]), flat(colours[2], (2, 2)), flat(PALE, (3, 3))]
    assert colours_in(painted, NAMES, colours) == [
        ("left out of the score", PALE),
        ("dog", tuple(colours[1].tolist())),
        ("sofa", tuple(colours[2].tolist())),
    ]


def test_a_colour_of_no_class_is_said(caplog):
    colours = generated_colours(3)
    assert colours_in([flat((9, 9, 9))], NAMES, colours) == []
    assert "1 colours on the sheet belong to no class" in caplog.text


def test_another_truth_is_said(tmp_path, caplog):
    colours = generated_colours(3)
    one = shown(tmp_path / "one", {"a": colours[0]}, truth=colours[0])
    two = shown(tmp_path / "two", {"a": colours[0]}, truth=colours[1])
    contact_sheet("toy", NAMES, [Column("", one), Column("", two)])
    assert "the truth of" in caplog.text


def test_tall_and_tiny_pictures_fit(tmp_path):
    folder = shown(tmp_path / "one", {"a": (1, 1, 1)}, size=(300, 10))
    shown(folder, {"b": (1, 1, 1)}, size=(1, 1))
    made = contact_sheet("toy", NAMES, [Column("x" * 200 + " y", folder)])
    assert made.width == 3 * (CELL + 8) + 8
    assert made.height < 1100


def test_shipped_palettes_are_used_and_unknown_data_sets_get_generated_colours():
    assert palette_of("voc20", 20)[0].tolist() == [128, 0, 0]
    assert (palette_of("mine", 5) == generated_colours(5)).all()


def test_a_damaged_picture_is_one_line(tmp_path):
    folder = shown(tmp_path / "one", {"a": (1, 1, 1)})
    (folder / "a.truth.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.truth\.png: not readable"):
        contact_sheet("toy", NAMES, [Column("", folder)])


def test_the_command_titles_columns_by_what_tells_them_apart(tmp_path):
    colours = generated_colours(3)
    for name, how in (("a", {}), ("b", {"method": "sclip"})):
        folder = seg(tmp_path / "in" / name, dataset="mine", protocol_hash="1", **how)
        shown(folder / "shown", {"x": colours[0]})
    seg(tmp_path / "in" / "c", dataset="mine", model=SAVED, protocol_hash="1")
    words = [str(tmp_path / "in"), "--sheet", "--output", str(tmp_path / "out")]
    assert table.main(words) == 0
    with Image.open(tmp_path / "out" / "sheet-mine.png") as made:
        assert made.width == 4 * (CELL + 8) + 8  # the result without pictures has no column


def test_without_pictures_nothing_is_written(tmp_path, capsys):
    seg(tmp_path / "in" / "a")
    words = [str(tmp_path / "in"), "--sheet", "--output", str(tmp_path / "out")]
    assert table.main(words) == 2
    assert "no result holds pictures" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_scored_data_set_gives_a_sheet(tmp_path):
    make_voc(tmp_path / "data")
    make_protocol(tmp_path)
    for method in ("vanilla", "maskclip"):
        words = ["--dataset", str(tmp_path / "toy.yaml"), "--data-root", str(tmp_path / "data"),
                 "--model", "ViT-nano", "--random-weights", "--overlays", "2",
                 "--method", method, "--output", str(tmp_path / "in" / method)]  # fmt: skip
        assert zeroshot_seg.main(words) == 0
    words = [str(tmp_path / "in"), "--sheet", "--output", str(tmp_path / "out")]
    assert table.main(words) == 0
    with Image.open(tmp_path / "out" / "sheet-toy.png") as made:
        assert made.width == 4 * (CELL + 8) + 8
    assert "RANDOM" in (tmp_path / "out" / "table.md").read_text()
