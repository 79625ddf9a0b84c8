"""The demo around its world: commands, figures, sentences, pictures, and the page itself."""

import csv
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from demo import commands, draw, examples, jobs, look, page, run, table
from demo.jobs import Job, JobError, run_jobs
from demo.table import CENTRE, CHANCE, COLUMNS, HALF, LAST, MAJORITY, TOKEN, UNTRAINED, Figure
from demo.world import Sizes, make_world, palette
from eval import zeroshot_seg
from lazyclip.base.errors import UserError
from training import params

SIZES = Sizes(train=8, decorrelated=6, correlated=4, two=6)
GOOD = {
    TOKEN: {"top1": 0.978, "top1_own": 0.999, "pib": 0.49, "pib_text": 0.52,
            "miou_one": 0.115, "miou_two": 0.05, "auroc": 0.2},
    LAST: {"top1": 0.967, "top1_own": 0.998, "pib": 0.55, "pib_text": 0.88,
           "miou_one": 0.751, "miou_two": 0.40, "auroc": 0.6, "votes": 0.35},
    UNTRAINED[TOKEN]: {"top1": 0.07, "pib": 0.41},
    UNTRAINED[LAST]: {"top1": 0.08, "pib": 0.27},
    table.painted(TOKEN): {"miou_one": 0.95, "miou_two": 0.25},
    table.painted(LAST): {"miou_one": 0.94, "miou_two": 0.27},
    CHANCE: {"top1": 1 / 12, "pib": 0.215, "pib_text": 0.215, "miou_two": 0.043},
    MAJORITY: {"top1": 0.09},
    CENTRE: {"pib": 0.61},
}  # fmt: skip


def figures_of(rows, **changed):
    merged = {name: dict(values) for name, values in rows.items()}
    for where, value in changed.items():
        row, column = where.split("__")
        merged[{"token": TOKEN, "last": LAST}[row]][column] = value
    return [
        Figure(row, column, value, f"python -m some.command --row '{row}'")
        for row, values in merged.items()
        for column, value in values.items()
    ]


# --- sentences and tables -----------------------------------------------------------------------


def test_three_sentences_say_what_good_figures_show():
    said = table.sentences(figures_of(GOOD))
    assert len(said) == 3
    assert "tells them apart" in said[0]
    assert "40.00 %" in said[0]
    assert "5.00 %" in said[0]
    assert "8.0 times" in said[0]
    assert "more often" in said[1]
    assert "says nothing here" in said[1]
    assert "about as good" in said[2]
    assert "worth 3.1 and 2.1 points" in said[2]


def test_sentences_admit_when_last_is_not_above_painting():
    said = table.sentences(figures_of(GOOD, last__miou_two=0.2))
    assert "not above painting" in said[0]
    assert "tells them apart" not in said[0]


def test_sentences_admit_when_last_loses():
    said = table.sentences(
        figures_of(GOOD, last__miou_two=0.04, last__pib_text=0.3, last__pib=0.2, last__top1=0.8)
    )
    assert "did not beat the CLS token" in said[0]
    assert "times as much" not in said[0]
    assert "no more often" in said[1]
    assert "in favour of CLS" in said[1]
    assert "worse with LaSt" in said[2]


def test_nothing_is_concluded_from_a_model_that_did_not_learn():
    said = table.sentences(figures_of(GOOD, token__top1=0.3))
    assert len(said) == 1
    assert said[0].startswith("No conclusion: token reached")


@pytest.mark.parametrize(
    ("auroc", "words"), [(0.02, "turns the maps round"), (0.7, "does not turn")]
)
def test_half_of_the_patches_gets_a_sentence_by_its_auroc(auroc, words):
    rows = {**GOOD, HALF: {"auroc": auroc, "miou_two": 0.041, "top1": 0.96}}
    said = table.sentences(figures_of(rows))
    assert len(said) == 4
    assert words in said[3]
    assert f"{auroc:.2f}" in said[3]


def test_the_text_table_shows_per_cent_and_a_dash_where_nothing_is():
    lines = table.text_table(figures_of(GOOD)).splitlines()
    assert lines[0].split() == " ".join(c.heading for c in COLUMNS).split()
    token = next(line for line in lines if line.startswith("token "))
    assert token.split()[1:] == ["97.8", "99.9", "49.0", "52.0", "11.50", "5.00", "0.20", "-"]
    assert len({len(line) for line in lines}) == 1


def test_the_csv_holds_each_figure_with_its_command(tmp_path):
    figures = [*figures_of(GOOD), Figure(LAST, "votes", None, "python -m x")]
    table.write_csv(tmp_path / "table.csv", figures)
    with (tmp_path / "table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(figures)
    assert rows[0] == {
        "row": TOKEN, "score": "top1", "value": "0.978",
        "command": "python -m some.command --row 'token'",
    }  # fmt: skip
    assert rows[-1]["value"] == ""


# --- measures -----------------------------------------------------------------------------------


def test_auroc_of_known_orders():
    scores = np.array([0.1, 0.2, 0.3, 0.4])
    assert look.auroc(scores, np.array([False, False, True, True])) == 1
    assert look.auroc(scores, np.array([True, False, True, False])) == 0.25
    assert look.auroc(np.ones(4), np.array([True, False, False, False])) == 0.5
    assert look.auroc(scores, np.zeros(4, bool)) is None


def test_painted_pictures_are_scored_by_the_classes_they_are_filled_with():
    labels = np.full((2, 4, 4), 255)
    labels[0, :2, :2] = 0
    labels[1, 0, 0], labels[1, 3, 3] = 1, 0
    # 0: four right, one missed; 1: one right, one too many.
    assert look.painted_miou(labels, np.array([0, 1]), 3) == pytest.approx((4 / 5 + 1 / 2) / 2)


def test_the_guess_of_twelve_even_classes_is_one_in_23():
    labels = np.arange(12).repeat(10).reshape(1, 12, 10)
    assert look.guess_miou(labels, 12) == pytest.approx(1 / 23)


def test_object_share_counts_labelled_pixels_of_each_patch():
    labels = np.full((1, 4, 4), 255)
    labels[0, :2, 0], labels[0, 3, 3] = 5, 5
    assert look.object_share(labels, (2, 2)).tolist() == [[[0.5, 0], [0, 0.25]]]


def test_object_classes_are_listed_from_left_to_right():
    label = np.full((8, 8), 255)
    label[0, 6], label[7, 1] = 3, 9
    assert look._object_classes(label) == [9, 3]


# --- drawing ------------------------------------------------------------------------------------


def test_the_colour_map_grows_lighter_throughout_and_clips():
    colours = draw.colour_map(np.linspace(0, 1, 101), 0, 1).astype(float)
    lightness = colours @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > 0).all()
    ends = draw.colour_map(np.array([-5.0, 5.0]), 0, 1)
    assert ends.tolist() == [list(draw.ANCHORS[0]), list(draw.ANCHORS[-1])]


def test_a_chart_labels_each_line_and_leaves_empty_ones_out():
    svg = draw.line_chart(
        [("a & b", [0, 10], [1.0, 2.0]), ("absent", [], [])], title="t", x_title="x", y_title="y"
    )
    assert svg.count("<polyline") == 1
    assert "a &amp; b" in svg
    assert "absent" not in svg
    assert "<polyline" not in draw.line_chart([], title="t", x_title="x", y_title="y")


# --- commands -----------------------------------------------------------------------------------


def job(tmp_path, title, code):
    return Job(title, "timeit", ("-n", "1", "-r", "1", code), tmp_path / f"{title}.log")


def test_jobs_run_and_report(tmp_path):
    said = []
    seconds = run_jobs(
        [job(tmp_path, name, f"print('hello {name}')") for name in ("a", "b", "c")], said.append
    )
    assert set(seconds) == {"a", "b", "c"}
    assert "hello b" in (tmp_path / "b.log").read_text()
    assert len(said) == 3


def test_a_failing_job_shows_its_last_lines_and_stops_the_others(tmp_path):
    slow = job(tmp_path, "slow", "import time; time.sleep(60)")
    bad = job(tmp_path, "bad", "print('one'); raise ValueError('that went wrong')")
    never = job(tmp_path, "never", "print('no')")
    with pytest.raises(JobError, match=r"(?s)bad failed with exit code 1.*that went wrong"):
        run_jobs([slow, bad, never], lambda _: None)
    assert not (tmp_path / "never.log").exists()


def test_steps_of_a_training_are_shown_from_its_metrics(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 20, "train/loss": 3.5}\n{"step": 40, "train/lo')
    assert jobs.last_metrics(file)["step"] == 20
    assert jobs.last_metrics(tmp_path / "none") == {}


def test_the_demo_deletes_its_own_folder_only(tmp_path):
    folder = tmp_path / "demo"
    run.prepare_folder(folder)
    (folder / "old.txt").write_text("x")
    run.prepare_folder(folder)
    assert not (folder / "old.txt").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not made by the demo"):
        run.prepare_folder(foreign)
    assert (foreign / "thesis.txt").exists()
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    with pytest.raises(UserError, match="no plain folder"):
        run.prepare_folder(link)
    assert folder.exists()


def test_a_foreign_folder_ends_the_demo_with_code_2(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("x")
    assert run.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_trainings_differ_in_pooling_and_name_alone():
    places = commands.Places(run.OUTPUT)
    words = [
        commands.training_job(arm, places, 0, Sizes()).words
        for arm in (*commands.ARMS, *commands.EXTRA)
    ]
    settings = [params.parse(list(w)).args for w in words]
    assert {s.last_pooling for s in settings} == {"token", "last", "mean", "max"}
    assert {s.last_k for s in settings} == {None, "1", "8", "32"}
    same = [
        {k: v for k, v in vars(s).items() if k not in ("last_pooling", "last_k", "name")}
        for s in settings
    ]
    assert all(s == same[0] for s in same)
    assert same[0]["epochs"] * same[0]["train_num_samples"] == 12800
    assert same[0]["train_data"] == "out/demo/world/train/{00000..00007}.tar"


def test_figures_come_from_the_results_of_the_arms_own_commands(tmp_path):
    places, arms = commands.Places(tmp_path), (*commands.ARMS, *commands.BLANK)
    made = {arm.name: commands.scoring_jobs(arm, places, 0) for arm in arms}
    for index, arm in enumerate(arms):
        for kind in arm.kinds:
            measured = {"painted": 0.3, "guess": 0.04, "auroc": 0.6, "votes": None}
            content = {
                "top1": index / 10, "pib": index / 10, "miou": index / 10, "chance": 0.2,
                "centre": 0.6, "one": {**measured, "object_patches": 0.1}, "two": measured,
            }  # fmt: skip
            folder = places.results(arm, kind)
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps(content))
    figures = commands.collect(arms, places, made, 0.09)
    rows = table.pivot(figures)
    assert rows[LAST]["top1"] == 0.1
    assert rows[UNTRAINED[LAST]]["pib"] == 0.3
    assert rows[UNTRAINED[LAST]]["miou_two"] == 0.2  # the other's: the same patches
    assert "top1_own" not in rows[UNTRAINED[LAST]]
    assert rows[MAJORITY] == {"top1": 0.09}
    assert rows[CENTRE]["pib"] == 0.6
    assert rows[table.painted(LAST)] == {"miou_one": 0.3, "miou_two": 0.3}
    own = next(f for f in figures if (f.row, f.column) == (LAST, "pib"))
    assert own.command == made["last"]["pib"].command
    assert all(f.command for f in figures)


def test_scoring_commands_name_the_arm_or_random_weights():
    places = commands.Places(run.OUTPUT)
    trained = commands.scoring_jobs(commands.ARMS[1], places, 4)
    assert set(trained) == {kind for kind, _ in commands.SOURCES.values()}
    assert "--model out/demo/logs/last/model" in trained["cls"].command
    last = commands.scoring_jobs(commands.BLANK[1], places, 4)["pib"]
    assert "--random-weights --seed 4 --last-pooling last --last-k 1" in last.command
    blank = commands.scoring_jobs(commands.BLANK[0], places, 4)["seg-two"]
    args = zeroshot_seg.make_parser().parse_args(list(blank.words))
    assert str(args.save_predictions) == "out/demo/results/untrained-token/seg-two/masks"
    outputs = [j.words[-1] for arm in (*commands.ARMS, *commands.BLANK)
               for j in commands.scoring_jobs(arm, places, 0).values()]  # fmt: skip
    assert len(set(outputs)) == len(outputs)


# --- the page -----------------------------------------------------------------------------------


def fabricate(folder, arms, figures):
    """Write what a run leaves, with random maps and masks."""
    make_world(folder / "world", 0, SIZES)
    rng = np.random.default_rng(0)
    for arm in arms:
        results = folder / "results" / arm.name
        for kind, count in (("one", 1), ("two", 2)):
            ids = [f"{i:06d}" for i in range(6)]
            masks = results / f"seg-{kind}" / "masks"
            masks.mkdir(parents=True)
            for name in ids:
                ids_map = rng.integers(12, size=(64, 64)).astype(np.uint8)
                Image.fromarray(ids_map).save(masks / f"{name}.png")
            arrays = {
                "ids": np.array(ids),
                "own": rng.random((6, 8, 8)),
                "text": rng.random((6, count, 8, 8)),
                "classes": rng.integers(12, size=(6, count)),
            }
            if arm.name != "token":
                arrays["votes"] = rng.random((6, 8, 8))
            (results / "look").mkdir(exist_ok=True)
            np.savez(results / "look" / f"{kind}.npz", **arrays)
        logs = folder / "logs" / arm.name
        logs.mkdir(parents=True)
        lines = [{"step": 1, "samples": 128, "train/loss": 5.0},
                 {"step": 9, "samples": 900, "train/loss": 4.0},
                 {"step": 9, "samples": 900, "probe/top1": 0.5}]  # fmt: skip
        (logs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {
        "seed": 7,
        "arms": [{"name": a.name, "label": a.label, "trained": True} for a in arms],
        "figures": [vars(f) for f in figures],
        "training": {a.name: f"python -m training.main --name {a.name}" for a in arms},
        "seconds": {"total": 12.0},
        "record": {
            "command": "python -m demo.run --seed 7", "config_hash": "0123456789ab",
            "git": {"commit": "abc", "dirty": True}, "start": "2026-01-01T00:00:00Z",
            "versions": {"torch": "2.0", "python": "3.11", "timm": None},
        },
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    fabricate(folder, commands.ARMS, figures_of(GOOD))
    return page.write_page(folder).read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(report):
    sources = re.findall(r'(?:src|href)="([^"]*)', report)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script|@import|url\(", report)


def test_the_page_shows_every_row_sentence_and_command(report):
    for figure in figures_of(GOOD):
        assert figure.row in report
    for text in table.sentences(figures_of(GOOD)):
        assert text.replace("'", "&#x27;") in report
    assert "python -m training.main --name last" in report
    for text in ("seed 7", "0123456789ab", "abc with changes", "torch 2.0", "12 s in all"):
        assert text in report


def test_the_page_shows_six_pictures_of_two_things_and_four_of_one(report):
    rows = re.findall(r"<tr>(<td><img.*?)</tr>", report)
    # picture, truth; token: score, texts, masks; last: also votes
    assert [row.count("<img") for row in rows] == [2 + 4 + 5] * 6 + [2 + 3 + 4] * 4
    assert report.count("<polyline") == 4


def test_the_page_admits_its_limits(report):
    for words in ("one seed", "not the\npaper's K", "12 points", "not chosen ones"):
        assert words in report


def test_more_arms_are_shown_below_with_their_sentence(tmp_path):
    arms = (*commands.ARMS, commands.EXTRA[1])
    rows = {**GOOD, HALF: {"auroc": 0.01, "miou_two": 0.04, "top1": 0.96}}
    fabricate(tmp_path, arms, figures_of(rows))
    text = page.write_page(tmp_path).read_text(encoding="utf-8")
    assert "Other ways of gathering" in text
    assert "turns the maps round" in text
    assert text.count(f'colspan="5">{HALF}') == 1


def test_maps_of_all_models_share_one_range_and_masks_the_palette(tmp_path):
    fabricate(tmp_path, commands.ARMS, figures_of(GOOD))
    for name, value in (("token", 0.2), ("last", 0.8)):
        file = tmp_path / "results" / name / "look" / "two.npz"
        with np.load(file) as stored:
            arrays = dict(stored)
        arrays["own"] = np.full((6, 8, 8), value)
        np.savez(file, **arrays)
    masks = tmp_path / "results" / "last" / "seg-two" / "masks"
    Image.fromarray(np.full((64, 64), 3, np.uint8)).save(masks / "000000.png")
    text = examples.examples(
        tmp_path, [examples.Shown(a.name, a.label) for a in commands.ARMS], "two", 1
    )
    assert "patch score 0.20 to 0.80" in text
    low, high = (draw.colour_map(np.full((8, 8), v), 0.2, 0.8) for v in (0.2, 0.8))
    assert draw.png_uri(low) in text
    assert draw.png_uri(high) in text
    stored = tmp_path / "world" / "seg" / "VOCdevkit" / "Toy" / "SegmentationClass" / "000000.png"
    with Image.open(stored) as opened:
        on_object = np.asarray(opened) > 0
    colour = np.array(palette()[12:15])  # class 3 is palette entry 4
    shown = np.where(on_object[..., None], colour, 255 - (255 - colour) // 4)  # the ground is pale
    assert draw.png_uri(shown.astype(np.uint8)) in text


def test_a_job_is_shown_as_it_would_be_typed(tmp_path):
    shown = Job("t", "training.main", ("--train-data", "a/{00..01}.tar"), tmp_path / "x").command
    assert shown == "python -m training.main --train-data 'a/{00..01}.tar'"
    assert sys.executable not in shown
