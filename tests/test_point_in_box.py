"""eval.point_in_box: which pictures count, scores by hand, references, and the command."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.point_in_box import fit_to_input, main, untrained_twin
from eval.pointing import (
    Case,
    Found,
    Settings,
    exclusion,
    make_prepare,
    make_row,
    view_of,
    view_transform,
)
from eval.samples import BadSample, boxes_of, picture_of
from lazyclip import encode_tokens, project, vote_count
from lazyclip.base.errors import UserError
from lazyclip.boxes import Box, from_inclusive, patch_hits, to_view
from lazyclip.export import save_model
from lazyclip.factory import build
from lazyclip.scores import centre_share, chance_share
from lazyclip.shards import Sample, expand, iterate_samples
from lazyclip.tower import pooling_of
from tests.toy import jpeg, write_shard

MODEL = ["--model", "LaSt-ViT-nano", "--random-weights", "--device", "cpu", "--workers", "1"]
NAMES = ("red", "blue", "green")


def run(capsys, out: Path, *argv: str) -> tuple[dict, str]:
    assert main([*argv, "--output", str(out)]) == 0
    return json.loads((out / "results.json").read_text()), capsys.readouterr().out


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


def sample(about: object, size: tuple[int, int] = (64, 64), key: str = "k0") -> Sample:
    parts = {"jpg": jpeg(0, size), "json": json.dumps(about).encode()}
    return Sample(key, parts, Path("a.tar"), 0)


# --- which pictures count ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "small", "empty", "single", "single_small"),
    [
        (0, False, False, "no_box", "no_box"),
        (2, False, False, "several_boxes", "several_boxes"),
        (1, False, False, None, "not_small"),
        (1, True, False, None, None),
        (1, True, True, "empty_after_crop", "empty_after_crop"),
        (1, False, True, "empty_after_crop", "not_small"),
    ],
)
def test_a_filter_names_its_first_reason(boxes, small, empty, single, single_small):
    assert exclusion(boxes, small, empty, "single") == single
    assert exclusion(boxes, small, empty, "single_small") == single_small


def prepared(about: object, size: tuple[int, int] = (64, 64), **changes: object) -> Case:
    settings = Settings(filters=("single", "single_small"), **changes)
    return make_prepare(settings, (64, 64), lambda image: torch.zeros(3, 64, 64))(
        sample(about, size)
    )


def test_a_box_below_a_quarter_of_the_picture_is_small():
    # 32 x 32 of 64 x 64 is a quarter exactly: not small; one column less is.
    assert prepared({"box": [0, 0, 31, 31]}).reasons == {
        "single": None, "single_small": "not_small"}  # fmt: skip
    assert prepared({"box": [0, 0, 30, 31]}).reasons == {"single": None, "single_small": None}
    assert prepared({"box": [0, 0, 30, 31]}).box == Box(0, 0, 31, 32)


def test_a_box_that_the_crop_cuts_off_is_left_out_and_squash_keeps_it():
    about = {"box": [0, 0, 29, 63]}  # of 128 x 64; the middle 64 columns stay
    cut = prepared(about, (128, 64))
    assert cut.reasons == {"single": "empty_after_crop", "single_small": "empty_after_crop"}
    assert cut.view is None
    assert prepared(about, (128, 64), geometry="squash").box == Box(0, 0, 15, 64)


def test_boxes_may_be_a_list():
    assert boxes_of(sample({"boxes": [[0, 0, 1, 1], [2, 2, 2, 2]], "box": [9, 9, 9, 9]})) == (
        Box(0, 0, 2, 2), Box(2, 2, 3, 3))  # fmt: skip
    assert boxes_of(sample({"boxes": []})) == ()
    assert boxes_of(sample({"box": None})) == ()
    for bad in ({"box": 3}, {"boxes": [1, 2, 3, 4]}, {"box": [3, 0, 1, 1]}, {"box": [1, 2]}, [1]):
        with pytest.raises(BadSample) as caught:
            boxes_of(sample(bad))
        assert caught.value.reason == "bad_box"


def test_a_row_takes_its_own_pictures_only():
    found = Found({"single": [True, True, True, False]}, {"single": {"no_box": 2}})
    found.hit, found.untrained = [True, False, True, True], [False, False, True, True]
    found.chance, found.centre = [0.5, 0.25, 0.0, 1.0], [1.0, 0.5, 0.0, 1.0]
    found.without_centre = [False, False, True, True]
    row = make_row(found, "single")
    assert (row.pib, row.n, row.chance, row.centre) == (2 / 3, 3, 0.25, 0.5)
    assert (row.no_centre, row.untrained, row.excluded) == (1, 1 / 3, {"no_box": 2})
    # Wilson by hand: (2/3 + z^2/6 -+ z sqrt(2/27 + z^2/36)) / (1 + z^2/3), z = 1.96.
    assert row.interval == pytest.approx((0.2077, 0.9385), abs=1e-4)
    found.untrained = []
    assert make_row(found, "single").untrained is None


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (51, 90)])
def test_the_default_view_is_the_models_own_preprocessing(size):
    built = build("LaSt-ViT-nano")
    image = picture_of(sample({}, size))
    settings = fit_to_input(Settings(), (64, 64))
    assert settings.resize == 64
    assert torch.equal(view_transform(built, settings)(image), built.preprocess_val(image))


@pytest.mark.parametrize("settings", [Settings(resize=73), Settings(geometry="squash")])
def test_a_bright_box_lands_where_its_box_says(settings):
    """The picture and its box go through the same geometry, pixel for pixel."""
    built = build("LaSt-ViT-nano")
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[12:40, 30:64] = 255
    from PIL import Image

    view = view_transform(built, settings)(Image.fromarray(pixels))
    plane = view[0] * built.info.std[0] + built.info.mean[0]
    box = to_view(from_inclusive([30, 12, 63, 39]), view_of(100, 60, settings, (64, 64)))
    assert float((plane > 0.5).sum()) == pytest.approx(box.area, rel=0.05)
    rows, columns = (plane > 0.5).nonzero(as_tuple=True)
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert [float(v) for v in found] == pytest.approx(list(box), abs=0.75)


def test_a_resize_below_the_input_or_an_oblong_crop_is_refused():
    with pytest.raises(UserError, match="--resize 60 is below the input's 64 px"):
        fit_to_input(Settings(resize=60), (64, 64))
    with pytest.raises(UserError, match="square input"):
        fit_to_input(Settings(), (64, 32))
    assert fit_to_input(Settings(geometry="squash"), (64, 32)).resize is None


# --- the whole command, by hand ------------------------------------------------------------------


def boxed_shards(folder: Path) -> str:
    """Write noise pictures in two shards, whose boxes cover a tenth to all of them."""
    draw = np.random.default_rng(5)
    for shard in range(2):
        samples = []
        for i in range(15):
            width, height = (int(v) for v in draw.integers(20, 65, 2))
            x0, y0 = int(draw.integers(0, 65 - width)), int(draw.integers(0, 65 - height))
            about = {"box": [x0, y0, x0 + width - 1, y0 + height - 1], "class_index": i % 3}
            samples.append({"jpg": jpeg(100 * shard + i), "json": json.dumps(about).encode()})
        write_shard(
            folder / f"{shard:05d}.tar", samples, [f"{shard:05d}{i:04d}" for i in range(15)]
        )
    return str(folder / "{00000..00001}.tar")


def by_hand(pattern: str, name: str, q: str, space: str, seed: int = 0, **last: object):
    """Score toy shards without the evaluation's code; returns hits, scores, hit patches, votes."""
    built = build(name, random_weights_seed=seed, last=last or None)
    samples = [s for path in expand(pattern) for s in iterate_samples(path)]
    about = [json.loads(s.parts["json"]) for s in samples]
    images = torch.stack([built.preprocess_val(picture_of(s)) for s in samples])
    with torch.no_grad():
        tokens = encode_tokens(built.model, images)
        patches, vector = tokens.patches, tokens.pooled
        if space == "post":
            patches, vector = project(built.model, patches), project(built.model, vector)
        if q == "text":
            texts = [f"a photo of a {NAMES[a['class_index']]}." for a in about]
            vector = built.model.encode_text(built.tokenizer(texts))
    scores = torch.nn.functional.cosine_similarity(patches, vector[:, None], dim=-1).numpy()
    hit = []
    for row, facts in zip(scores, about, strict=True):
        y, x = divmod(int(np.argmax(row)), 8)
        x0, y0, x1, y1 = facts["box"]
        hit.append(x0 <= x * 8 + 4 <= x1 and y0 <= y * 8 + 4 <= y1)
    return hit, scores, tokens


@pytest.mark.parametrize(
    ("name", "flags", "q", "space"),
    [
        ("LaSt-ViT-nano", [], "own", "pre"),
        ("LaSt-ViT-nano", ["--space", "post"], "own", "post"),
        ("LaSt-ViT-nano", ["--q", "text", "--classes", ", ".join(NAMES), "--templates", "plain"],
         "text", "post"),
        ("ViT-nano", [], "own", "pre"),
    ],
)  # fmt: skip
def test_the_command_agrees_with_the_same_done_by_hand(tmp_path, capsys, name, flags, q, space):
    pattern = boxed_shards(tmp_path / "val")
    argv = ["--val-data", pattern, *MODEL[2:], "--model", name, "--batch-size", "7", *flags]
    maps = tmp_path / "maps.npz"
    result, shown = run(capsys, tmp_path / "out", *argv, "--save-maps", str(maps))
    hit, scores, tokens = by_hand(pattern, name, q, space)
    assert 0 < np.mean(hit) < 1
    assert result["pib"] == pytest.approx(np.mean(hit))
    # The twin's weights are those of the next seed.
    assert result["untrained"] == pytest.approx(np.mean(by_hand(pattern, name, q, space, 1)[0]))
    assert (result["rule"], result["filter"], result["q"]) == ("centre", "single", q)
    assert (result["n"], result["excluded"], result["space"]) == (30, {}, space)
    assert result["interval"][0] < result["pib"] < result["interval"][1]
    assert re.search(rf"^{name} +{100 * np.mean(hit):.1f}  ", shown, re.MULTILINE)
    for label in ("untrained", "centre patch", "chance"):
        assert re.search(rf"^{label} +\d+\.\d", shown, re.MULTILINE)
    with np.load(maps) as saved:
        np.testing.assert_allclose(saved["scores"].reshape(30, 64), scores, atol=1e-5)
        assert saved["hit"].tolist() == hit
        assert saved["keys"][0] == "000000000"
        if name == "LaSt-ViT-nano":
            votes = vote_count(tokens.patches, 0.5)
            assert (saved["votes"].reshape(30, 64) == votes.numpy()).mean() > 0.99
            assert saved["votes"].sum() == votes.sum()
        else:
            assert saved["votes"].size == 0


def test_pooling_flags_reach_the_model_and_its_twin(tmp_path, capsys):
    pattern = boxed_shards(tmp_path / "val")
    argv = ["--val-data", pattern, *MODEL, "--last-pooling", "max"]
    result, _ = run(capsys, tmp_path / "out", *argv)
    hits = [by_hand(pattern, "LaSt-ViT-nano", "own", "pre", s, pooling="max")[0] for s in (0, 1)]
    assert [result["pib"], result["untrained"]] == pytest.approx([np.mean(h) for h in hits])


def test_both_filters_in_one_run_are_the_two_runs(tmp_path, capsys):
    samples = [
        {"jpg": jpeg(i), "json": json.dumps({"box": [4, 4, 4 + 3 * i, 40]}).encode()}
        for i in range(12)
    ]
    samples.append({"jpg": jpeg(0), "json": b'{"caption": "none"}'})
    samples.append({"jpg": jpeg(0), "json": b'{"boxes": [[0, 0, 3, 3], [5, 5, 9, 9]]}'})
    write_shard(tmp_path / "val" / "0.tar", samples)
    argv = ["--val-data", str(tmp_path / "val"), *MODEL, "--rule", "overlap", "--no-untrained"]
    both, shown = run(capsys, tmp_path / "b", *argv, "--filter", "single,single_small")
    alone = [run(capsys, tmp_path / name, *argv, "--filter", name)[0]
             for name in ("single", "single_small")]  # fmt: skip
    keys = ("pib", "n", "interval", "chance", "centre", "excluded", "no_centre", "filter", "rule")
    for row, one in zip(both["rows"], alone, strict=True):
        assert {k: row[k] for k in keys} == {k: one[k] for k in keys}
    assert both["filter"] == "single"
    assert both["untrained"] is None
    assert "untrained" not in shown
    assert both["rows"][0]["excluded"] == {"no_box": 1, "several_boxes": 1}
    # 37 rows of 64: 1024 pixels are reached at 28 columns, so widths 1, 4 ... 25 are small.
    assert [row["n"] for row in both["rows"]] == [12, 9]
    assert both["rows"][1]["excluded"] == {"no_box": 1, "several_boxes": 1, "not_small": 3}
    hits = patch_hits([Box(4, 4, 5 + 3 * i, 41) for i in range(12)], (8, 8), (64, 64), "overlap")
    assert both["chance"] == pytest.approx(chance_share(hits).mean().item())
    assert both["centre"] == pytest.approx(centre_share(hits, (8, 8)).mean().item())
    # Columns 4..5 hold the centre of the first column at 4 exactly: each box holds one.
    assert both["no_centre"] == 0


def test_boxes_between_patch_centres_count_and_are_reported(tmp_path, capsys):
    samples = [{"jpg": jpeg(i), "json": b'{"box": [5, 5, 11, 11]}'} for i in range(3)]
    write_shard(tmp_path / "0.tar", samples)
    argv = ["--val-data", str(tmp_path), *MODEL, "--no-untrained"]
    result, shown = run(capsys, tmp_path / "out", *argv)
    assert (result["n"], result["no_centre"], result["chance"], result["pib"]) == (3, 3, 0, 0)
    assert "3 boxes hold no patch centre" in shown


def test_the_twin_of_a_saved_model_has_other_weights_and_the_same_shape(tmp_path):
    built = build("LaSt-ViT-nano", last={"k": 7}, random_weights_seed=3)
    save_model(built.model, built.info, tmp_path / "model")
    saved = build(str(tmp_path / "model"))
    for seed in (3, 4):
        twin = untrained_twin(saved, seed)
        pairs = zip(twin.parameters(), built.model.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs) == (seed == 3)
        assert twin.visual.last == built.model.visual.last
        assert not twin.training


@pytest.mark.parametrize(("name", "last"), [("LaSt-ViT-nano", {"k": 3}), ("ViT-nano", None)])
def test_the_twin_of_a_named_model_pools_as_it_does(name, last):
    built = build(name, last=last)
    assert pooling_of(untrained_twin(built, 1)) == pooling_of(built.model)


def test_bad_samples_follow_the_same_limit(tmp_path, capsys):
    good = {"jpg": jpeg(0), "json": b'{"box": [0, 0, 40, 40]}'}
    write_shard(tmp_path / "0.tar", [good, {**good, "json": b'{"box": [9, 9, 1, 1]}'},
                                     {**good, "jpg": b"no"}])  # fmt: skip
    argv = ["--val-data", str(tmp_path), *MODEL, "--no-untrained"]
    fails(capsys, ["0.tar:1", "second corner", "--max-bad 0"], *argv)
    result, shown = run(capsys, tmp_path / "out", *argv, "--max-bad", "2")
    assert result["skipped"] == {"bad_box": 1, "undecodable": 1}
    assert result["n"] == 1
    assert "skipped: 1 bad_box, 1 undecodable" in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--filter", "small"], ["--filter 'small'", "known: ", "single_small"]),
        (["--filter", ""], ["--filter ''"]),
        (["--rule", "center"], ["--rule 'center'", "centre"]),
        (["--q", "text"], ["--q text needs the class names", "--classes FILE"]),
        (["--q", "text", "--space", "pre", "--classes", "a,b"], ["after the projection"]),
        (["--geometry", "squash", "--resize", "73"], ["--resize 73 belongs to --geometry crop"]),
        (["--resize", "32"], ["--resize 32 is below the input's 64 px"]),
        (["--resize", "0"], ["--resize 0 is below"]),
        (["--save-maps", "maps.npy"], ["must end in .npz"]),
        (["--val-data", "nowhere"], ["--val-data nowhere names 0 existing shards"]),
        (["--last-k", "300"], ["300", "64 patches"]),
        (["--filter", "single_small"], ["single_small leaves no image", "2 not_small"]),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, flags, words):
    samples = [{"jpg": jpeg(i), "json": b'{"box": [0, 0, 40, 40]}'} for i in range(2)]
    write_shard(tmp_path / "0.tar", samples)
    out = tmp_path / "out"
    fails(capsys, words, "--val-data", str(tmp_path), "--output", str(out), *MODEL, *flags)
    assert not out.exists()


def test_shards_without_boxes_show_what_they_hold(tmp_path, capsys):
    write_shard(tmp_path / "0.tar", [{"jpg": jpeg(0), "json": b'{"bbox": 1, "url": 2}'}])
    fails(
        capsys, ["0 of 1 samples fit", "box", "jpg 1, json 1", "first json: bbox, url"],
        "--val-data", str(tmp_path), *MODEL,
    )  # fmt: skip


# --- real data -----------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.slow
def test_chance_and_centre_of_the_real_boxes(shared_data):
    """All 5,000 pictures are 64 x 64, so that the default crop leaves every box as it is."""
    pattern = str(shared_data / "tiny-imagenet" / "val" / "{00000..00001}.tar.gz")
    boxes = [boxes_of(s)[0] for path in expand(pattern) for s in iterate_samples(path)]
    hits = patch_hits(boxes, (8, 8), (64, 64), "centre")
    small = torch.tensor([box.area < 1024 for box in boxes])
    chance, centre = chance_share(hits), centre_share(hits, (8, 8))
    assert (len(boxes), int(small.sum())) == (5000, 1284)
    assert chance.mean().item() == pytest.approx(0.525, abs=5e-4)
    assert centre.mean().item() == pytest.approx(0.777, abs=5e-4)
    assert chance[small].mean().item() == pytest.approx(0.119, abs=5e-4)
    assert centre[small].mean().item() == pytest.approx(0.328, abs=5e-4)
    assert int((~hits.any(dim=1)).sum()) == 68


@pytest.mark.data
def test_real_pictures_are_scored(shared_data, tmp_path, capsys):
    pattern = f"{shared_data}/tiny-imagenet/val/{{00000..00001}}.tar.gz"
    argv = ["--val-data", pattern, "--limit", "24", "--filter", "single,single_small", *MODEL]
    result, _ = run(capsys, tmp_path, *argv)
    assert result["n"] == 24
    assert result["rows"][1]["n"] + result["rows"][1]["excluded"]["not_small"] == 24
