"""Counts and scores: golden cases, the reference, and laws of sums."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.segmentation.confusion import count, count_on, score
from tests import reference_seg as reference


def arrays(*rows):
    return tuple(np.array(row, dtype=np.int64) for row in rows)


def test_golden_case_of_four_classes():
    label, prediction = arrays([[0, 0, 1], [1, 255, 2]], [[0, 1, 1], [1, 0, 1]])
    found = score(count(label, prediction, 4))
    assert found.iou == (1 / 2, 1 / 2, 0, None)
    assert found.miou == pytest.approx(1 / 3)
    assert found.aacc == pytest.approx(3 / 5)
    assert found.accuracy == (1 / 2, 1, 0, None)
    assert found.macc == pytest.approx(1 / 2)


def test_totals_are_summed_before_dividing():
    total = count(*arrays([0], [0]), 2) + count(*arrays([0, 0, 0], [0, 1, 1]), 2)
    found = score(total)
    assert found.iou == (2 / 4, 0.0)
    assert found.miou == 0.25  # the mean over the images would be (1 + 1/6) / 2


def test_rows_are_truth_and_columns_prediction():
    confusion = count(*arrays([0, 0, 0, 1], [1, 1, 0, 1]), 2)
    assert confusion.tolist() == [[1, 2], [0, 1]]
    assert confusion.dtype == np.int64


def test_a_class_predicted_but_not_labelled_counts_as_zero():
    found = score(count(*arrays([0, 0], [0, 1]), 3))
    assert found.iou == (0.5, 0.0, None)
    assert found.accuracy == (0.5, None, None)
    assert found.miou == 0.25
    assert found.macc == 0.5


def test_a_split_without_labelled_pixels_has_no_score():
    found = score(count(*arrays([255, 255], [0, 1]), 2))
    assert (found.miou, found.aacc, found.macc) == (None, None, None)


LABELS = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 3, 255]), st.integers(0, 3)), min_size=1, max_size=60
)


@given(LABELS)
def test_scores_equal_the_reference(pairs):
    label, prediction = arrays(*zip(*pairs, strict=True))
    found, expected = score(count(label, prediction, 4)), None
    expected = reference.scores_of([(label, prediction)], 4)
    assert list(found.iou) == expected["iou"]
    assert list(found.accuracy) == expected["accuracy"]
    for key in ("miou", "aacc", "macc"):
        assert getattr(found, key) == pytest.approx(expected[key])


@given(LABELS, st.randoms(use_true_random=False))
def test_shuffled_pixels_give_the_same_counts(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    one = count(*arrays(*zip(*pairs, strict=True)), 4)
    other = count(*arrays(*zip(*shuffled, strict=True)), 4)
    assert np.array_equal(one, other)


@given(LABELS, LABELS)
def test_counts_of_images_add_up_to_the_count_of_all(first, second):
    parts = [count(*arrays(*zip(*pairs, strict=True)), 4) for pairs in (first, second)]
    whole = count(*arrays(*zip(*first, *second, strict=True)), 4)
    assert np.array_equal(parts[0] + parts[1], whole)
    assert whole.sum() == sum(truth != 255 for truth, _ in first + second)


def test_two_shapes_and_ids_outside_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        count(np.zeros((2, 2), dtype=np.int64), np.zeros((2, 3), dtype=np.int64), 2)
    with pytest.raises(ValueError, match=r"label ids 0\.\.2 are outside 0\.\.1"):
        count(*arrays([0, 2], [0, 1]), 2)
    with pytest.raises(ValueError, match=r"prediction ids 0\.\.255 are outside"):
        count(*arrays([0, 1], [0, 255]), 2)


def on_device(label, prediction, classes, dtype=torch.int64):
    label, prediction = (torch.from_numpy(np.array(ids)).to(dtype) for ids in (label, prediction))
    return count_on(label, prediction, classes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@given(LABELS)
def test_counts_on_the_device_equal_those_of_numpy(dtype, pairs):
    label, prediction = arrays(*zip(*pairs, strict=True))
    found = on_device(label, prediction, 4, dtype)
    assert found.dtype == torch.int64
    assert np.array_equal(found.numpy(), count(label, prediction, 4))


def test_a_byte_label_meets_a_long_prediction():
    label, prediction = arrays([[0, 0, 1], [1, 255, 254]], [[0, 1, 1], [1, 0, 1]])
    found = count_on(torch.from_numpy(label).to(torch.uint8), torch.from_numpy(prediction), 255)
    assert np.array_equal(found.numpy(), count(label, prediction, 255))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_the_device_refuses_two_shapes_and_ids_outside_the_classes(dtype):
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        on_device(np.zeros((2, 2)), np.zeros((2, 3)), 2, dtype)
    with pytest.raises(ValueError, match=r"label ids 0\.\.2 are outside 0\.\.1"):
        on_device([0, 2], [0, 1], 2, dtype)
    with pytest.raises(ValueError, match=r"prediction ids 0\.\.255 are outside"):
        on_device([0, 1], [0, 255], 2, dtype)
    with pytest.raises(ValueError, match=r"prediction ids 0\.\.3 are outside 0\.\.1"):
        on_device([0, 1, 255], [0, 3, 1], 2, dtype)
    assert on_device([0, 1, 255], [0, 1, 3], 2, dtype).sum() == 2  # an ignored pixel says nothing


def test_the_device_refuses_ids_no_byte_holds():
    for label, prediction in (([0, 256], [0, 0]), ([-1, 0], [0, 0])):
        with pytest.raises(ValueError, match="label ids"):
            on_device(label, prediction, 2)
    with pytest.raises(ValueError, match=r"prediction ids 0\.\.256"):
        on_device([0, 0], [0, 256], 2)


@given(LABELS)
def test_a_perfect_predictor_scores_one(pairs):
    label, _ = arrays(*zip(*pairs, strict=True))
    found = score(on_device(label, np.where(label == 255, 0, label), 4).numpy())
    there = {int(v) for v in label} - {255}
    assert found.iou == tuple(1.0 if c in there else None for c in range(4))
    expected = 1.0 if there else None
    assert (found.miou, found.aacc, found.macc) == (expected,) * 3


@given(LABELS, st.integers(0, 3))
def test_a_constant_predictor_scores_what_arithmetic_says(pairs, constant):
    label, _ = arrays(*zip(*pairs, strict=True))
    found = score(on_device(label, np.full_like(label, constant), 4).numpy())
    shares = [np.count_nonzero(label == c) for c in range(4)]
    total = sum(shares)
    if total == 0:
        assert found.miou is None
        return
    # Its own class: found / all; every other labelled class: nothing.
    classes = len({constant} | {c for c in range(4) if shares[c]})
    assert found.iou[constant] == shares[constant] / total
    assert found.aacc == shares[constant] / total
    assert found.miou == pytest.approx(shares[constant] / total / classes)
    assert found.macc == pytest.approx((shares[constant] > 0) / sum(n > 0 for n in shares))
