"""The table: what stands in which cell, what is kept apart, and what is named."""

import json

import pandas as pd
import pytest

from eval import table
from eval.layout import arrange, markdown, retention
from eval.runs import CLASSIFICATION, RETRIEVAL, SEGMENTATION, collect, frame, pooling_words
from tests.toy_results import OPENAI, RANDOM, SAVED, bench, cls, put, seg


def tables(text: str) -> list[list[dict[str, str]]]:
    """Parse the Markdown tables of a text."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif rows:
            found.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
            rows = []
    return found


def made(tmp_path, *more):
    """Run the command over everything below tmp_path/in; returns the text and the csv."""
    out = tmp_path / "out"
    assert table.main([str(tmp_path / "in"), "--output", str(out), *more]) == 0
    return (out / "table.md").read_text(), pd.read_csv(out / "table.csv", keep_default_na=False)


def refused(capsys, *words) -> str:
    assert table.main([str(word) for word in words]) == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if " | " not in line]
    assert printed.out == ""
    return line


def test_a_row_is_weights_method_pooling_and_columns_are_in_the_papers_order(tmp_path, capsys):
    seg(tmp_path / "in" / "a")
    seg(tmp_path / "in" / "b", miou=0.80412, method="sclip")
    seg(tmp_path / "in" / "c", miou=0.7, model=SAVED)
    text, _ = made(tmp_path)
    assert text in capsys.readouterr().out
    (rows,) = tables(text)
    assert [(r["weights"], r["method"], r["pooling"], r["VOC20"]) for r in rows] == [
        ("ViT-B-16-quickgelu openai", "vanilla", "token", "49.40"),
        ("ViT-B-16-quickgelu openai", "sclip", "token", "80.41"),
        ("mine", "vanilla", "last k 0.5 score paper", "70.00"),
    ]
    titles = [t for t in rows[0] if t in ("Object", "ADE", "City", "VOC20", "C59", "Stuff")]
    assert titles == ["Object", "ADE", "City", "VOC20", "C59", "Stuff"]
    assert rows[0]["ADE"] == "-"
    assert rows[0]["protocol hashes"].startswith("VOC20 ")


def test_data_sets_of_one_model_share_a_row_and_others_get_a_column_of_their_own(tmp_path):
    seg(tmp_path / "in" / "a")
    seg(tmp_path / "in" / "b", dataset="mine", miou=0.25, protocol_hash="feed")
    ((row,),) = tables(made(tmp_path)[0])
    assert (row["VOC20"], row["mine"]) == ("49.40", "25.00")
    assert row["protocol hashes"].endswith(", mine feed")


def test_another_protocol_hash_is_another_row_never_a_merged_cell(tmp_path):
    seg(tmp_path / "in" / "a", protocol_hash="1111")
    seg(tmp_path / "in" / "b", miou=0.418, protocol_hash="2222")
    text, _ = made(tmp_path)
    (rows,) = tables(text)
    assert sorted((r["VOC20"], r["protocol hashes"]) for r in rows) == [
        ("41.80", "VOC20 2222"),
        ("49.40", "VOC20 1111"),
    ]
    assert "Twice" not in text


@pytest.mark.parametrize(("other", "word"), [(0.494, "EQUAL"), (0.495, "DIFFERENT")])
def test_of_two_equal_runs_the_newest_stands_and_the_other_is_named(tmp_path, other, word):
    seg(tmp_path / "in" / "old", miou=other, end="2026-01-01T00:00:00Z")
    seg(tmp_path / "in" / "new", end="2026-01-02T00:00:00Z")
    text, csv = made(tmp_path)
    ((row,),) = tables(text)
    assert row["VOC20"] == "49.40"
    (named,) = [line for line in text.splitlines() if line.startswith("- voc20")]
    assert "old/results.json" in named
    assert word in named
    assert len(csv[csv.score == "miou"]) == 2  # the csv keeps both


def test_cut_short_and_random_ones_stand_apart_and_say_so(tmp_path):
    seg(tmp_path / "in" / "whole")
    seg(tmp_path / "in" / "cut", miou=0.9, images=8, complete=False)
    seg(tmp_path / "in" / "random", miou=0.03, model=RANDOM)
    text, csv = made(tmp_path)
    main, marked = tables(text)
    assert [row["VOC20"] for row in main] == ["49.40"]
    assert {(row["weights"], row["VOC20"]) for row in marked} == {
        ("ViT-B-16-quickgelu openai", "90.00 (8 of 1449)"),
        ("ViT-B-16-quickgelu RANDOM (seed 3)", "3.00"),
    }
    assert text.index("49.40") < text.index("## Not comparable") < text.index("90.00")
    assert set(csv[csv.complete == False].images) == {8}  # noqa: E712
    assert csv[csv.random_weights].weights.unique().tolist() == [
        "ViT-B-16-quickgelu RANDOM (seed 3)"
    ]


def test_two_weights_of_one_name_are_told_apart(tmp_path):
    seg(tmp_path / "in" / "a", model=SAVED)
    seg(tmp_path / "in" / "b", model={**SAVED, "weights_sha256": "c" * 64})
    (rows,) = tables(made(tmp_path)[0])
    assert [row["weights"] for row in rows] == [
        "mine [bbbbbbbb 224x224]",
        "mine [cccccccc 224x224]",
    ]


def test_what_the_same_weights_hold_besides_stands_beside_mIoU(tmp_path):
    seg(tmp_path / "in" / "a")
    seg(tmp_path / "in" / "b", model=SAVED, miou=0.7)
    cls(tmp_path / "in" / "c")
    cls(tmp_path / "in" / "d", top1=0.5, model=SAVED)
    bench(tmp_path / "in" / "r.json", 0.125)
    text, _ = made(tmp_path)
    (rows,) = tables(text)
    by = {row["weights"]: row for row in rows}
    assert by["ViT-B-16-quickgelu openai"]["top-1 a"] == "68.3"
    assert by["mine"]["top-1 a"] == "50.0"
    assert by["ViT-B-16-quickgelu openai"]["image R@5 b"] == "12.5"
    assert by["mine"]["image R@5 b"] == "-"
    assert "- a: in1k/val (1000 classes, prompts openai, eval.zeroshot_cls, 50000 images)" in text
    assert "text R@5" not in text  # NaN is no score


def test_a_cost_that_was_not_measured_shows_as_such(tmp_path):
    seg(tmp_path / "in" / "a")
    text, _ = made(tmp_path)
    ((row,),) = tables(text)
    assert (row["top-1"], row["R@5"]) == ("-", "-")
    assert "- top-1: not measured" in text


def test_retention_is_of_the_same_pooling_and_the_same_file_only(tmp_path):
    seg(tmp_path / "in" / "a")
    cls(tmp_path / "in" / "other-pooling", model={**OPENAI, "pooling": SAVED["pooling"]})
    cls(tmp_path / "in" / "other-file", model={**OPENAI, "weights_sha256": "d" * 64}, top1=0.1)
    ((row,),) = tables(made(tmp_path)[0])
    assert row["top-1 a"] == "-"


def test_a_result_of_clip_benchmark_itself_is_matched_by_name_and_tag(tmp_path):
    seg(tmp_path / "in" / "a")
    seg(tmp_path / "in" / "b", model=SAVED)
    bench(tmp_path / "in" / "r.json", 0.25, model=None)
    (rows,) = tables(made(tmp_path)[0])
    assert {row["weights"]: row["image R@5 a"] for row in rows} == {
        "ViT-B-16-quickgelu openai": "25.0",
        "mine": "-",
    }


def test_two_scores_of_one_classification_are_named_too(tmp_path):
    seg(tmp_path / "in" / "a")
    cls(tmp_path / "in" / "old", top1=0.1)
    cls(tmp_path / "in" / "new", end="2026-02-01T00:00:00Z")
    text, _ = made(tmp_path)
    assert tables(text)[0][0]["top-1 a"] == "68.3"
    assert "top1 68.34 of" in text
    assert "old/results.json does not (DIFFERENT)" in text


def test_a_classification_cut_short_is_a_column_that_says_so(tmp_path):
    seg(tmp_path / "in" / "a")
    cls(tmp_path / "in" / "c", limit=100)
    assert "CUT SHORT" in made(tmp_path)[0]


def test_the_csv_holds_every_score_as_a_fraction(tmp_path):
    seg(tmp_path / "in" / "a", miou=0.123456789)
    cls(tmp_path / "in" / "c")
    _, csv = made(tmp_path)
    assert csv.columns[-2:].tolist() == ["score", "value"]
    assert csv.kind.tolist() == ["segmentation"] * 3 + ["classification"] * 2
    assert float(csv.value[0]) == 0.123456789
    assert csv.protocol_hash[0]


def test_files_that_are_no_score_are_passed_over_and_named(tmp_path):
    seg(tmp_path / "in" / "a")
    put(tmp_path / "in" / "pib" / "results.json", {"pib": 0.5})
    put(tmp_path / "in" / "x" / "params.json", {"lr": 1})
    (tmp_path / "in" / "torn").mkdir()
    (tmp_path / "in" / "torn" / "results.json").write_text('{"miou": 0.')
    seg(tmp_path / "in" / "odd")
    values = json.loads((tmp_path / "in" / "odd" / "results.json").read_text())
    values["protocol"] = "sclip"
    put(tmp_path / "in" / "odd" / "results.json", values)
    text, _ = made(tmp_path)
    passed = text[text.index("## Passed over") :]
    assert all(name in passed for name in ("pib/", "torn/", "odd/"))
    assert "params.json" not in passed


def test_a_file_reached_twice_is_read_once(tmp_path):
    folder = seg(tmp_path / "in" / "a")
    found = collect([tmp_path / "in", folder, folder / "results.json"])
    assert len(found.runs) == 1


def test_scores_that_are_null_stay_empty(tmp_path):
    seg(tmp_path / "in" / "a", miou=None)
    text, csv = made(tmp_path)
    assert tables(text)[0][0]["VOC20"] == "-"
    assert csv.value[0] == ""


def test_kinds_and_long_form(tmp_path):
    seg(tmp_path / "a")
    cls(tmp_path / "b")
    bench(tmp_path / "c.json")
    found = collect([tmp_path])
    assert sorted(run.kind for run in found.runs) == [CLASSIFICATION, RETRIEVAL, SEGMENTATION]
    assert len(frame(found.runs)) == 3 + 2 + 1
    assert len(arrange(found.runs).lines) == 1
    assert retention(found.runs).cell("top-1 a", found.runs[0].weights) == "68.3"


def test_poolings_in_words_name_what_is_unusual():
    usual = {"pooling": "last", "k": 7, "score": "paper", "sigma": None, "kernel": "centred"}
    assert pooling_words(usual) == "last k 7 score paper"
    assert pooling_words({**usual, "sigma": 2.0}) == "last k 7 score paper sigma 2.0"
    assert pooling_words({"pooling": "mean", "k": 7}) == "mean"


def test_markdown_escapes_bars_and_shows_gaps():
    text = markdown(pd.DataFrame([{"a": "x|y", "b": None}, {"a": "", "b": "z"}]))
    assert text.splitlines()[2:] == ["| x\\|y | - |", "| - | z |"]


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    seg(tmp_path / "in" / "a")
    other = put(tmp_path / "p" / "results.json", {"pib": 1}) / "results.json"
    assert "no results are named" in refused(capsys)
    assert "does not exist" in refused(capsys, tmp_path / "nowhere")
    assert "no scores below" in refused(capsys, tmp_path / "empty")
    assert "holds no score" in refused(capsys, other)
    assert "--output" in refused(capsys, tmp_path / "in", "--sheet")
    assert "--paper" in refused(capsys, tmp_path / "in", "--match", "a=b")


def test_tables_that_are_there_are_left_alone(tmp_path, capsys):
    seg(tmp_path / "in" / "a")
    made(tmp_path)
    before = (tmp_path / "out" / "table.md").read_bytes()
    capsys.readouterr()
    line = refused(capsys, tmp_path / "in", "--output", tmp_path / "out")
    assert "--overwrite" in line
    assert (tmp_path / "out" / "table.md").read_bytes() == before
    made(tmp_path, "--overwrite")
