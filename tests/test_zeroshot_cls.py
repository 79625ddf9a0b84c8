"""eval.zeroshot_cls and eval.samples: counts, bad samples, class files, and what a user reads."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eval.samples import BadSample, Tally, batches, class_of, picture_of, prepare_all
from eval.zeroshot_cls import Scored, main, score, table
from lazyclip.base.errors import UserError
from lazyclip.factory import build
from lazyclip.shards import Sample, expand, iterate_samples
from lazyclip.zeroshot import class_list, read_classes
from tests.toy import caption_sample, caption_shards, jpeg, png, write_shard

MODEL = ["--model", "LaSt-ViT-nano", "--random-weights", "--device", "cpu", "--workers", "1"]


def fails(capsys, words: list[str], *argv: str) -> None:
    """Check that a command ends in one line on stderr with exit code 2 and no traceback."""
    assert main([*argv]) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    for word in words:
        assert word in line


# --- scoring -------------------------------------------------------------------------------------


class Echo(nn.Module):
    """A model whose image features are the first pixels of the picture."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def encode_image(self, images):
        return images.flatten(1)[:, :6]


def picture(values: list[float]) -> torch.Tensor:
    return torch.tensor([*values, *[0.0] * 6]).reshape(3, 2, 2)


def test_counts_are_those_of_a_hand_made_case():
    classes = class_list(["a", "b, bee", "c", "d", "e", "f"])
    # Queries a, b, bee, c, d, e, f; bee lies along a's axis' negative, b has no axis of its own.
    queries = torch.zeros(7, 6)
    for row, axis in ((0, 0), (1, 1), (3, 2), (4, 3), (5, 4), (6, 5)):
        queries[row, axis] = 1
    queries[2, 0] = -1
    pairs = [
        (picture([1, 0, 0, 0, 0, 0]), 0),  # right
        (picture([-1, 0, 0, 0, 0, 0]), 1),  # right by the synonym
        (picture([1, 2, 3, 4, 5, 0.5]), 0),  # fifth best: e d c b a
        (picture([1, 2, 3, 4, 5, 0.5]), 5),  # sixth best
        (picture([0, 0, 9, 1, 0, 0]), 3),  # second best
    ]
    for size in (1, 2, 64):
        scored = score(Echo(), iter(pairs), queries, classes, batch_size=size)
        assert scored == Scored(5, {1: 2, 5: 4}, [2, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0])
    assert scored.share(1) == 0.4
    assert scored.share(5) == 0.8


def test_below_five_classes_there_is_no_top_five():
    scored = score(Echo(), [(picture([1, 0, 0, 0, 0, 0]), 0)], torch.eye(6)[:2], class_list("ab"))
    assert scored.share(5) is None
    assert re.search(r"model +100\.0 +- +50\.0 +1$", table(scored, "model", 2))


def test_features_that_are_not_finite_are_no_score():
    with pytest.raises(UserError, match="not finite"):
        score(Echo(), [(picture([float("nan")] * 6), 0)], torch.eye(6), class_list("abcdef"))


def test_the_command_agrees_with_the_same_done_by_hand(tmp_path, capsys):
    names = ("red", "blue", "green", "yellow", "white", "black")
    pattern = caption_shards(tmp_path / "val", shards=2, per_shard=6, classes=names)
    out = tmp_path / "out"
    argv = ["--val-data", pattern, "--classes", ", ".join(names), "--templates", "plain",
            "--batch-size", "5", "--output", str(out), *MODEL]  # fmt: skip
    assert main(argv) == 0
    captured = capsys.readouterr()
    result = json.loads((out / "results.json").read_text())

    built = build("LaSt-ViT-nano", random_weights_seed=0)
    samples = [s for path in expand(pattern) for s in iterate_samples(path)]
    images = torch.stack([built.preprocess_val(picture_of(s)) for s in samples])
    with torch.no_grad():
        text = built.model.encode_text(built.tokenizer([f"a photo of a {n}." for n in names]))
        image = built.model.encode_image(images)
    cosine = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1).numpy()
    order = np.argsort(-cosine, axis=1)
    truth = [json.loads(s.parts["json"])["class_index"] for s in samples]
    top = {k: np.mean([t in row[:k] for t, row in zip(truth, order, strict=True)]) for k in (1, 5)}

    assert result["top1"] == pytest.approx(top[1])
    assert result["top5"] == pytest.approx(top[5])
    assert (result["n"], result["chance"], result["skipped"]) == (12, 1 / 6, {})
    assert result["model"]["name"] == "LaSt-ViT-nano"
    assert result["record"]["command"].startswith("python -m eval.zeroshot_cls --val-data")
    assert result["record"]["device"] == "cpu"
    rows = list(csv.DictReader((out / "per_class.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == list(names)
    assert sum(int(row["correct"]) for row in rows) == round(12 * result["top1"])
    assert {row["n"] for row in rows} == {"2"}
    row = rf"LaSt-ViT-nano +{100 * top[1]:.1f} +{100 * top[5]:.1f} +16\.7 +12\n"
    assert re.search(row, captured.out)


def test_cls_members_and_a_limit_work_too(tmp_path, capsys):
    shard = [{"png": png(np.full((70, 90), 99, np.uint8)), "cls": b"%d" % (i % 2)}
             for i in range(5)]  # fmt: skip
    write_shard(tmp_path / "00000.tar.gz", shard)
    argv = ["--val-data", str(tmp_path), "--classes", "red, blue", "--limit", "3"]
    assert main([*argv, "--templates", "plain", *MODEL]) == 0
    assert re.search(r"LaSt-ViT-nano +\S+ +- +50\.0 +3\n", capsys.readouterr().out)


# --- bad samples ---------------------------------------------------------------------------------


def bad_shard(folder: Path) -> str:
    """Write seven samples, four of them bad in four ways."""
    good = caption_sample(0, ("red", "blue"))
    write_shard(
        folder / "00000.tar",
        [
            good,
            {**good, "jpg": good["jpg"][:300]},
            {"jpg": good["jpg"], "txt": b"no class"},
            {**good, "json": b'{"class_index": 7}'},
            {"txt": good["txt"], "json": good["json"]},
            caption_sample(1, ("red", "blue")),
            {**good, "json": b'{"class_index": "one"}'},
        ],
    )
    return str(folder)


def test_a_bad_sample_is_an_error_that_names_it_and_nothing_is_written(tmp_path, capsys):
    folder, out = bad_shard(tmp_path / "val"), tmp_path / "out"
    fails(
        capsys, ["00000.tar:1 (key 000000001)", "does not decode", "--max-bad N"],
        "--val-data", folder, "--classes", "red,blue", "--output", str(out),
        "--templates", "plain", *MODEL,
    )  # fmt: skip
    assert not out.exists()


def test_allowed_bad_samples_are_counted_by_reason_and_named(tmp_path, capsys):
    folder, out = bad_shard(tmp_path / "val"), tmp_path / "out"
    argv = ["--val-data", folder, "--classes", "red,blue", "--output", str(out), "--max-bad", "5"]
    assert main([*argv, "--templates", "plain", *MODEL]) == 0
    captured = capsys.readouterr()
    result = json.loads((out / "results.json").read_text())
    reasons = ["undecodable", "no_class", "class_out_of_range", "no_picture", "bad_class"]
    assert result["skipped"] == dict.fromkeys(reasons, 1)
    assert result["n"] == 2
    assert "skipped: 1 undecodable, 1 no_class" in captured.out
    for place in (1, 2, 3, 4, 6):
        assert f"skipped 00000.tar:{place} (key 00000000{place})" in captured.err


def test_one_bad_sample_more_than_allowed_is_an_error(tmp_path, capsys):
    folder = bad_shard(tmp_path / "val")
    fails(
        capsys, ["00000.tar:6", "5 so far, --max-bad 4"],
        "--val-data", folder, "--classes", "red,blue", "--max-bad", "4",
        "--templates", "plain", *MODEL,
    )  # fmt: skip


def test_a_class_list_that_is_too_short_is_told_with_both_numbers(tmp_path, capsys):
    pattern = caption_shards(tmp_path, shards=1, per_shard=3, classes=("red", "blue", "green"))
    fails(
        capsys, ["00000.tar:2", "class 2 is outside 0..1", "2 classes of --classes"],
        "--val-data", pattern, "--classes", "red,blue", "--templates", "plain", *MODEL,
    )  # fmt: skip


def test_shards_without_classes_show_what_they_hold_at_once(tmp_path, capsys):
    write_shard(tmp_path / "0.tar", [{"jpg": jpeg(0), "txt": b"x", "json": b'{"url": 1}'}] * 2)
    fails(
        capsys, ["0 of 2 samples fit", "cls", "jpg 2, txt 2, json 2", "first json: url"],
        "--val-data", str(tmp_path), "--classes", "red,blue", "--templates", "plain", *MODEL,
    )  # fmt: skip


def test_a_truncated_shard_is_found_before_the_scoring(tmp_path, capsys):
    pattern = caption_shards(tmp_path, shards=2, per_shard=2)
    path = tmp_path / "00001.tar"
    path.write_bytes(path.read_bytes()[:4000])
    fails(
        capsys, ["00001.tar is truncated or damaged"],
        "--val-data", pattern, "--classes", "red,blue", "--templates", "plain", *MODEL,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--val-data", "{dir}/{{0..3}}.tar"], ["--val-data", "0 existing shards", "Quote"]),
        (["--classes", "no/such.txt"], ["no/such.txt does not exist"]),
        (["--templates", "openia"], ["openia", "openai, simple, plain"]),
        (["--batch-size", "0"], ["--batch-size 0 is below 1"]),
        (["--max-bad", "-1"], ["--max-bad -1 is below 0"]),
        (["--limit", "0"], ["--limit 0 is below 1"]),
        (["--output", "{dir}/file"], ["--output", "is a file"]),
        (["--model", "LaSt-ViT-nan"], ["LaSt-ViT-nano"]),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, flags, words):
    pattern = caption_shards(tmp_path / "val", shards=1, per_shard=2)
    (tmp_path / "file").write_text("x")
    base = ["--val-data", pattern, "--classes", "red,blue", *MODEL]
    fails(capsys, words, *base, *(flag.format(dir=tmp_path) for flag in flags))


def test_a_model_without_weights_asks_for_them(tmp_path, capsys):
    pattern = caption_shards(tmp_path, shards=1, per_shard=2)
    fails(
        capsys, ["has no weights", "--pretrained", "--random-weights"],
        "--val-data", pattern, "--classes", "red,blue", "--model", "LaSt-ViT-nano",
    )  # fmt: skip


# --- the stream ----------------------------------------------------------------------------------


def sample(place: int, **parts: bytes) -> Sample:
    return Sample(f"k{place}", parts, Path("a.tar"), place)


@pytest.mark.parametrize("workers", [1, 4])
def test_samples_keep_their_order_in_threads_and_bad_ones_drop_out(workers):
    def prepare(one: Sample) -> int:
        if one.ordinal % 3 == 1:
            raise BadSample("third", "its place")
        return one.ordinal

    tally = Tally(max_bad=100)
    stream = (sample(i) for i in range(20))
    kept = list(prepare_all(stream, prepare, tally, workers, chunk=7))
    assert kept == [i for i in range(20) if i % 3 != 1]
    assert tally.skipped == {"third": 7}


def test_an_error_of_another_kind_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        list(prepare_all([sample(0)], lambda one: 1 // one.ordinal, Tally(9)))


def test_batches_hold_everything_once():
    assert list(batches(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batches([], 3)) == []


def test_grey_palette_and_transparent_pictures_become_rgb():
    grey = picture_of(sample(0, png=png(np.full((4, 5), 7, np.uint8))))
    assert (grey.mode, grey.size, grey.getpixel((0, 0))) == ("RGB", (5, 4), (7, 7, 7))
    clear = picture_of(sample(0, png=png(np.full((4, 5, 4), 9, np.uint8))))
    assert clear.mode == "RGB"


@pytest.mark.parametrize("content", [b"", b"not a picture", jpeg(1)[:200], b"\x89PNG\r\n\x1a\n"])
def test_what_does_not_decode_is_a_bad_sample(content):
    with pytest.raises(BadSample) as caught:
        picture_of(sample(0, jpg=content))
    assert caught.value.reason == "undecodable"


def test_the_class_limit_is_the_number_of_classes():
    assert class_of(sample(0, cls=b"4"), 5) == 4
    with pytest.raises(BadSample, match=r"class 5 is outside 0\.\.4"):
        class_of(sample(0, cls=b"5"), 5)


# --- class files in json -------------------------------------------------------------------------


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_json_classes_go_by_their_index_and_use_the_name_only(tmp_path):
    rows = [{"index": 1, "name": "bee", "synonyms": ["bee", "wasp"]}, {"index": 0, "name": "a, b"}]
    classes = read_classes(write(tmp_path / "classes.json", {"source": "x", "classes": rows}))
    assert classes.names == ("a, b", "bee")
    assert classes.queries == classes.names
    assert classes.query_class == (0, 1)
    assert read_classes(write(tmp_path / "list.json", ["a, b", "bee"])) == classes
    assert read_classes(write(tmp_path / "rows.json", rows)) == classes


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([{"index": 0, "name": "a"}, {"index": 2, "name": "b"}], r"index 1 is missing of 0\.\.1"),
        ([{"index": 0, "name": "a"}, {"index": 0, "name": "b"}], "index 0 stands twice"),
        ([{"index": 0}], "entry 0 lacks a name"),
        ([["a"]], "entry 0 lacks a name"),
        ({"a": [], "b": []}, "needs one list"),
        ({"cat": 0}, "needs one list"),
        ("cat", "needs one list"),
        ([], "empty"),
    ],
)
def test_json_of_another_form_is_refused(tmp_path, value, words):
    with pytest.raises(UserError, match=words):
        read_classes(write(tmp_path / "classes.json", value))


def test_missing_and_broken_json_is_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_classes("classes.json")
    (tmp_path / "x.json").write_text("[")
    with pytest.raises(UserError, match="not readable as JSON"):
        read_classes(tmp_path / "x.json")


@pytest.mark.data
def test_real_pictures_are_classified(shared_data, tmp_path, capsys):
    folder = shared_data / "tiny-imagenet"
    argv = ["--val-data", f"{folder}/val/{{00000..00001}}.tar.gz",
            "--classes", f"{folder}/classes.json", "--templates", "plain", "--limit", "48",
            "--output", str(tmp_path), *MODEL]  # fmt: skip
    assert main(argv) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["n"], result["chance"], result["skipped"]) == (48, 0.005, {})
    assert result["classes"]["n"] == 200
