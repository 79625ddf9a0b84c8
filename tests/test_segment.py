"""Masks for anyone's pictures: files, legend, and the errors a user can mend."""

import json

import numpy as np
import pytest
from PIL import Image

from eval import segment

MODEL = ("--model", "LaSt-ViT-nano", "--random-weights", "--templates", "plain")
SMALL = ("--short", "64", "--window", "64", "--stride", "32")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, size in (("a.jpg", (60, 80)), ("trip/b.png", (90, 50)), ("trip/b.jpg", (64, 64))):
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    Image.new("L", (70, 65), 99).save(folder / "grey.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def command(place, out, *more, classes="cat, sofa, wall"):
    words = [str(place), "--classes", classes, "--output", str(out), *MODEL, *SMALL, *more]
    return [word for word in words if word]


def refused(capsys, words):
    assert segment.main(words) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if " | " not in x]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_folder_becomes_masks_colours_overlays_and_shares(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert segment.main(command(photos, out)) == 0
    names = ["a", "grey", "trip/b.jpg", "trip/b.png"]
    for kind in ("masks", "coloured", "overlays"):
        found = sorted(
            str(p.relative_to(out / kind).with_suffix("")) for p in (out / kind).rglob("*.png")
        )
        assert found == names
    results = json.loads((out / "results.json").read_text())
    assert list(results["shares"]) == names
    assert results["classes"] == ["cat", "sofa", "wall"]
    assert results["protocol"]["short"] == 64
    for name in names:
        with Image.open(out / "masks" / f"{name}.png") as opened:
            assert opened.mode == "L"
            mask = np.asarray(opened)
        assert mask.max() < 3
        for index, word in enumerate(results["classes"]):
            share = results["shares"][name].get(word, 0.0)
            assert share == pytest.approx((mask == index).mean(), abs=1e-6)
    with Image.open(out / "coloured" / "trip" / "b.png.png") as coloured:
        assert coloured.size == (50, 90)
    assert "4 pictures segmented" in capsys.readouterr().out


def test_one_picture_and_synonyms_in_a_file(photos, tmp_path):
    (tmp_path / "words.txt").write_text("wall, brick wall\ncat, kitten\n")
    out = tmp_path / "out"
    words = command(photos / "a.jpg", out, "--method", "sclip", classes=str(tmp_path / "words.txt"))
    assert segment.main(words) == 0
    results = json.loads((out / "results.json").read_text())
    assert (list(results["shares"]), results["classes"]) == (["a"], ["wall", "cat"])
    assert results["method"] == "sclip"


def test_a_threshold_makes_the_first_class_the_background(photos, tmp_path):
    out = tmp_path / "out"
    assert segment.main(command(photos / "a.jpg", out, "--threshold", "1")) == 0
    assert json.loads((out / "results.json").read_text())["shares"] == {"a": {"cat": 1.0}}


def test_a_broken_picture_is_named_and_the_others_are_kept(photos, tmp_path, capsys):
    (photos / "a.jpg").write_bytes(b"nothing")
    out = tmp_path / "out"
    line = refused(capsys, command(photos, out))
    assert "1 of 4 pictures could not be segmented (--max-bad 0)" in line
    assert "a.jpg" in line
    results = json.loads((out / "results.json").read_text())
    assert len(results["shares"]) == 3
    assert [bad["id"] for bad in results["bad"]] == ["a"]
    assert segment.main(command(photos, tmp_path / "out2", "--max-bad", "1")) == 0


@pytest.mark.parametrize(
    ("more", "classes", "words"),
    [
        (("--method", "sclop"), "cat, dog", "unknown dense method 'sclop'"),
        (("--protocol", "sclop"), "cat, dog", "unknown protocol"),
        (("--threshold", "2"), "cat, dog", "--threshold 2 is outside 0..1"),
        (("--threshold", "0.5"), "cat", "need a background"),
        (("--batch-size", "0"), "cat, dog", "--batch-size 0 is too small"),
        ((), "cat, dog, cat", "--classes: class 'cat' stands at places 1, 3"),
        ((), "no/such.txt", "class file no/such.txt does not exist; give a file with one"),
        ((), ", ".join(f"c{i}" for i in range(300)), "300 classes, a mask holds 255"),
    ],
)
def test_mistakes_are_one_line(photos, tmp_path, capsys, more, classes, words):
    assert words in refused(capsys, command(photos, tmp_path / "out", *more, classes=classes))
    assert not (tmp_path / "out").exists()


def test_places_are_checked(photos, tmp_path, capsys):
    assert "does not exist" in refused(capsys, command(tmp_path / "none", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    assert "holds no picture" in refused(capsys, command(tmp_path / "empty", tmp_path / "out"))
    assert "holds the pictures themselves" in refused(capsys, command(photos, photos))
    assert "--classes is missing" in refused(capsys, [str(photos), "--output", "x", *MODEL])
    assert "no picture is named" in refused(capsys, command("", tmp_path / "out"))
