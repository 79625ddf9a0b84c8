"""Published figures: what ships, what stands beside what, and how far apart."""

import json
import re

import pandas as pd
import pytest

from eval import table
from eval.layout import COLUMNS, arrange
from eval.published import (
    GROUPS,
    compare,
    left_over,
    paper_text,
    read_acceptance,
    read_matches,
    read_published,
    read_weights,
    shipped_hash,
    why_not,
)
from eval.runs import collect
from eval.segmentation.protocol import read_task
from lazyclip.base.errors import UserError
from lazyclip.dense import METHODS
from tests.toy_results import OPENAI, RANDOM, SAVED, seg


def only(tmp_path, **how):
    """One run, and whether it stands beside the paper's row of plain CLIP B/16."""
    seg(tmp_path / "run", **how)
    (run,) = collect([tmp_path]).runs
    row = next(r for r in read_published() if r.row == "paper-clip-b16")
    return run, why_not(row, run)


def test_every_cell_has_a_source_and_a_number_and_a_column():
    rows = read_published()
    assert len({row.row for row in rows}) == len(rows) == 30
    for row in rows:
        assert row.group in GROUPS
        assert row.method in METHODS
        assert row.protocol
        assert set(row.cells) <= set(COLUMNS)
        for cell in row.cells.values():
            assert 0 < float(cell.text) < 100
            assert cell.source
    assert sum(len(row.cells) for row in rows if row.group == "paper") == 72


def test_the_target_of_plain_clip_is_the_sclip_papers_row():
    row = next(r for r in read_published() if r.row == "sclip-paper-clip-b16")
    figures = {name: cell.text for name, cell in row.cells.items()}
    assert [figures[n] for n in ("voc20", "cityscapes", "context59", "ade20k")] == [
        "49.4", "6.5", "11.1", "3.1",
    ]  # fmt: skip
    for one in read_acceptance():
        if one.method == "vanilla":
            assert one.miou == figures[one.dataset]


@pytest.mark.data
def test_table_4_is_the_papers(shared_data):
    whole = json.loads((shared_data / "paper_tables.json").read_text())["tables"]["4"]["cells"]
    columns = ("COCO-Obj.", "ADE20K", "City.", "VOC20", "Context59", "COCO-Stf.")
    names = dict(zip(columns, COLUMNS, strict=False))
    rows = {row.row: row for row in read_published()}
    words = {"CLIP": "clip", "MetaCLIP": "metaclip", "EVACLIP": "eva"}
    for cell in whole:
        model, backbone = cell["row_labels"]["model"], cell["row_labels"]["backbone"]
        size = {"ViT-B/16": "b16", "ViT-L/14": "l14"}[backbone]
        end = "-lazystrike" if "LazyStrike" in model else ""
        row = rows[f"paper-{words[model.split()[0]]}-{size}{end}"]
        assert float(row.cells[names[cell["col"]]].text) == cell["value"], cell
    assert len(whole) == 72


def test_a_result_of_the_rows_weights_method_and_protocol_stands_beside_it(tmp_path):
    run, why = only(tmp_path)
    assert why is None
    beside = [row.row for row in read_published() if why_not(row, run) is None]
    assert beside == ["paper-clip-b16", "sclip-paper-clip-b16"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"complete": False, "images": 8}, "8 of 1449 images"),
        ({"model": RANDOM}, "random weights"),
        ({"model": SAVED}, "other weights"),
        ({"model": {**OPENAI, "pretrained": ".../x/openai.pt"}}, "other weights"),
        ({"model": {**OPENAI, "name": "ViT-B-32-quickgelu"}}, "other weights"),
        ({"model": {**OPENAI, "pretrained": "metaclip_400m"}}, "other weights"),
        ({"model": {**OPENAI, "pooling": SAVED["pooling"]}}, "pooling last k 0.5 score paper"),
        ({"method": "sclip"}, "another method"),
        ({"protocol": "sclip+short=448", "protocol_hash": "1"}, "protocol sclip+short=448"),
        ({"protocol_hash": "0123"}, "protocol sclip:0123 is not the one that ships"),
        ({"protocol": "mine", "protocol_hash": "1"}, "protocol mine:1 is not the one that ships"),
    ],
)
def test_whatever_differs_keeps_a_result_away_and_is_said(tmp_path, how, reason):
    assert only(tmp_path, **how)[1] == reason


def test_changed_protocols_have_the_hash_that_the_name_says():
    assert shipped_hash("voc20", "sclip") == read_task("voc20", "sclip").protocol.hash
    changed = read_task("voc20", "sclip", overrides={"short": 448}).protocol
    assert shipped_hash("voc20", changed.name) == changed.hash
    assert shipped_hash("voc20", "sclip+nonsense=1") is None
    assert shipped_hash("nothing", "sclip") is None


def test_every_protocol_that_a_row_accepts_ships():
    for row in read_published():
        for entry in row.accepts:
            one, _, name = entry.rpartition(":")
            if name not in ("*", "none"):
                for dataset in [one] if one else row.cells:
                    assert shipped_hash(dataset, name), (row.row, entry)


def test_every_tag_of_a_row_is_known_to_open_clip():
    import open_clip

    for row in read_published():
        for model in row.models:
            tags = open_clip.list_pretrained_tags_by_model(model)
            assert set(row.tags) & set(tags), (row.row, model)
    for known in read_weights():
        assert known.tag in open_clip.list_pretrained_tags_by_model(known.model)
        assert re.fullmatch(r"([0-9a-f]{8}|[0-9a-f]{64}|)", known.sha256)
        assert bool(known.sha256) == bool(known.sha256_source) == bool(known.file)
        assert bool(known.top1) == bool(known.top1_source)


def test_distance_is_ours_minus_theirs_in_points_and_what_is_missing_stays_empty(tmp_path):
    seg(tmp_path / "a", miou=0.48765)
    layout = arrange(collect([tmp_path]).runs)
    long = compare(layout, {})
    held = long[(long.row == "paper-clip-b16")].set_index("dataset")
    assert held.loc["voc20", ["theirs", "ours", "distance", "status"]].tolist() == [
        "49.0", 48.77, -0.23, "scored",
    ]  # fmt: skip
    assert held.loc["ade20k", "status"] == "missing"
    assert pd.isna(held.loc["ade20k", "ours"])
    assert pd.isna(held.loc["ade20k", "distance"])
    assert (long.groupby("row").size() == long.groupby("row").dataset.nunique()).all()
    text = paper_text(layout, {})
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "`paper-clip-b16`" in line)
    assert "49.0 [1]" in lines[at]
    assert "ours (5 of 6 missing)" in lines[at + 1]
    assert "| 48.77 |" in lines[at + 1]
    assert "| -0.23 |" in lines[at + 2]
    assert "[1] LaSt-ViT paper, Table 4" in text


def test_two_of_ours_beside_one_row_are_two_lines(tmp_path):
    seg(tmp_path / "a")
    seg(tmp_path / "b", model={**OPENAI, "name": "ViT-B-16", "weights_sha256": "f" * 64})
    layout = arrange(collect([tmp_path]).runs)
    held = compare(layout, {}).query("row == 'paper-clip-b16' and dataset == 'voc20'")
    assert sorted(held.our_weights) == ["ViT-B-16 openai", "ViT-B-16-quickgelu openai"]


def test_fine_tuned_weights_stand_beside_a_row_when_told_so(tmp_path):
    folder = seg(tmp_path / "mine", miou=0.7, model=SAVED)
    runs = collect([tmp_path]).runs
    layout = arrange(runs)
    assert "other weights" in "\n".join(left_over(layout, {}))
    matches = read_matches([f"paper-clip-b16-lazystrike={folder}"], runs)
    held = compare(layout, matches).query("row == 'paper-clip-b16-lazystrike'")
    assert held.set_index("dataset").distance["voc20"] == pytest.approx(-5.0)
    assert left_over(layout, matches) == []


def test_a_match_of_a_result_cut_short_is_marked(tmp_path):
    folder = seg(tmp_path / "a", model=SAVED, complete=False, images=8)
    runs = collect([tmp_path]).runs
    text = paper_text(arrange(runs), read_matches([f"paper-clip-b16={folder}"], runs))
    assert "49.40 (not comparable)" in text


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("paper-clip-b17=x", "unknown row of --match 'paper-clip-b17'; nearest: paper-clip-b16"),
        ("paper-clip-b16=nowhere", "no result that was read lies below 'nowhere'"),
        ("paper-clip-b16", "no result that was read lies below ''"),
    ],
)
def test_a_wrong_match_is_one_line(tmp_path, pair, said):
    seg(tmp_path / "a")
    with pytest.raises(UserError, match=re.escape(said)):
        read_matches([pair], collect([tmp_path]).runs)


def test_the_command_writes_both_forms_and_names_the_left_over(tmp_path, capsys):
    seg(tmp_path / "in" / "a")
    seg(tmp_path / "in" / "b", model=SAVED)
    words = [str(tmp_path / "in"), "--paper", "--output", str(tmp_path / "out")]
    assert table.main(words) == 0
    text = (tmp_path / "out" / "paper.md").read_text()
    assert text in capsys.readouterr().out
    assert "A distance, not a pass mark" in text.replace("\n", " ")
    assert "- voc20, mine, vanilla, pooling last k 0.5 score paper, sclip: 49.40" in text
    csv = pd.read_csv(tmp_path / "out" / "paper.csv")
    assert csv.source.notna().all()
    assert len(csv) == sum(len(row.cells) for row in read_published())


@pytest.mark.parametrize(
    ("dataset", "protocol", "stands"),
    [
        ("voc20", "clearclip", True),
        ("voc21", "clearclip", False),  # its threshold is not the one of the published figure
        ("voc21", "clearclip+threshold=0.2", True),
        ("context60", "clearclip", False),
    ],
)
def test_a_row_may_ask_for_another_threshold_on_one_data_set(tmp_path, dataset, protocol, stands):
    name, _, change = protocol.partition("+")
    overrides = dict([change.split("=")]) if change else None
    task = read_task(dataset, name, overrides=overrides)
    seg(tmp_path / "run", dataset, protocol=task.protocol.name, protocol_hash=task.protocol.hash)
    (run,) = collect([tmp_path]).runs
    row = next(r for r in read_published() if r.row == "clearclip-clip-b16")
    assert (why_not(row, run) is None) is stands
