"""The separable form against the steps on full maps and against float64, in every geometry."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from eval.segmentation import separable
from eval.segmentation.confusion import count, score
from eval.segmentation.decide import by_canvas
from eval.segmentation.protocol import read_task
from eval.segmentation.separable import by_block, by_query, make_axis, postprocess
from eval.segmentation.windows import Box, Plan, cut, make_plan
from lazyclip.base.errors import UserError
from tests import reference_seg as reference

PATCH = 8
OWNERS = (0, 0, 1, 2, 2, 2, 3, 4)
PROTOCOLS = Path(__file__).resolve().parents[1] / "configs" / "protocols"
NEAR = 1e-4
"""A difference of two float64 probabilities that rounding of float32 may turn around."""


def protocol_of(**values):
    values = {"classes": max(OWNERS) + 1, "pamr": "off", **values}
    return dataclasses.replace(read_task("voc20").protocol, **values)


def random_maps(plan, queries=8, patch=PATCH, seed=0):
    draw = torch.Generator().manual_seed(seed)
    grid = (plan.inner[0] // patch, plan.inner[1] // patch)
    return torch.rand(len(plan.boxes), queries, *grid, generator=draw) * 0.3


def in_float64(maps, plan, protocol, owners=OWNERS):
    """Labels and margins by the slow reference."""
    canvas = reference.stitch(
        maps.double().numpy(), plan.boxes, *plan.size, plan.stretched, plan.pad
    )
    full = reference.bilinear_maps(canvas, *plan.original)
    scores = reference.class_scores(full, owners, protocol.classes, protocol.logit_scale)
    return reference.decide(scores, protocol.threshold, protocol.area)


GEOMETRIES = {
    "overlap": ((50, 66), {"short": 48, "window": 32, "stride": 16}),
    "no overlap": ((61, 47), {"short": 64, "window": 32, "stride": 32}),
    "last windows moved back": ((41, 57), {"short": 43, "window": 24, "stride": 17}),
    "map stretched over a dropped remainder": ((41, 37), {"short": 30, "window": 30, "stride": 11}),
    "padded remainder cut": (
        (41, 47), {"short": 44, "window": 37, "stride": 21, "remainder": "pad"},
    ),
    "whole image": ((44, 52), {"short": 40, "window": 0, "stride": 0}),
    "whole image padded": ((44, 52), {"short": 42, "window": 0, "stride": 0, "remainder": "pad"}),
    "smaller than a window": ((30, 35), {"short": 24, "window": 40, "stride": 20}),
    "shorter than a window": ((30, 95), {"short": 24, "window": 40, "stride": 20}),
    "less than a patch, padded": (
        (5, 60), {"short": 5, "window": 16, "stride": 8, "remainder": "pad"},
    ),
    "very wide": ((12, 150), {"short": 48, "cap": 200, "window": 16, "stride": 8}),
    "very tall": ((150, 12), {"short": 48, "cap": 200, "window": 16, "stride": 8}),
    "smaller original": ((17, 23), {"short": 48, "window": 32, "stride": 16}),
    "larger original": ((110, 130), {"short": 32, "window": 16, "stride": 8}),
}  # fmt: skip
DECISIONS = {
    "plain": {},
    "threshold": {"threshold": 0.3},
    "area": {"area": 0.25},
    "threshold and area": {"threshold": 0.3, "area": 0.25},
}


@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_labels_differ_from_float64_at_near_ties_only(geometry, decision):
    size, values = GEOMETRIES[geometry]
    protocol = protocol_of(**values, **DECISIONS[decision])
    plan = make_plan(*size, protocol, PATCH)
    maps = random_maps(plan)
    found = postprocess(maps, plan, protocol, OWNERS)
    expected, margin = in_float64(maps, plan, protocol)
    assert found.shape == size
    assert found.dtype == torch.uint8
    assert len(found.unique()) > 1
    for labels in (found, by_canvas(maps, plan, protocol, OWNERS)):
        apart = labels.numpy() != expected
        assert apart.mean() < 0.005
        assert np.all(margin[apart] < NEAR)


def protocols_of_all_benchmarks():
    for file in sorted(PROTOCOLS.glob("*.yaml")):
        for name in yaml.safe_load(file.read_text())["protocols"]:
            yield file.stem, name


@pytest.mark.parametrize(("dataset", "name"), [*protocols_of_all_benchmarks()])
def test_every_shipped_protocol_labels_as_the_steps_on_full_maps_do(dataset, name):
    task = read_task(dataset, name)
    protocol = dataclasses.replace(task.protocol, pamr="off")
    owners = task.classes.query_class
    plan = make_plan(150, 201, protocol, 16)
    maps = random_maps(plan, len(owners), 16)
    found = postprocess(maps, plan, protocol, owners)
    plain = by_canvas(maps, plan, protocol, owners)
    assert (found == plain).double().mean() >= 0.9999
    truth = plain.roll(3, dims=1).long().numpy()
    scores = [score(count(truth, p.long().numpy(), protocol.classes)) for p in (found, plain)]
    assert scores[0].miou == pytest.approx(scores[1].miou, abs=1e-4)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_geometry_labels_as_float64_does(data):
    sides = st.integers(6, 60)
    size = data.draw(st.tuples(sides, sides))
    window = data.draw(st.sampled_from([0, 5, 8, 13, 24, 31]))
    protocol = protocol_of(
        short=data.draw(st.integers(8, 48)),
        cap=80,
        window=window,
        stride=data.draw(st.integers(max(window // 3, 1), max(window, 1))),
        remainder=data.draw(st.sampled_from(["drop", "pad"])),
        threshold=data.draw(st.sampled_from([0.0, 0.25])),
    )
    patch = data.draw(st.integers(2, 5))
    plan = make_plan(*size, protocol, patch)
    maps = random_maps(plan, patch=patch, seed=data.draw(st.integers(0, 99)))
    found = postprocess(maps, plan, protocol, OWNERS).numpy()
    expected, margin = in_float64(maps, plan, protocol)
    apart = found != expected
    assert np.all(margin[apart] < NEAR)


def pixels(maps):
    """A plan on which each cell of the maps is a pixel, and the maps as its only window."""
    size = (maps.shape[1], maps.shape[2])
    return Plan(size, size, (Box(0, size[0], 0, size[1]),), size, size, (0, 0)), maps[None].float()


def label_pixels(maps, owners, **values):
    plan, maps = pixels(maps)
    protocol = protocol_of(classes=max(owners) + 1, **values)
    return postprocess(maps, plan, protocol, owners)


def test_synonyms_are_merged_by_their_maximum():
    cosines = torch.tensor([math.log(4), math.log(3), math.log(3)]).view(3, 1, 1)
    for threshold in (0.0, 0.39):
        values = {"logit_scale": 1.0, "threshold": threshold}
        assert label_pixels(cosines, (0, 1, 1), **values).item() == 0
        assert label_pixels(cosines.flip(0), (0, 0, 1), **values).item() == 1
    # Class 1 has 0.4 of the softmax over all queries, not 4 / 7 of that over the classes' best.
    assert label_pixels(cosines.flip(0), (0, 0, 1), logit_scale=1.0, threshold=0.41).item() == 0


@pytest.mark.parametrize("way", [by_query, by_block])
def test_a_pixel_below_the_threshold_is_background_and_one_exactly_at_it_stays(way, monkeypatch):
    monkeypatch.setattr(separable, "by_query", way)
    cosines = torch.tensor([[0.61, 0.5, 0.59], [0.39, 0.5, 0.41]]).log().flip(0).view(2, 1, 3)
    values = {"logit_scale": 1.0}
    # Equal logits are exactly one half each; with them the lower class wins.
    assert label_pixels(cosines[:, :, 1:2], (0, 1), threshold=0.5, **values).item() == 0
    cosines = torch.cat([torch.full((1, 1, 3), -50.0), cosines])
    found = [
        label_pixels(cosines, (0, 1, 2), threshold=t, **values).flatten().tolist()
        for t in (0.4, 0.5, 0.5000001, 0.6, 0.7)
    ]
    assert found == [[2, 1, 2], [2, 1, 2], [2, 0, 2], [2, 0, 0], [0, 0, 0]]


def area_case(second):
    """50 pixels of background, 50 - n of class 1, n of class 2 whose next best is class 1."""
    columns = [(0.9, 0.05, 0.05)] * 50 + [(0.1, 0.8, 0.1)] * (50 - second)
    columns += [(0.1, 0.3, 0.6)] * second
    return torch.tensor(columns).log().T.reshape(3, 10, 10)


@pytest.mark.parametrize("way", [by_query, by_block])
def test_a_class_with_a_tenth_of_the_foreground_vanishes_to_the_next_best(way, monkeypatch):
    monkeypatch.setattr(separable, "by_query", way)

    def counts(second, **values):
        found = label_pixels(area_case(second), (0, 1, 2), logit_scale=1.0, **values)
        return torch.bincount(found.flatten(), minlength=3).tolist()

    assert counts(5) == [50, 45, 5]
    assert counts(5, area=0.1) == [50, 50, 0]
    assert counts(6, area=0.1) == [50, 44, 6]
    # The threshold meets what is left: 0.3 of the whole softmax, the dropped class included.
    assert counts(5, area=0.1, threshold=0.29) == [50, 50, 0]
    assert counts(5, area=0.1, threshold=0.31) == [55, 45, 0]
    # Areas are those before the threshold, which would leave class 2 alone as foreground.
    sure = area_case(5)
    sure[:, 9, 5:] = torch.tensor([0.02, 0.08, 0.9]).log()[:, None]
    values = {"logit_scale": 1.0, "threshold": 0.85}
    assert torch.equal(label_pixels(sure, (0, 1, 2), **values).unique(), torch.tensor([0, 2]))
    assert not label_pixels(sure, (0, 1, 2), area=0.1, **values).any()


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.2, 0.35]),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.sampled_from([10.0, 65.0, -20.0, -90.0, 300.0, 2000.0]),
)
@settings(deadline=None)
def test_pixels_are_decided_as_in_float64_whatever_the_scale_and_the_order(
    seed, threshold, area, scale
):
    draw = np.random.default_rng(seed)
    owners = [int(v) for v in draw.permutation([0, 1, 2, 3, *draw.integers(0, 4, 5)])]
    maps = torch.from_numpy(draw.uniform(-1, 1, (9, 6, 7))).float()
    scores = reference.class_scores(maps.double().numpy(), owners, 4, scale)
    expected, margin = reference.decide(scores, threshold, area)
    values = {"logit_scale": scale, "threshold": threshold, "area": area}
    found = label_pixels(maps, owners, **values).numpy()
    plan, windows = pixels(maps)
    plain = by_canvas(windows, plan, protocol_of(classes=4, **values), owners).numpy()
    clear = margin > NEAR
    assert np.array_equal(found[clear], expected[clear])
    assert np.array_equal(found[clear], plain[clear])


@pytest.mark.parametrize("scale", [65.0, 300.0, 2000.0, -65.0])
def test_a_pixel_far_below_another_one_still_has_its_softmax(scale):
    sure = [-1.0, 1.0, -1.0]
    doubtful = [-1.0, -0.9, -0.9 - 0.1 / abs(scale)]  # shares 0, 0.52, 0.48
    maps = torch.tensor([sure, doubtful]).T.view(3, 1, 2) * math.copysign(1, scale)
    for threshold, expected in ((0.51, [1, 1]), (0.53, [1, 0])):
        found = label_pixels(maps, (0, 1, 2), logit_scale=scale, threshold=threshold)
        assert found.flatten().tolist() == expected


def test_equal_scores_go_to_the_lowest_class():
    for threshold in (0.0, 0.01):
        found = label_pixels(torch.full((4, 3, 5), 0.2), (1, 2, 0, 1), threshold=threshold)
        assert not found.any()
        maps = torch.tensor([0.2, 0.4, 0.4, 0.1]).view(4, 1, 1)
        assert label_pixels(maps, (0, 1, 2, 2), threshold=threshold).item() == 1
        assert label_pixels(maps, (2, 1, 0, 2), threshold=threshold).item() == 0


def test_a_scale_of_nothing_makes_all_classes_equal():
    maps = torch.rand(3, 2, 2)
    assert not label_pixels(maps, (0, 1, 2), logit_scale=0.0).any()


@pytest.mark.parametrize("decision", DECISIONS)
def test_tiles_of_any_size_and_all_queries_at_once_give_one_label_map(decision, monkeypatch):
    size, values = GEOMETRIES["last windows moved back"]
    protocol = protocol_of(**values, **DECISIONS[decision])
    plan = make_plan(*size, protocol, PATCH)
    maps = random_maps(plan, seed=3)
    whole = postprocess(maps, plan, protocol, OWNERS)
    for strip, columns in ((40, 1500), (1, 1 << 20), (57 * 5, 20_000)):
        monkeypatch.setattr(separable, "STRIP_PIXELS", strip)
        monkeypatch.setattr(separable, "COLUMN_BYTES", columns)
        for way in (by_query, by_block):
            monkeypatch.setattr(separable, "by_query", way)
            assert torch.equal(postprocess(maps, plan, protocol, OWNERS), whole)


def test_nothing_of_the_size_of_a_full_map_of_all_queries_is_made():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [out] if isinstance(out, torch.Tensor) else []
            self.numbers = max([self.numbers, *(t.untyped_storage().nbytes() for t in tensors)])
            return out

    protocol = protocol_of(short=64, window=32, stride=16, threshold=0.2, classes=60)
    plan = make_plan(400, 500, protocol, PATCH)
    maps = random_maps(plan, 60)
    with Largest() as plain:
        by_canvas(maps, plan, protocol, range(60))
    with Largest() as found:
        postprocess(maps, plan, protocol, range(60))
    assert plain.numbers >= 60 * 400 * 500 * 4
    assert found.numbers < plain.numbers / 10


def test_a_red_and_a_blue_half_are_parted_in_the_middle():
    image = np.zeros((375, 500, 3), dtype=np.uint8)
    image[:, :250], image[:, 250:] = (255, 0, 0), (0, 0, 255)
    protocol = protocol_of(classes=2)
    plan = make_plan(375, 500, protocol, 16)
    linear = torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.0, 0.1]])
    means = F.avg_pool2d(cut(image, plan, protocol), 16)
    found = postprocess(torch.einsum("nchw,qc->nqhw", means, linear), plan, protocol, (0, 1))
    assert found.shape == (375, 500)
    blur = int(16 * 500 / 448) + 1
    assert not found[:, : 250 - blur].any()
    assert found[:, 250 + blur :].all()


def test_the_matrix_of_an_axis_is_made_once_for_a_size_and_its_rows_are_means():
    make_axis.cache_clear()
    protocol = protocol_of(short=48, window=32, stride=16)
    plan = make_plan(50, 66, protocol, PATCH)
    for seed in range(3):
        postprocess(random_maps(plan, seed=seed), plan, protocol, OWNERS)
    assert make_axis.cache_info().misses == 2
    axis = make_axis(66, 63, (0, 16, 31), 32, 32, 0, 4)
    assert axis.matrix.min() >= 0
    torch.testing.assert_close(axis.matrix.sum(dim=1), torch.ones(66))
    for row, first, last in zip(axis.matrix, axis.first, axis.last, strict=True):
        assert row[first] > 0
        assert row[last] > 0
        assert not row[:first].any()
        assert not row[last + 1 :].any()


def test_the_maps_are_left_as_they_are():
    size, values = GEOMETRIES["overlap"]
    protocol = protocol_of(**values, threshold=0.2, area=0.1, logit_scale=-40)
    plan = make_plan(*size, protocol, PATCH)
    maps = random_maps(plan)
    before = maps.clone()
    postprocess(maps, plan, protocol, OWNERS)
    assert torch.equal(maps, before)


def test_pamr_takes_the_steps_on_full_maps_and_needs_the_picture():
    protocol = protocol_of(short=24, window=16, stride=8, pamr="naclip", threshold=0.25)
    plan = make_plan(30, 37, protocol, PATCH)
    image = np.random.default_rng(0).integers(0, 256, (30, 37, 3), dtype=np.uint8)
    maps = random_maps(plan)
    found = postprocess(maps, plan, protocol, OWNERS, image)
    assert torch.equal(found, by_canvas(maps, plan, protocol, OWNERS, image))
    off = dataclasses.replace(protocol, pamr="off")
    assert not torch.equal(found, postprocess(maps, plan, off, OWNERS))
    with pytest.raises(ValueError, match="needs the picture"):
        postprocess(maps, plan, protocol, OWNERS)


def test_maps_that_do_not_fit_or_are_not_finite_are_refused():
    size, values = GEOMETRIES["overlap"]
    protocol = protocol_of(**values)
    plan = make_plan(*size, protocol, PATCH)
    maps = random_maps(plan)
    with pytest.raises(ValueError, match="windows and 8 queries"):
        postprocess(maps[1:], plan, protocol, OWNERS)
    with pytest.raises(ValueError, match="windows and 7 queries"):
        postprocess(maps, plan, protocol, OWNERS[1:])
    with pytest.raises(ValueError, match="queries for 4 of 5 classes"):
        postprocess(maps, plan, protocol, (0, 0, 1, 2, 2, 2, 3, 3))
    many = random_maps(plan, 256)
    with pytest.raises(ValueError, match="below 255"):
        postprocess(many, plan, dataclasses.replace(protocol, classes=256), range(256))
    for bad in (torch.nan, torch.inf):
        maps[0, 0, 0, 0] = bad
        with pytest.raises(UserError, match="not finite"):
            postprocess(maps, plan, protocol, OWNERS)
