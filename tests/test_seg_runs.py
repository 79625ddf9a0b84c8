"""The command again: going on after an interruption, several ranks, data sets and values."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval import zeroshot_seg
from eval.segmentation import job as job_module
from eval.segmentation.protocol import read_task
from lazyclip.dense import METHODS
from lazyclip.export import save_model
from lazyclip.factory import build
from tests.toy_seg_command import MODEL, command, ids_of, refused, spoil_labels
from tests.toy_voc import make_protocol, make_voc


@pytest.fixture
def toy(tmp_path):
    make_voc(tmp_path / "data")
    make_protocol(tmp_path)
    return tmp_path


# --- going on after an interruption ---------------------------------------------------------------


def interrupt(toy, keep):
    """Make an output folder look as if the run had died after `keep` pictures."""
    (toy / "out" / "results.json").unlink()
    (ledger,) = (toy / "out" / "counts").iterdir()
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[: 1 + keep]) + '{"id": "a')


def scored_by(monkeypatch):
    """Record which pictures go through the model."""
    seen = []
    plain = job_module.predict

    def spying(items, *rest):
        for item, found in plain(items, *rest):
            seen.append(item.name)
            yield item, found

    monkeypatch.setattr(job_module, "predict", spying)
    return seen


def test_an_interrupted_run_goes_on_where_it_stood(toy, capsys, monkeypatch):
    assert zeroshot_seg.main(command(toy, "--overlays", "0")) == 0
    whole = json.loads((toy / "out" / "results.json").read_text())
    interrupt(toy, keep=2)
    line = capsys.readouterr() and refused(capsys, command(toy))
    assert "cut short; continue it with --resume, or start anew with --overwrite" in line
    seen = scored_by(monkeypatch)
    assert zeroshot_seg.main(command(toy, "--resume", "--overlays", "0")) == 0
    again = json.loads((toy / "out" / "results.json").read_text())
    assert seen == ["a3"]
    assert again["record"]["resumed_from"] == 2
    for key in ("iou", "miou", "aacc", "macc", "images"):
        assert again[key] == whole[key]
    interrupt(toy, keep=2)
    seen.clear()
    assert zeroshot_seg.main(command(toy, "--overwrite", "--overlays", "0")) == 0
    assert len(seen) == 3


def test_pictures_whose_files_are_missing_are_done_again(toy, monkeypatch):
    masks = toy / "masks"
    assert zeroshot_seg.main(command(toy, "--overlays", "0")) == 0
    interrupt(toy, keep=3)
    seen = scored_by(monkeypatch)
    words = command(toy, "--resume", "--overlays", "1", "--save-predictions", str(masks))
    assert zeroshot_seg.main(words) == 0
    assert sorted(seen) == ["a1", "a2", "a3"]
    seen.clear()
    (masks / "a2.png").unlink()
    assert zeroshot_seg.main(words) == 0
    assert seen == ["a2"]
    assert json.loads((toy / "out" / "results.json").read_text())["images"] == 3


def test_counts_of_another_input_size_are_not_gone_on_with(toy, capsys):
    assert zeroshot_seg.main(command(toy, "--limit", "1")) == 0
    capsys.readouterr()
    line = refused(capsys, command(toy, "--resume", "--force-image-size", "128"))
    assert "image_size [64, 64] there, [128, 128] now" in line


def test_pictures_of_somebody_are_not_removed(toy, capsys):
    (toy / "out" / "shown").mkdir(parents=True)
    (toy / "out" / "shown" / "mine.png").write_text("mine")
    assert "shown holds pictures already, such as mine.png" in refused(capsys, command(toy))
    assert (toy / "out" / "shown" / "mine.png").read_text() == "mine"


def test_overwriting_with_a_broken_model_leaves_the_results_that_are_there(toy, capsys):
    assert zeroshot_seg.main(command(toy)) == 0
    before = {p: p.read_bytes() for p in (toy / "out").rglob("*") if p.is_file()}
    built = build("ViT-nano")
    with torch.no_grad():
        built.model.visual.proj[0, 0] = torch.nan
    save_model(built.model, built.info, toy / "broken")
    capsys.readouterr()
    words = command(toy, "--overwrite", model=("--model", str(toy / "broken")))
    assert "dense features are not finite" in refused(capsys, words)
    assert before == {p: p.read_bytes() for p in (toy / "out").rglob("*") if p.is_file()}


def test_counts_of_another_method_or_model_are_not_gone_on_with(toy, capsys):
    assert zeroshot_seg.main(command(toy)) == 0
    capsys.readouterr()
    line = refused(capsys, command(toy, "--resume", "--method", "sclip"))
    assert "method 'vanilla' there, 'sclip' now" in line
    line = refused(capsys, command(toy, "--resume", "--seed", "1"))
    assert "random_seed 0 there, 1 now" in line
    assert "exclude each other" in refused(capsys, command(toy, "--resume", "--overwrite"))


@pytest.mark.slow  # starts two processes
@pytest.mark.dist
def test_two_ranks_score_each_picture_once_and_agree_with_one(toy):
    make_protocol(toy)
    assert zeroshot_seg.main(command(toy)) == 0
    one = json.loads((toy / "out" / "results.json").read_text())
    words = command(toy, "--save-predictions", str(toy / "masks"), output="out2")
    root = Path(zeroshot_seg.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "--", "eval.zeroshot_seg", *words],
        cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "src"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((toy / "out2" / "results.json").read_text())
    assert two["record"]["world"] == 2
    for key in ("iou", "miou", "images"):
        assert two[key] == one[key]
    assert sorted(p.name for p in (toy / "masks").iterdir()) == ["a1.png", "a2.png", "a3.png"]
    held = [p.read_text().count('"cells"') for p in sorted((toy / "out2" / "counts").iterdir())]
    assert held == [2, 1]
    assert done.stdout.count("mIoU") == 1


# --- several data sets, other values --------------------------------------------------------------


def test_several_data_sets_are_scored_by_one_model(toy):
    text = (toy / "toy.yaml").read_text()
    other = text.replace("dataset: toy", "dataset: other").replace("stride: 32", "stride: 64")
    (toy / "other.yaml").write_text(other)
    words = command(toy, "--overlays", "1", "--save-predictions", str(toy / "masks"))
    words[1] = f"{toy / 'toy.yaml'},{toy / 'other.yaml'}"
    assert zeroshot_seg.main(words) == 0
    hashes = set()
    for name in ("toy", "other"):
        results = json.loads((toy / "out" / name / "results.json").read_text())
        assert results["dataset"] == name
        hashes.add(results["protocol"]["hash"])
        assert len(list((toy / "masks" / name).glob("*.png"))) == 3
    assert len(hashes) == 2


def test_all_names_every_shipped_data_set_and_a_name_given_twice_is_refused(toy, capsys):
    names = zeroshot_seg.dataset_names("all")
    assert {"voc20", "voc21", "context59", "context60", "cityscapes", "ade20k", "coco_stuff",
            "coco_object"} == set(names)  # fmt: skip
    assert "voc20 twice" in refused(capsys, ["--dataset", "voc20,voc20", *MODEL])


def test_a_value_of_the_protocol_given_by_flag_changes_the_hash_and_the_name(toy):
    assert zeroshot_seg.main(command(toy, "--stride", "16", "--limit", "1")) == 0
    protocol = json.loads((toy / "out" / "results.json").read_text())["protocol"]
    assert protocol["stride"] == 16
    assert protocol["name"] == "small+stride=16"
    assert protocol["hash"] != read_task(str(toy / "toy.yaml")).protocol.hash


def test_a_class_file_of_another_length_is_refused(toy, capsys):
    (toy / "two.txt").write_text("one\ntwo\n")
    line = refused(capsys, command(toy, "--classes", str(toy / "two.txt")))
    assert "two.txt" in line
    assert "2" in line


def test_every_method_runs_and_differs_from_vanilla(toy):
    maps = set()
    for method in METHODS:
        masks = toy / method
        words = command(toy, "--method", method, "--save-predictions", str(masks), output=None)
        assert zeroshot_seg.main([*words, "--output", str(toy / f"out-{method}")]) == 0
        results = json.loads((toy / f"out-{method}" / "results.json").read_text())
        assert results["method"] == method
        maps.add(b"".join(ids_of(masks / f"{name}.png").tobytes() for name in ("a1", "a2", "a3")))
    assert len(maps) == len(list(METHODS)) == 5


def test_the_check_says_what_is_wrong_and_builds_nothing(toy, capsys):
    words = command(toy, "--check", model=("--model", "no-such-model"))
    assert zeroshot_seg.main(words) == 0
    assert "toy: no fault found in split val" in capsys.readouterr().out
    spoil_labels(toy, "a3")
    assert zeroshot_seg.main(words) == 2
    printed = capsys.readouterr()
    assert "a3.png" in printed.out
    assert "is not as it should be: 1 line above" in printed.err
    assert not (toy / "out").exists()
