"""The acceptance script on tiny weights and data made here: each check, verdict and exit code."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from eval import zeroshot_seg
from lazyclip.weights import file_sha256
from scripts import accept
from scripts.held import Held, expected_hash, hub_blob
from tests.toy import caption_shards
from tests.toy_models import saved
from tests.toy_voc import make_protocol, make_voc

CLASSES = ("red", "blue")
NAME = "ViT-nano:mine"
WEIGHTS = ["model", "tag", "activation", "file", "sha256", "sha256_source", "top1", "top1_source"]
ROWS = ["model", "tag", "dataset", "protocol", "method", "miou", "tolerance", "source"]


def write(file: Path, heads: list[str], *rows: dict[str, str]) -> None:
    with file.open("w", newline="") as stream:
        table = csv.DictWriter(stream, heads, restval="")
        table.writeheader()
        table.writerows(rows)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A weight file, ImageNet-like folders, and a tiny data set with its protocol."""
    folder = tmp_path_factory.mktemp("accept")
    saved(folder / "model", "ViT-nano")
    for index, name in enumerate(("n01", "n02")):
        place = folder / "val" / name
        place.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64, 64), (200 * index, 40 * i, 99)).save(place / f"{i}.png")
    make_voc(folder / "data")
    make_protocol(folder)
    return folder, folder / "model" / "open_clip_model.safetensors"


def tables(tmp_path, made, *rows, **changed):
    """Write both tables; `changed` replaces what is known of the weights."""
    known = {"model": "ViT-nano", "tag": "mine", "activation": "gelu", "file": made.name,
             "sha256": file_sha256(made), "sha256_source": "made here", **changed}  # fmt: skip
    write(tmp_path / "weights.csv", WEIGHTS, known)
    write(tmp_path / "acceptance.csv", ROWS, *rows)


def run(tmp_path, capsys, file, *more):
    """Run the script; returns the exit code, the verdicts by check, and what was said."""
    words = ["--tables", tmp_path, "--output", tmp_path / "out", *more]
    if file:
        words += ["--weights", f"{NAME}={file}"]
    code = accept.main([str(word) for word in words])
    out = tmp_path / "out" / "accept.json"
    lines = json.loads(out.read_text())["lines"] if out.is_file() else []
    return code, {line["check"]: line for line in lines}, capsys.readouterr()


def test_the_right_file_passes(tmp_path, capsys, held):
    folder, file = held
    tables(tmp_path, file, top1="50", top1_source="x")
    code, by, printed = run(tmp_path, capsys, file)
    assert code == 0
    assert by["hash"]["verdict"] == by["activation"]["verdict"] == "ok"
    assert by["top-1"]["verdict"] == "missing"
    assert "--imagenet-val" in by["top-1"]["source"]
    assert "2 ok, 0 FAIL, 1 missing, 0 unknown" in printed.out
    assert str(folder) not in (tmp_path / "out" / "accept.json").read_text()


def test_a_wrong_hash_fails_and_nothing_is_scored_with_that_file(tmp_path, capsys, held):
    folder, file = held
    tables(tmp_path, file, sha256="0" * 64, top1="50", top1_source="x")
    code, by, printed = run(tmp_path, capsys, file, "--imagenet-val", folder / "val",
                            "--classes", ",".join(CLASSES))  # fmt: skip
    assert code == 1
    assert by["hash"]["verdict"] == "FAIL"
    assert by["top-1"]["verdict"] == "missing"
    assert "1 of 2 checks failed" in printed.err


def test_the_first_digits_of_a_hash_suffice(tmp_path, capsys, held):
    _, file = held
    tables(tmp_path, file, sha256=file_sha256(file)[:8])
    assert run(tmp_path, capsys, file)[1]["hash"]["verdict"] == "ok"


def test_a_file_of_another_name_has_no_known_hash(tmp_path, capsys, held):
    _, file = held
    tables(tmp_path, file, file="another.pt")
    assert run(tmp_path, capsys, file)[1]["hash"]["verdict"] == "unknown"


def test_a_file_of_the_hubs_cache_is_compared_with_the_name_of_its_blob(tmp_path):
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert hub_blob(link) == "ab" * 32
    assert hub_blob(tmp_path / "plain.pt") == ""
    known = accept.KnownWeights("M", "t", "gelu", "", "", "", "", "")
    assert expected_hash(Held(known, link, "t")) == ("ab" * 32, "the hub's cache")
    assert accept.check_hash(Held(known, link, "t")).verdict == "FAIL"


def test_a_wrong_activation_fails(tmp_path, capsys, held):
    _, file = held
    tables(tmp_path, file, activation="quickgelu")
    code, by, _ = run(tmp_path, capsys, file)
    assert (code, by["activation"]["verdict"], by["activation"]["got"]) == (1, "FAIL", "gelu")


def test_a_file_that_is_no_weights_fails(tmp_path, capsys, held):
    _, file = held
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(file.read_bytes()[:1000])
    tables(tmp_path, torn)
    code, by, _ = run(tmp_path, capsys, torn)
    assert code == 1
    assert by["activation"]["verdict"] == "FAIL"
    assert "torn.safetensors" in by["activation"]["source"]


@pytest.mark.parametrize(("shift", "verdict", "code"), [(0.1, "ok", 0), (0.3, "FAIL", 1)])
def test_top1_of_a_folder_is_compared_within_a_fifth_of_a_point(
    tmp_path, capsys, held, shift, verdict, code
):
    folder, file = held
    more = ("--imagenet-val", folder / "val", "--classes", ",".join(CLASSES))
    tables(tmp_path, file, top1="0", top1_source="x")
    got = float(run(tmp_path, capsys, file, *more)[1]["top-1"]["got"])
    tables(tmp_path, file, top1=str(got + shift), top1_source="x")
    found, by, _ = run(tmp_path, capsys, file, *more)
    assert (found, by["top-1"]["verdict"]) == (code, verdict)


@pytest.mark.slow
def test_folders_and_shards_of_the_same_pictures_give_the_same_top1(tmp_path, capsys, held):
    _, file = held
    pattern = caption_shards(tmp_path / "shards", 1, 12, CLASSES)
    from lazyclip.shards import iterate_samples

    for sample in iterate_samples(tmp_path / "shards" / "00000.tar"):
        label = json.loads(sample.parts["json"])["class_index"]
        place = tmp_path / "val" / f"n{label}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{sample.key}.jpg").write_bytes(sample.parts["jpg"])
    tables(tmp_path, file, top1="1", top1_source="x")
    more = ("--classes", ",".join(CLASSES))
    _, one, _ = run(tmp_path, capsys, file, "--imagenet-val", tmp_path / "val", *more)
    _, two, _ = run(tmp_path, capsys, file, "--val-data", pattern, *more)
    assert one["top-1"]["got"] == two["top-1"]["got"] != ""


@pytest.mark.slow
def test_an_acceptance_row_is_a_real_run_and_its_score_decides(tmp_path, capsys, held):
    folder, file = held
    words = ["--dataset", folder / "toy.yaml", "--data-root", folder / "data", "--overlays", "0",
             "--model", "ViT-nano", "--pretrained", file, "--output", tmp_path / "seg"]  # fmt: skip
    assert zeroshot_seg.main([str(word) for word in words]) == 0
    miou = 100 * json.loads((tmp_path / "seg" / "results.json").read_text())["miou"]
    common = {"model": "ViT-nano", "tag": "mine", "dataset": str(folder / "toy.yaml"),
              "protocol": "small", "method": "vanilla", "source": "x"}  # fmt: skip
    tables(tmp_path, file, {**common, "miou": f"{miou + 0.4:.3f}", "tolerance": "0.5"})
    code, by, _ = run(tmp_path, capsys, file, "--data-root", folder / "data")
    assert (code, by["mIoU"]["verdict"], by["mIoU"]["got"]) == (0, "ok", f"{miou:.2f}")


@pytest.mark.parametrize(
    ("miou", "complete", "expected"),
    [
        (0.489, True, ("ok", "48.90", "")),
        (0.499, True, ("ok", "49.90", "")),
        (0.4888, True, ("FAIL", "48.88", "")),
        (0.4992, True, ("FAIL", "49.92", "")),
        (0.494, False, ("missing", "49.40", "8 of 1449 images: not the benchmark")),
    ],
)
def test_a_score_within_the_tolerance_passes_and_a_part_of_a_benchmark_is_no_verdict(
    miou, complete, expected
):
    (row,) = [r for r in accept.read_acceptance() if (r.dataset, r.method) == ("voc20", "vanilla")]
    result = {"miou": miou, "complete": complete, "images": 8, "expected_images": 1449}
    assert accept.judge(row, result) == expected


@pytest.mark.slow
def test_what_is_not_here_is_named_and_no_failure(tmp_path, capsys, held):
    _, file = held
    common = {"model": "ViT-nano", "tag": "mine", "protocol": "sclip", "method": "vanilla",
              "miou": "1", "tolerance": "1", "source": "x"}  # fmt: skip
    tables(tmp_path, file, {**common, "dataset": "voc20"})
    _, by, _ = run(tmp_path, capsys, file)
    assert (by["mIoU"]["verdict"], by["mIoU"]["source"]) == ("missing", "pass --data-root DIR")
    (tmp_path / "empty").mkdir()
    code, by, _ = run(tmp_path, capsys, file, "--data-root", tmp_path / "empty")
    assert (code, by["mIoU"]["verdict"]) == (0, "missing")
    assert "VOC2012" in by["mIoU"]["source"]


def test_without_any_weights_there_is_nothing_to_do(tmp_path, capsys, held):
    _, file = held
    tables(tmp_path, file)
    code, by, printed = run(tmp_path, capsys, None)
    assert code == 2
    assert not by
    assert "nothing could be checked" in printed.err
    assert "pass --weights ViT-nano:mine=FILE" in printed.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--weights", "ViT-nano:other=x"), "unknown weights of --weights 'ViT-nano:other'"),
        (("--weights", f"{NAME}=nowhere.pt"), "there is no file 'nowhere.pt'"),
        (("--tags", "ViT-nano:your"), "known: ViT-nano:mine"),
        (("--datasets", "voc20"), "unknown data set with an acceptance row 'voc20'"),
        (("--imagenet-val", "nowhere"), "--imagenet-val nowhere is no folder"),
        (("--imagenet-val", "val"), "class folders, the class list 1000"),
        (("--imagenet-val", "a", "--val-data", "b"), "exclude each other"),
        (("--data-root", "nowhere"), "--data-root nowhere is no folder"),
        (("--tables", "nowhere"), "weights.csv is not readable"),
    ],
)
def test_mistakes_are_one_line_and_code_2(tmp_path, capsys, held, words, said, monkeypatch):
    folder, file = held
    tables(tmp_path, file)
    monkeypatch.chdir(folder)
    code = accept.main(["--tables", str(tmp_path), "--output", str(tmp_path / "o"), *words])
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert code == 2
    assert said in line


def test_the_shipped_tables_are_read_and_every_row_has_its_weights():
    known = {(row.model, row.tag) for row in accept.read_weights()}
    rows = accept.read_acceptance()
    assert {(row.model, row.tag) for row in rows} <= known
    assert [row.dataset for row in rows if row.method == "vanilla"] == [
        "voc20", "cityscapes", "context59", "ade20k",
    ]  # fmt: skip
    assert {row.tolerance for row in rows if row.method == "sclip"} == {"0.1"}
