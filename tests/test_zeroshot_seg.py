"""The command: a whole run on a tiny data set, its files, and the errors a user can mend."""

import csv
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from eval import zeroshot_seg
from eval.segmentation.protocol import read_task
from tests import reference_seg as reference
from tests.toy_seg_command import MODEL, command, ids_of, read_pairs, refused, spoil_labels
from tests.toy_voc import make_protocol, make_voc, palette_png


@pytest.fixture
def toy(tmp_path):
    make_voc(tmp_path / "data")
    make_protocol(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run over all three pictures."""
    toy = tmp_path_factory.mktemp("toy")
    folder = make_voc(toy / "data")
    make_protocol(toy)
    words = command(toy, "--save-predictions", str(toy / "masks"), "--overlays", "2")
    assert zeroshot_seg.main(words) == 0
    return toy, folder, json.loads((toy / "out" / "results.json").read_text())


def test_the_scores_are_those_of_the_saved_label_maps(finished):
    toy, folder, results = finished
    pairs = read_pairs(toy / "masks", folder / "SegmentationClass", ("a1", "a2", "a3"))
    expected = reference.scores_of(pairs, 3)
    assert list(results["iou"]) == ["red thing", "blue thing", "green thing"]
    assert list(results["iou"].values()) == pytest.approx(expected["iou"])
    for key in ("miou", "aacc", "macc"):
        assert results[key] == pytest.approx(expected[key])
    rows = list(csv.DictReader((toy / "out" / "classes.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == list(results["iou"])
    assert [float(row["accuracy"]) for row in rows] == pytest.approx(expected["accuracy"])
    assert sum(int(row["truth_px"]) for row in rows) == sum((p[0] != 255).sum() for p in pairs)


def test_label_maps_have_one_channel_of_class_ids_and_the_size_of_the_label(finished):
    toy, folder, _ = finished
    files = sorted(p.name for p in (toy / "masks").rglob("*.png"))
    assert files == ["a1.png", "a2.png", "a3.png"]
    for name in files:
        with Image.open(toy / "masks" / name) as found:
            assert found.mode == "L"
        found = ids_of(toy / "masks" / name)
        assert found.shape == ids_of(folder / "SegmentationClass" / name).shape
        assert set(np.unique(found)) <= {0, 1, 2}


def test_the_result_file_says_what_made_the_scores(finished):
    toy, _, results = finished
    assert results["dataset"] == "toy"
    assert results["images"] == 3
    assert results["complete"] is True
    assert results["method"] == "vanilla"
    protocol = read_task(str(toy / "toy.yaml")).protocol
    assert results["protocol"]["name"] == "small"
    assert results["protocol"]["hash"] == protocol.hash
    assert results["protocol"]["stride"] == 32
    assert results["model"]["name"] == "LaSt-ViT-nano"
    assert results["model"]["random_weights"] is True
    assert results["model"]["pooling"]["pooling"] == "last"
    assert results["record"]["command"].startswith("python -m eval.zeroshot_seg --dataset")
    assert results["record"]["protocol_hash"] == protocol.hash
    assert str(toy) not in (toy / "out" / "results.json").read_text()


def test_two_runs_give_the_same_label_maps(finished):
    toy, _, results = finished
    words = command(toy, "--save-predictions", str(toy / "again"), output="out2")
    assert zeroshot_seg.main(words) == 0
    for name in ("a1", "a2", "a3"):
        one, other = (toy / d / f"{name}.png" for d in ("masks", "again"))
        assert np.array_equal(ids_of(one), ids_of(other))
    assert json.loads((toy / "out2" / "results.json").read_text())["miou"] == results["miou"]


def test_overlays_show_picture_truth_and_prediction(finished):
    toy, folder, _ = finished
    files = sorted((toy / "out" / "overlays").iterdir())
    assert [f.name for f in files] == ["a1.png", "a2.png"]
    sheet = ids_of(files[0])
    picture = ids_of(folder / "JPEGImages" / "a1.jpg")
    scale = -(-192 // 50)
    left = sheet[20 : 20 + 50 * scale : scale, 8 : 8 + 70 * scale : scale]
    assert np.array_equal(left, picture)
    assert sheet.shape[1] == 3 * 70 * scale + 4 * 8


def test_a_limited_run_says_that_it_is_not_comparable(toy, capsys):
    assert zeroshot_seg.main(command(toy, "--limit", "2", "--overlays", "0")) == 0
    printed = capsys.readouterr()
    results = json.loads((toy / "out" / "results.json").read_text())
    assert (results["images"], results["expected_images"], results["complete"]) == (2, 3, False)
    assert "NOT COMPARABLE: 2 images scored, split val has 3" in printed.out
    assert list((toy / "out" / "overlays").iterdir()) == []


def test_another_number_of_images_than_the_benchmark_has_is_said(toy, capsys):
    (toy / "data/VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("a1\na3\n")
    assert zeroshot_seg.main(command(toy)) == 0
    printed = capsys.readouterr()
    assert "toy val has 2 images here, the benchmark 3" in printed.err
    assert "NOT COMPARABLE: 2 images scored, split val has 3" in printed.out


def test_the_table_is_in_per_cent_with_what_it_depends_on(toy, capsys):
    assert zeroshot_seg.main(command(toy, "--last-k", "3")) == 0
    lines = capsys.readouterr().out.splitlines()
    results = json.loads((toy / "out" / "results.json").read_text())
    assert lines[0].split() == ["class", "IoU", "Acc"]
    assert lines[1].split()[:2] == ["red", "thing"]
    assert lines[1].split()[2] == f"{100 * results['iou']['red thing']:.1f}"
    assert f"mIoU {100 * results['miou']:.2f}  aAcc {100 * results['aacc']:.1f}" in lines[4]
    assert f"3 images, protocol small:{results['protocol']['hash']}, method vanilla" in lines[4]
    assert "pooling last k 3" in lines[4]
    assert "RANDOM WEIGHTS" in lines[-1]
    assert "NOT COMPARABLE" not in "".join(lines)


def test_a_background_class_is_scored_and_a_threshold_assigns_it(toy):
    make_protocol(
        toy, classes=("sky, wall", "red thing", "blue thing", "green thing"),
        labels="as_is", background=True, threshold=1,
    )  # fmt: skip
    masks = toy / "masks"
    assert zeroshot_seg.main(command(toy, "--save-predictions", str(masks))) == 0
    results = json.loads((toy / "out" / "results.json").read_text())
    assert list(results["iou"]) == ["background", "red thing", "blue thing", "green thing"]
    assert results["iou"]["red thing"] == 0
    assert results["iou"]["background"] > 0
    assert ids_of(masks / "a1.png").max() == 0


def test_a_class_in_neither_labels_nor_predictions_is_null(toy):
    make_protocol(toy, classes=["thing", *(f"word {i}" for i in range(19))])
    assert zeroshot_seg.main(command(toy, "--limit", "1")) == 0
    results = json.loads((toy / "out" / "results.json").read_text())
    there = [value for value in results["iou"].values() if value is not None]
    assert None in results["iou"].values()
    assert results["miou"] == pytest.approx(sum(there) / len(there))


def test_a_model_with_other_mean_and_std_is_warned_of(toy, capsys, monkeypatch):
    make_protocol(toy, mean="[127.5, 127.5, 127.5]")
    assert zeroshot_seg.main(command(toy, "--limit", "1")) == 0
    assert "protocol small normalises every model with its own" in capsys.readouterr().err


def test_the_data_root_comes_from_the_environment(toy, monkeypatch):
    monkeypatch.setenv("LAZYCLIP_DATA", str(toy / "data" / "VOCdevkit"))
    words = ["--dataset", str(toy / "toy.yaml"), *MODEL, "--output", str(toy / "out")]
    assert zeroshot_seg.main([*words, "--limit", "1"]) == 0


def test_the_default_folder_is_named_after_data_set_model_and_weights(toy):
    task = read_task(str(toy / "toy.yaml"))

    def name(*words):
        args = zeroshot_seg.make_parser().parse_args(list(words))
        return str(zeroshot_seg.default_output(args, task))

    assert name(*MODEL) == "logs/seg/toy-LaSt-ViT-nano-random0"
    assert name("--model", "logs/last-k1/model") == "logs/seg/toy-last-k1"
    assert name("--model", "ViT-B-16", "--pretrained", "openai") == "logs/seg/toy-ViT-B-16-openai"
    assert name(*MODEL, "--limit", "5") == "logs/seg/toy-LaSt-ViT-nano-random0-first5"


# --- errors ---------------------------------------------------------------------------------------


def test_no_data_set_is_answered_by_an_example(capsys):
    line = refused(capsys, MODEL)
    assert "pass --dataset (" in line
    assert "voc20" in line
    assert "python -m eval.zeroshot_seg --dataset voc20" in line


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--protocol", "smal"), "unknown protocol of .* 'smal'; known: small"),
        (("--method", "vanila"), "unknown dense method 'vanila'; .*vanilla"),
        (("--split", "vall"), "unknown split 'vall'; known: val"),
        (("--device", "tpux"), "--device tpux is not known; use cuda, cuda:0 or cpu"),
        (("--threads", "-1"), "--threads -1 is too small"),
        (("--classes", "red, red, blue"), "class 'red' stands at places 1, 2"),
        (("--classes", "red, blue"), "class list red, blue has 2 classes, toy has 3"),
        (("--classes", "no.txt"), "--classes no.txt does not exist"),
        (("--limit", "0"), "--limit 0 is too small; use 1 or more"),
        (("--batch-size", "0"), "--batch-size 0 is too small"),
        (("--overlays", "-1"), "--overlays -1 is too small"),
    ],
)
def test_a_wrong_flag_is_named_before_anything_is_done(toy, capsys, more, words):
    line = refused(capsys, command(toy, *more))
    assert re.search(words, line), line
    assert not (toy / "out").exists()


def test_an_unknown_data_set_is_answered_by_the_nearest(toy, capsys):
    line = refused(capsys, ["--dataset", "voc2", *MODEL, "--data-root", toy])
    assert "unknown data set 'voc2'" in line
    assert "voc20" in line


def test_a_missing_folder_is_named(toy, capsys):
    line = refused(capsys, command(toy, root="nowhere"))
    assert "nowhere is no folder; it should hold VOCdevkit/VOC2012" in line


def test_missing_files_are_found_before_the_model_is_built(toy, capsys):
    (toy / "data/VOCdevkit/VOC2012/JPEGImages/a3.jpg").unlink()
    line = refused(capsys, command(toy, model=("--model", "no-such-model")))
    assert "1 of 3 ids of the split have no picture" in line
    assert "a3.jpg" in line


def test_wrong_label_ids_are_found_before_the_model_is_built(toy, capsys):
    spoil_labels(toy, "a1", "a2", "a3")
    line = refused(capsys, command(toy, model=("--model", "no-such-model")))
    assert "a1.png: 3500 pixels hold label ids 9; expected 0..3 and 255" in line


@pytest.mark.parametrize("name", ["a1", "a3"])
def test_one_wrong_file_fails_the_run_at_its_end_and_the_others_are_kept(toy, capsys, name):
    spoil_labels(toy, name)
    others = [other for other in ("a1", "a2", "a3") if other != name]
    masks = toy / "masks"
    assert zeroshot_seg.main(command(toy, "--save-predictions", str(masks))) == 2
    printed = capsys.readouterr()
    error = printed.err.splitlines()[-1]
    assert error.startswith("error: 1 of 3 images could not be scored (--max-bad 0): ")
    assert f"{name}.png" in error
    assert "NOT COMPARABLE: 2 images scored, split val has 3" in printed.out
    results = json.loads((toy / "out" / "results.json").read_text())
    assert (results["images"], results["complete"]) == (2, False)
    assert [bad["id"] for bad in results["bad"]] == [name]
    labels = toy / "data/VOCdevkit/VOC2012/SegmentationClass"
    expected = reference.scores_of(read_pairs(masks, labels, others), 3)
    assert results["miou"] == pytest.approx(expected["miou"])


def test_a_broken_picture_may_be_allowed_for(toy, capsys):
    (toy / "data/VOCdevkit/VOC2012/JPEGImages/a2.jpg").write_bytes(b"broken")
    assert zeroshot_seg.main(command(toy, "--max-bad", "1")) == 0
    assert "not scored: " in capsys.readouterr().err
    assert json.loads((toy / "out" / "results.json").read_text())["complete"] is False


def test_a_missing_label_may_be_allowed_for(toy):
    (toy / "data/VOCdevkit/VOC2012/SegmentationClass/a2.png").unlink()
    assert zeroshot_seg.main(command(toy, "--max-bad", "1")) == 0
    (bad,) = json.loads((toy / "out" / "results.json").read_text())["bad"]
    assert bad["id"] == "a2"
    assert "does not exist" in bad["reason"]


def test_labels_in_colour_and_labels_of_another_size_are_named(toy, capsys):
    file = toy / "data/VOCdevkit/VOC2012/SegmentationClass/a1.png"
    Image.new("RGB", (70, 50)).save(file)
    assert zeroshot_seg.main(command(toy)) == 2
    assert "a1.png has mode RGB" in capsys.readouterr().err
    palette_png(file, np.zeros((50, 71)))
    assert zeroshot_seg.main(command(toy, output="out2")) == 2
    assert "a1.jpg: picture is 70x50, its label 71x50" in capsys.readouterr().err


def test_a_threshold_without_a_background_class_is_refused(toy, capsys):
    make_protocol(toy, threshold=0.1)
    assert "toy has no background class" in refused(capsys, command(toy))


def test_a_model_without_weights_is_refused(toy, capsys):
    line = refused(capsys, command(toy, model=("--model", "LaSt-ViT-nano")))
    assert "LaSt-ViT-nano has no weights" in line
    assert "--random-weights" in line
    assert not (toy / "out").exists()


def test_a_picture_too_narrow_for_the_model_is_named(toy, capsys):
    folder = toy / "data/VOCdevkit/VOC2012"
    Image.new("RGB", (4000, 1)).save(folder / "JPEGImages" / "a2.jpg")
    palette_png(folder / "SegmentationClass" / "a2.png", np.zeros((1, 4000)))
    assert zeroshot_seg.main(command(toy)) == 2
    assert "a2.jpg: a window of" in capsys.readouterr().err


# --- results that are there -----------------------------------------------------------------------


def test_results_that_are_there_are_kept_unless_overwriting_is_asked_for(toy, capsys):
    (toy / "out" / "overlays").mkdir(parents=True)
    (toy / "out" / "results.json").write_text("{}")
    (toy / "out" / "overlays" / "old.png").write_text("of an earlier run")
    line = refused(capsys, command(toy))
    assert "results.json exists; give another place with --output, or --overwrite" in line
    assert (toy / "out" / "results.json").read_text() == "{}"
    assert zeroshot_seg.main(command(toy, "--overwrite", "--limit", "1")) == 0
    assert json.loads((toy / "out" / "results.json").read_text())["images"] == 1
    assert [p.name for p in (toy / "out" / "overlays").iterdir()] == ["a1.png"]


def test_label_maps_of_another_run_are_not_mixed_with(toy, capsys):
    masks = toy / "masks"
    masks.mkdir()
    Image.new("L", (2, 2)).save(masks / "a1.png")
    words = command(toy, "--save-predictions", str(masks), "--limit", "1")
    assert "holds 1 .png already, such as a1.png" in refused(capsys, words)
    Image.new("L", (2, 2)).save(masks / "other.png")
    assert "such as other.png" in refused(capsys, [*words, "--overwrite"])
    (masks / "other.png").unlink()
    assert zeroshot_seg.main([*words, "--overwrite"]) == 0
    assert ids_of(masks / "a1.png").shape == (50, 70)


@pytest.mark.parametrize("place", ["data/VOCdevkit/VOC2012/SegmentationClass", "out/overlays"])
def test_label_maps_never_go_where_labels_or_overlays_are(toy, capsys, place):
    before = (toy / "data/VOCdevkit/VOC2012/SegmentationClass/a1.png").read_bytes()
    words = command(toy, "--save-predictions", str(toy / place), "--overwrite")
    assert "holds the labels or the overlays" in refused(capsys, words)
    assert (toy / "data/VOCdevkit/VOC2012/SegmentationClass/a1.png").read_bytes() == before


def test_an_output_that_is_a_file_is_refused(toy, capsys):
    (toy / "file").write_text("")
    line = refused(capsys, command(toy, output="file/below"))
    assert "is no folder" in line


# --- real pictures --------------------------------------------------------------------------------


@pytest.mark.data
def test_two_real_pictures_of_voc_are_scored(shared_data, tmp_path, capsys):
    tar = shared_data / "segmentation" / "voc2012_sample.tar"
    if not tar.is_file():
        pytest.skip(f"{tar.name} is not among the real data")
    with tarfile.open(tar) as opened:
        opened.extractall(tmp_path / "data", filter="data")
    make_protocol(tmp_path, classes=read_task("voc20").classes.names, short=112, window=64)
    words = command(tmp_path, "--limit", "2", "--save-predictions", str(tmp_path / "masks"))
    assert zeroshot_seg.main(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    labels = tmp_path / "data" / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    ids = [p.stem for p in sorted((tmp_path / "masks").glob("*.png"))]
    expected = reference.scores_of(read_pairs(tmp_path / "masks", labels, ids), 20)
    assert len(ids) == 2
    assert list(results["iou"].values()) == pytest.approx(expected["iou"])
    assert "toy val has 29 images here, the benchmark 3" in capsys.readouterr().err
