"""Counts and scores: golden cases, the reference, and laws of sums."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.segmentation.confusion import count, score
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
