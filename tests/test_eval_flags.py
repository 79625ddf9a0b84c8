"""How the evaluation's entries answer a wrong command line, and what they will not overwrite."""

import pytest

from eval import point_in_box, zeroshot_cls, zeroshot_seg
from tests.toy import caption_shards

ENTRIES = {"cls": zeroshot_cls.main, "pib": point_in_box.main, "seg": zeroshot_seg.main}
QUICK = ["--model", "LaSt-ViT-nano", "--random-weights", "--device", "cpu"]


def line_of(capsys, entry, words):
    assert ENTRIES[entry](words) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "usage" not in captured.err + captured.out
    return lines[0]


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "val").mkdir()
    return caption_shards(tmp_path / "val", shards=1, per_shard=4)


@pytest.mark.parametrize("entry", ENTRIES)
def test_nothing_given_is_answered_with_an_example(capsys, entry):
    assert "python -m eval." in line_of(capsys, entry, [])


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_unknown_flag_is_answered_with_the_nearest(capsys, entry):
    line = line_of(capsys, entry, ["--pretraned", "openai"])
    assert "unknown flag --pretraned, nearest: --pretrained" in line


def test_classes_that_are_missing_are_named(capsys):
    assert "--classes is missing" in line_of(capsys, "cls", ["--val-data", "x.tar"])


def test_a_flag_of_open_clip_is_answered_by_name(capsys):
    line = line_of(capsys, "cls", ["--imagenet-val", "somewhere"])
    assert "--imagenet-val: folders of classes are not read" in line


def test_a_brace_pattern_eaten_by_the_shell_is_called_so(capsys):
    line = line_of(capsys, "pib", ["--val-data", "0.tar", "1.tar"])
    assert "'1.tar' belongs to no flag; quote patterns" in line


@pytest.mark.parametrize("entry", ["cls", "pib"])
def test_results_that_are_there_are_not_replaced_unless_asked(capsys, tmp_path, shards, entry):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("MINE")
    words = ["--val-data", shards, *QUICK, "--output", str(out)]
    words += ["--classes", "red, blue", "--templates", "plain"] if entry == "cls" else []
    assert "results.json exists; give another place" in line_of(capsys, entry, words)
    assert (out / "results.json").read_text() == "MINE"
    assert ENTRIES[entry]([*words, "--overwrite"]) == 0
    assert (out / "results.json").read_text() != "MINE"


def test_maps_that_are_there_are_not_replaced(capsys, tmp_path, shards):
    maps = tmp_path / "maps.npz"
    maps.write_text("MINE")
    words = ["--val-data", shards, *QUICK, "--save-maps", str(maps)]
    assert "maps.npz exists; give another place with --save-maps" in line_of(capsys, "pib", words)
    assert maps.read_text() == "MINE"


def test_a_misspelt_model_is_answered_before_its_weights(capsys, shards):
    words = ["--val-data", shards, "--model", "LaSt-ViT-B16"]
    line = line_of(capsys, "pib", words)
    assert "unknown model 'LaSt-ViT-B16'; nearest: LaSt-ViT-B-16" in line
