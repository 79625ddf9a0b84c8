"""Mixing start and tuned weights: the arithmetic, the curve, resuming, and what is refused."""

import csv
import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from eval import interpolate, interpolated, zeroshot_cls, zeroshot_seg
from eval.curve import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, draw
from eval.endpoints import find_tuned, other_start, split_start
from eval.mixing import check_pair, mix, parse_alphas
from eval.runs import CLASSIFICATION, SEGMENTATION, collect
from lazyclip.base.errors import UserError
from lazyclip.export import save_model
from lazyclip.factory import build
from lazyclip.weights import file_sha256
from tests.toy import caption_shards
from tests.toy_models import NATIVE, make
from tests.toy_voc import make_protocol, make_voc

LAST = f"LaSt-{NATIVE}"
CLASSES = "red, blue, green"
WEIGHTS = "open_clip_model.safetensors"


def save(folder: Path, name: str, seed: int, **how) -> Path:
    """Save a model with seeded weights of which none is trivial."""
    built = build(name, **how)
    built.model.load_state_dict(make(NATIVE, seed=seed).state_dict())
    record = {"model": {"name": name}}
    save_model(built.model, built.info, folder, record)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two models, shards of three classes, and a segmentation set."""
    root = tmp_path_factory.mktemp("pair")
    save(root / "start", NATIVE, 0)
    save(root / "tuned", LAST, 1, last={"pooling": "last", "k": 2})
    caption_shards(root / "val", shards=1, per_shard=24, classes=CLASSES.split(", "))
    make_voc(root / "data")
    make_protocol(root, short=32, window=32, stride=16)
    return root


def words(world: Path, output: Path, *more: str, dense: bool = True, top: bool = True) -> list[str]:
    pair = ["--start", str(world / "start"), "--tuned", str(world / "tuned")]
    shards = ["--val-data", str(world / "val"), "--classes", CLASSES, "--templates", "plain"]
    seg = ["--dataset", str(world / "toy.yaml"), "--data-root", str(world / "data")]
    return [*pair, "--output", str(output), "--device", "cpu", "--threads", "1",
            *(shards if top else []), *(seg if dense else []), *more]  # fmt: skip


def refused(capsys, argv: list[str]) -> str:
    assert interpolate.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.strip().splitlines()[-1]


def rows_of(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "curve.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("done") / "out"
    assert interpolate.main(words(world, output, "--alphas", "0,0.5,1")) == 0
    return output


# --- arithmetic -----------------------------------------------------------------------------------


def states(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 4, generator=draw),
        "scale": torch.randn((), generator=draw),
        "half": torch.randn(5, generator=draw).bfloat16(),
        "count": torch.tensor(7),
    }


@given(alpha=st.floats(0, 1), seed=st.integers(0, 9))
def test_a_mixture_is_the_weighted_sum_of_every_parameter(alpha, seed):
    start, tuned = states(seed), states(seed + 100)
    mixed = mix(start, tuned, alpha)
    assert list(mixed) == list(tuned)
    for name in ("a", "scale"):
        expected = (1 - alpha) * start[name].numpy().astype(np.float64)
        expected = expected + alpha * tuned[name].numpy().astype(np.float64)
        assert np.array_equal(mixed[name].numpy(), expected.astype(np.float32))
    assert mixed["half"].dtype == torch.bfloat16
    assert mixed["count"] == 7


def test_both_ends_are_the_given_weights_bit_for_bit():
    odd = torch.tensor([0.0, -0.0, math.inf, 1e-45, -3.5])
    start, tuned = {"w": odd}, {"w": odd.flip(0)}
    for alpha, end in ((0, start), (1, tuned)):
        mixed = mix(start, tuned, alpha)["w"]
        assert mixed.view(torch.int32).tolist() == end["w"].view(torch.int32).tolist()
        assert mixed.data_ptr() != end["w"].data_ptr()


def test_the_logit_scale_is_mixed_as_a_logarithm():
    start, tuned = ({"logit_scale": torch.tensor(math.log(v))} for v in (10.0, 1000.0))
    assert mix(start, tuned, 0.5)["logit_scale"].exp().item() == pytest.approx(100, rel=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_no_mixture_lies_outside(alpha):
    with pytest.raises(ValueError, match="outside"):
        mix({}, {}, alpha)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0,0.5,1", (0, 0.5, 1)), ("1, 0", (0, 1)), ("0.3", (0.3,)),
     ("0,0.1,...,1", tuple(n / 10 for n in range(11))),
     ("0,0.25,…,1", (0, 0.25, 0.5, 0.75, 1)), ("0,0.4,0.5,...,0.8", (0, 0.4, 0.5, 0.6, 0.7, 0.8))],
)  # fmt: skip
def test_shares_are_a_list_or_go_on_in_steps(text, expected):
    assert parse_alphas(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "word"),
    [("0,2", "'2' is no share"), ("a", "'a' is no share"), ("", "'' is no share"),
     ("nan", "no share"), ("0,0", "names 0 twice"), ("0,...,1", "stands between"),
     ("0,0.3,...,1", "the step meets"), ("0,0.1,...", "stands between"),
     ("1,0.9,...,0", "stands between"), ("0,1e-6,...,1", "stands between")],
)  # fmt: skip
def test_shares_that_do_not_read_are_refused(text, word):
    with pytest.raises(UserError, match=word):
        parse_alphas(text)


def test_weights_that_do_not_match_are_named():
    start, tuned = states(0), states(1)
    check_pair(start, tuned, ("A", "B"))
    tuned["a"] = torch.zeros(4, 3)
    start["old"] = tuned["new"] = torch.zeros(1)
    tuned["count"] = torch.tensor(8)
    with pytest.raises(UserError) as caught:
        check_pair(start, tuned, ("A", "B"))
    assert str(caught.value).startswith(
        "A and B cannot be mixed; tensors 1 only in the start: old; 1 only in the tuned: new; "
        "1 of another shape: a (3x4 and 4x3); 1 no weights, and not equal: count; "
    )


# --- the curve ------------------------------------------------------------------------------------


def test_the_ends_of_the_curve_are_what_the_models_own_commands_score(world, finished, tmp_path):
    by_hand = {}
    for name, model in (
        ("1", ["--model", str(world / "tuned")]),
        ("0", ["--model", LAST, "--pretrained", str(world / "start"), "--last-pooling", "last",
               "--last-k", "2"]),
        ("own", ["--model", str(world / "start")]),
    ):  # fmt: skip
        shards = ["--val-data", str(world / "val"), "--classes", CLASSES, "--templates", "plain"]
        seg = ["--dataset", str(world / "toy.yaml"), "--data-root", str(world / "data")]
        out = tmp_path / name
        assert zeroshot_cls.main([*shards, *model, "--output", str(out / "cls")]) == 0
        assert zeroshot_seg.main([*seg, *model, "--output", str(out / "seg")]) == 0
        read = [json.loads((out / kind / "results.json").read_text()) for kind in ("cls", "seg")]
        by_hand[name] = (read[0]["top1"], read[1]["miou"])
    own, start, _, tuned = rows_of(finished)
    assert float(start["top1"]) == pytest.approx(by_hand["0"][0], abs=1e-6)
    assert float(tuned["top1"]) == pytest.approx(by_hand["1"][0], abs=1e-6)
    assert float(start["miou_toy"]) == pytest.approx(by_hand["0"][1], abs=1e-6)
    assert float(tuned["miou_toy"]) == pytest.approx(by_hand["1"][1], abs=1e-6)
    assert (own["pooling"], own["miou_toy"]) == ("token", "")
    assert float(own["top1"]) == pytest.approx(by_hand["own"][0], abs=1e-6)
    assert by_hand["0"][1] != by_hand["1"][1]


def test_a_mixture_scores_as_the_model_whose_weights_it_has(world, finished, tmp_path):
    a, b = (load_file(world / name / WEIGHTS) for name in ("start", "tuned"))
    built = build(str(world / "tuned"))
    half = {key: ((a[key].double() + b[key].double()) / 2).float() for key in a}
    built.model.load_state_dict(half)
    save_model(built.model, built.info, tmp_path / "half")
    seg = ["--dataset", str(world / "toy.yaml"), "--data-root", str(world / "data")]
    model = ["--model", str(tmp_path / "half"), "--output", str(tmp_path / "seg")]
    assert zeroshot_seg.main([*seg, *model]) == 0
    miou = json.loads((tmp_path / "seg" / "results.json").read_text())["miou"]
    assert float(rows_of(finished)[2]["miou_toy"]) == pytest.approx(miou, abs=1e-6)


def test_what_is_left_says_what_was_mixed(world, finished):
    results = json.loads((finished / "results.json").read_text())
    assert [row["alpha"] for row in results["curve"]] == [0, 0.5, 1]
    assert results["start_own_pooling"]["pooling"] == "token"
    assert results["chance"] == pytest.approx(1 / 3)
    assert results["record"]["command"].startswith("python -m eval.interpolate --start")
    assert results["start"]["name"].endswith("start")
    assert len({results["start"]["sha256"], results["tuned"]["sha256"]}) == 2
    dense = json.loads((finished / "alpha-0.5" / "toy" / "results.json").read_text())
    assert dense["model"]["pretrained"].startswith("mix 0.5 of ")
    assert dense["record"]["command"].startswith("python -m eval.interpolate")
    hashes = {
        json.loads((finished / f"alpha-{a}" / "toy" / "results.json").read_text())["model"][
            "weights_sha256"
        ]
        for a in ("0", "0.5", "1")
    }
    assert len(hashes) == 3
    with Image.open(finished / "curve.png") as picture:
        assert picture.size == (WIDTH, HEIGHT)


def test_the_table_finds_both_scores_and_tells_the_mixtures_apart(finished):
    runs = collect([finished]).runs
    dense = {run.weights.key: run.weights.label for run in runs if run.kind == SEGMENTATION}
    top = {run.weights.key: run.scores["top1"] for run in runs if run.kind == CLASSIFICATION}
    assert len(dense) == len(set(dense.values())) == 3
    assert any("mix 0.5 of" in label for label in dense.values())
    assert len(top) == 4  # the start's own pooling too
    assert set(dense) < set(top)
    rows = [float(row["top1"]) for row in rows_of(finished)]
    assert sorted(top.values()) == pytest.approx(sorted(rows), abs=1e-6)


def test_a_pooling_by_flag_holds_for_every_mixture(world, tmp_path):
    argv = words(world, tmp_path / "out", "--alphas", "1", "--last-pooling", "token", dense=False)
    assert interpolate.main(argv) == 0
    assert [row["pooling"] for row in rows_of(tmp_path / "out")] == ["token"]


@pytest.mark.parametrize(("flags", "threads"), [([], 2), (["--workers", "0"], 1),
                                                (["--workers", "3"], 3)])  # fmt: skip
def test_workers_are_the_threads_that_decode_and_0_is_one(
    world, tmp_path, monkeypatch, flags, threads
):
    plain, seen = interpolate.classify, []

    def classify(how, *rest):
        seen.append(how.workers)
        return plain(how, *rest)

    monkeypatch.setattr(interpolate, "classify", classify)
    argv = words(world, tmp_path / "out", "--alphas", "1", *flags, dense=False)
    assert interpolate.main(argv) == 0
    assert set(seen) == {threads}


def test_saved_mixtures_have_the_mixed_weights_and_the_ends_are_bit_equal(world, tmp_path, capsys):
    out = tmp_path / "out"
    argv = words(world, out, "--save", "0,0.25,1", dense=False, top=False)
    assert interpolate.main(argv) == 0
    a, b = (load_file(world / name / WEIGHTS) for name in ("start", "tuned"))
    saved = {n: load_file(out / f"model-{n}" / WEIGHTS) for n in ("0", "0.25", "1")}
    for key in a:
        assert torch.equal(saved["0"][key], a[key])
        assert torch.equal(saved["1"][key], b[key])
        expected = (0.75 * a[key].double() + 0.25 * b[key].double()).float()
        assert torch.equal(saved["0.25"][key], expected)
    again = build(str(out / "model-0.25"))
    assert again.info.pooling["k"] == 2
    assert json.loads((out / "model-0.25" / "record.json").read_text())["command"]
    assert "model-0 exists" in refused(capsys, argv)


# --- interrupted runs -----------------------------------------------------------------------------


def test_finished_shares_are_kept_and_the_others_scored(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    plain, calls = interpolate.classify, itertools.count()

    def classify(*args, **how):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args, **how)

    argv = words(world, out, "--alphas", "0,0.5,1")
    monkeypatch.setattr(interpolate, "classify", classify)
    assert interpolate.main(argv) == 130
    assert sorted(p.parent.name for p in out.rglob("scores.json")) == ["alpha-0", "alpha-start"]
    assert "cut short; go on with --resume" in refused(capsys, argv)
    done = (out / "alpha-0" / "scores.json").read_bytes()
    assert interpolate.main([*argv, "--resume"]) == 0
    assert next(calls) == 5  # own pooling, 0, the one cut off, 0.5, 1
    assert (out / "alpha-0" / "scores.json").read_bytes() == done
    assert [row["alpha"] for row in rows_of(out)] == ["0", "0", "0.5", "1"]


def test_scores_of_something_else_are_not_gone_on_with(world, finished, capsys):
    argv = words(world, finished, "--alphas", "0", "--resume", "--limit", "5")
    line = refused(capsys, argv)
    assert "holds scores of limit other than what is asked for here" in line
    assert "exists; give another place" in refused(capsys, words(world, finished))


def test_overwriting_takes_away_what_was_there_and_nothing_else(world, tmp_path):
    out = tmp_path / "out"
    assert interpolate.main(words(world, out, "--alphas", "0,1", dense=False)) == 0
    (out / "mine.txt").write_text("x")
    argv = words(world, out, "--alphas", "0.5", "--overwrite", dense=False)
    assert interpolate.main(argv) == 0
    assert {p.name for p in out.iterdir()} == {
        "alpha-start", "alpha-0.5", "curve.csv", "curve.png", "results.json", "mine.txt",
    }  # fmt: skip


# --- models ---------------------------------------------------------------------------------------


def test_a_start_is_a_folder_a_file_or_a_name_with_a_tag(world):
    tuned = world / "tuned"
    file = str(world / "start" / WEIGHTS)
    assert split_start(str(world / "start"), tuned) == (str(world / "start"), None)
    assert split_start(file, tuned) == (LAST, file)
    assert split_start("LaSt-ViT-B-16/openai", tuned) == ("LaSt-ViT-B-16", "openai")
    assert split_start("openai", tuned) == (LAST, "openai")
    assert split_start("hf-hub:org/name", tuned) == ("hf-hub:org/name", None)


def test_a_tag_alone_needs_a_record_of_the_model(tmp_path):
    with pytest.raises(UserError, match="names no model"):
        split_start("openai", save(tmp_path / "m", LAST, 0) / "missing")


def test_a_run_means_its_model_and_an_unfinished_one_its_newest_checkpoint(tmp_path):
    save(tmp_path / "run" / "model", LAST, 0)
    assert find_tuned(str(tmp_path / "run")) == tmp_path / "run" / "model"
    with pytest.raises(UserError, match="holds no open_clip_config"):
        find_tuned(str(tmp_path))


def test_models_of_other_shape_or_activation_are_refused_by_name(world, tmp_path, capsys):
    quick = save(tmp_path / "quick", NATIVE, 0, force_quick_gelu=True)
    argv = words(world, tmp_path / "out")
    argv[1] = str(quick)
    assert "runs with quickgelu, --tuned" in refused(capsys, argv)
    lacking = save(tmp_path / "lacking", LAST, 0)
    state = load_file(lacking / WEIGHTS)
    del state["visual.ln_post.bias"]
    save_file(state, str(lacking / WEIGHTS))
    argv[1] = str(lacking)
    assert "visual.ln_post.bias" in refused(capsys, argv)
    assert not (tmp_path / "out").exists()


def began(pair: Path, **of: str | None) -> None:
    """Let a tuned model's record say what it began with."""
    about = {"model": {"name": LAST, "pretrained": None, "weights_sha256": None, **of}}
    (pair / "record.json").write_text(json.dumps(about))


def test_a_start_that_the_run_did_not_begin_with_is_warned_of_in_one_line(tmp_path, caplog):
    start, other = save(tmp_path / "start", NATIVE, 0), save(tmp_path / "other", NATIVE, 2)
    tuned = save(tmp_path / "tuned", LAST, 1)
    digest = file_sha256(start / WEIGHTS)

    def said(given: Path) -> list[str]:
        caplog.clear()
        interpolate.load_endpoints(str(given), str(tuned), "cpu", None)
        return [r.getMessage() for r in caplog.records if "began with" in r.getMessage()]

    assert said(start) == []  # nothing is recorded
    began(tuned, pretrained=".../somewhere/start", weights_sha256=digest)
    assert said(start) == []
    (line,) = said(other)
    assert f"began with .../somewhere/start ({digest[:12]}), not with" in line
    assert str(other) in line
    assert "\n" not in line
    began(tuned)
    assert "began with random weights" in said(start)[0]


@pytest.mark.parametrize(
    ("recorded", "given", "other"),
    [("openai", "openai", None), ("laion400m", "laion400m-e32", None),
     ("openai", "metaclip_400m", "openai (aaaa)"), ("a/w.pt", "a/w.pt", "a/w.pt (aaaa)")],
)  # fmt: skip
def test_the_same_tag_of_another_file_is_the_same_start(tmp_path, recorded, given, other):
    info = dataclasses.replace(build(LAST).info, pretrained=given, weights_sha256="bbbb")
    began(tmp_path, pretrained=recorded, weights_sha256="aaaa")
    assert other_start(tmp_path, info) == other


def test_a_start_of_another_size_has_its_positions_resized_as_the_fine_tune_did(tmp_path):
    start = save(tmp_path / "start", NATIVE, 0)
    tuned = build(LAST, str(start), image_size=48)
    with torch.no_grad():
        tuned.model.logit_scale.add_(1)
    save_model(tuned.model, tuned.info, tmp_path / "tuned")
    ends = interpolate.load_endpoints(str(start), str(tmp_path / "tuned"), "cpu", None)
    name = "visual.positional_embedding"
    assert ends.start[name].shape[0] == 37
    assert torch.equal(ends.start[name], ends.tuned[name])


@pytest.mark.parametrize(
    ("drop", "add", "word"),
    [(["--start"], [], "--start is missing"), (["--output"], [], "--output is missing"),
     (["--classes"], [], "belong together"), (["--val-data", "--classes", "--dataset"], [],
     "nothing to do"), ([], ["--resume", "--overwrite"], "exclude each other"),
     ([], ["--batch-size", "0"], "--batch-size 0 is below 1"),
     ([], ["--device", "gpu"], "--device gpu is not known")],
)  # fmt: skip
def test_mistakes_are_one_line(world, tmp_path, capsys, drop, add, word):
    argv = words(world, tmp_path / "out")
    for flag in drop:
        at = argv.index(flag)
        del argv[at : at + 2]
    assert word in refused(capsys, [*argv, *add])
    assert not (tmp_path / "out").exists()


# --- the picture ----------------------------------------------------------------------------------


def coloured(picture: Image.Image, colour: str) -> np.ndarray:
    """Rows and columns of the pixels of one colour, outside the labels."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    pixels = np.asarray(picture).astype(int)[:, : WIDTH - RIGHT]
    return np.argwhere(np.abs(pixels - wanted).max(axis=2) < 8)


def test_higher_scores_stand_higher_and_shares_run_to_the_right():
    line = Line("a", ((0.0, 0.1), (1.0, 0.9)))
    spots = coloured(draw([line], ("t",), "x"), COLOURS[0])
    left, right = spots[spots[:, 1] < 200], spots[spots[:, 1] > 600]
    assert left[:, 0].min() > right[:, 0].max()


def test_a_level_is_a_dashed_line_at_its_score():
    line = Line("a", ((0.0, 0.0), (1.0, 0.0)), ("start", 0.5))
    spots = coloured(draw([line], ("t",), "x"), COLOURS[0])
    rows = set(spots[spots[:, 0] < 400][:, 0].tolist())
    assert rows
    assert all(abs(row - TOP) <= 2 for row in rows)


def test_chance_is_a_dotted_line_at_its_score():
    line = Line("a", ((0.0, 0.0), (1.0, 0.0)), ("start", 0.5), ("chance", 0.25))
    dark = np.asarray(draw([line], ("t",), "x"))[:, LEFT : WIDTH - RIGHT, 0] < 120
    rows = {
        name: dark[row] for name, row in (("start", TOP), ("chance", (TOP + HEIGHT - BOTTOM) // 2))
    }
    pieces = {name: np.count_nonzero(np.diff(row.astype(int)) > 0) for name, row in rows.items()}
    assert pieces["chance"] > 2 * pieces["start"] > 20
    assert all(0.4 < row.mean() < 0.6 for row in rows.values())


@pytest.mark.parametrize("letters", [3, 60, 300])
def test_no_text_leaves_the_picture(letters):
    line = Line("w" * letters, ((0.0, 0.1), (1.0, 0.9)))
    pixels = np.asarray(draw([line], ("w" * letters, "w" * letters), "x").convert("L"))
    assert pixels[:, -4:].min() == 255
    assert pixels[:TOP, LEFT:].min() < 128
    assert pixels[:, WIDTH - RIGHT + 14 :].min() < 200


def test_a_picture_says_which_models_by_which_pooling_and_what_chance_is(finished):
    found = json.loads((finished / "results.json").read_text())
    title, below = interpolated._title(found)
    names = [found[end]["name"] for end in ("start", "tuned")]
    assert title == f"start {names[0]} mixed with fine-tuned {names[1]}"
    assert below == (
        "top-1 of 24 images read by LaSt pooling (k 2, score paper); mIoU toy of "
        f"{found['curve'][0]['dense']['toy']['images']}"
    )
    rows, own = found["curve"], found["start_own_pooling"]
    top, miou = interpolated.lines_of(rows, own, ["toy"], found["chance"])
    assert top.level == ("top-1 of the start by its CLS token", own["top1"])
    assert top.chance == ("top-1 by chance", pytest.approx(1 / 3))
    assert (miou.label, miou.levels()) == ("mIoU toy", [])


def test_a_picture_is_made_again_from_the_results_alone(finished, tmp_path):
    shutil.copy(finished / "results.json", tmp_path)
    interpolated.save_curve(tmp_path)
    assert (tmp_path / "curve.png").read_bytes() == (finished / "curve.png").read_bytes()


def test_more_lines_than_colours_are_an_error():
    with pytest.raises(ValueError, match="6 lines"):
        draw([Line(str(n), ((0.0, 0.1),)) for n in range(6)], ("t",), "x")


def test_every_setting_that_changes_a_score_is_asked_for_again(world, finished):
    args = interpolate.make_parser().read(words(world, finished, "--resume"))
    wanted = interpolate._check(args)
    ends = interpolate.load_endpoints(args.start, args.tuned, "cpu", None)
    asked = interpolate._asked(args, wanted, ends)
    held = json.loads((finished / "alpha-1" / "scores.json").read_text())["of"]
    assert asked == held
    other = dataclasses.replace(ends, sha256=("x", ends.sha256[1]))
    assert interpolate._asked(args, wanted, other)["start"] != held["start"]
