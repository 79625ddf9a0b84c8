"""From cosine maps to label maps: golden cases, the reference, and the shortcut without softmax."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.segmentation.decide import class_scores, decide, label_map, merge_queries
from tests import reference_seg as reference


def pixels(*columns):
    """Scores C x 1 x n from one tuple of class scores a pixel."""
    return torch.tensor(columns, dtype=torch.float32).T[:, None, :]


def test_synonyms_are_merged_by_their_maximum():
    cosines = torch.tensor([math.log(4), math.log(3), math.log(3)]).view(3, 1, 1)
    scores = class_scores(cosines, (0, 1, 1), 2, 1.0)
    torch.testing.assert_close(scores.flatten(), torch.tensor([0.4, 0.3]))
    # The sum of the synonyms, 0.6, would win.
    assert decide(cosines, (0, 1, 1), 2, logit_scale=1.0).item() == 0
    assert decide(cosines, (0, 1, 1), 2, logit_scale=1.0, threshold=0.01).item() == 0


def test_a_pixel_below_the_threshold_is_background_and_one_exactly_at_it_stays():
    scores = pixels((0.1, 0.39), (0.1, 0.4), (0.1, 0.41))
    assert label_map(scores, threshold=0.4).flatten().tolist() == [0, 1, 1]


def test_without_a_threshold_nothing_becomes_background():
    scores = pixels((0.1, 0.2), (0.001, 0.002))
    assert label_map(scores).flatten().tolist() == [1, 1]


def area_case(second):
    """50 pixels of background, 50 - n of class 1, n of class 2 whose next best is class 1."""
    columns = [(0.9, 0.05, 0.05)] * 50 + [(0.1, 0.8, 0.1)] * (50 - second)
    return pixels(*columns, *[(0.1, 0.3, 0.6)] * second)


def test_a_class_with_a_tenth_of_the_foreground_vanishes_to_the_next_best():
    assert torch.bincount(label_map(area_case(5), area=0.1).flatten()).tolist() == [50, 50]
    assert torch.bincount(label_map(area_case(6), area=0.1).flatten()).tolist() == [50, 44, 6]


def test_the_area_rule_never_removes_the_background():
    columns = [(0.9, 0.1)] + [(0.1, 0.9)] * 99
    assert (label_map(pixels(*columns), area=0.1) == 0).sum() == 1


def test_equal_scores_go_to_the_lowest_class():
    assert label_map(pixels((0.2, 0.4, 0.4))).item() == 1


def random_case(seed, queries=9, classes=4, size=(6, 7)):
    draw = np.random.default_rng(seed)
    owners = np.concatenate([np.arange(classes), draw.integers(0, classes, queries - classes)])
    owners = tuple(int(v) for v in draw.permutation(owners))
    return draw.uniform(-0.2, 0.4, (queries, *size)), owners, classes


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.2, 0.35]), st.sampled_from([0.0, 0.1, 0.4]))
def test_label_maps_equal_the_reference(seed, threshold, area):
    maps, owners, classes = random_case(seed)
    scores = reference.class_scores(maps, owners, classes, 10.0)
    ours = class_scores(torch.from_numpy(maps).float(), owners, classes, 10.0)
    np.testing.assert_allclose(ours.numpy(), scores, rtol=1e-4, atol=1e-6)
    expected, margin = reference.decide(scores, threshold, area)
    found = decide(
        torch.from_numpy(maps).float(), owners, classes,
        logit_scale=10.0, threshold=threshold, area=area,
    ).numpy()  # fmt: skip
    clear = margin > 1e-5
    assert clear.mean() > 0.9
    assert np.array_equal(found[clear], expected[clear])


@given(st.integers(0, 10_000), st.floats(0.5, 100))
def test_leaving_out_the_softmax_does_not_move_the_maximum(seed, scale):
    maps, owners, classes = random_case(seed)
    cosines = torch.from_numpy(maps)
    by_softmax = label_map(merge_queries((cosines * scale).softmax(dim=0), owners, classes))
    assert torch.equal(decide(cosines, owners, classes, logit_scale=scale), by_softmax)


def test_merging_keeps_the_maximum_of_each_class_whatever_the_order_of_queries():
    maps = torch.tensor([1.0, 5.0, 2.0, -3.0]).view(4, 1, 1)
    assert merge_queries(maps, (2, 0, 2, 1), 3).flatten().tolist() == [5.0, -3.0, 2.0]


@pytest.mark.parametrize(("owners", "classes"), [((0, 1), 2), ((0, 0, 2), 3), ((0, 1, 5), 3)])
def test_maps_without_a_class_and_classes_without_a_query_are_refused(owners, classes):
    with pytest.raises(ValueError, match="each map needs a class"):
        merge_queries(torch.zeros(3, 2, 2), owners, classes)
