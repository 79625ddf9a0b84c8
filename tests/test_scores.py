"""lazyclip.scores: the cosine, the first maximum, and the references beside Point-in-Box."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lazyclip
from lazyclip.scores import (
    centre_share,
    chance_share,
    first_maximum,
    patch_score,
    point_in_box,
    wilson_interval,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- patch score ---------------------------------------------------------------------------------


def test_the_score_is_the_cosine_in_hand_computed_cases():
    x = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]]])
    q = torch.tensor([[0.5, 0.0]])
    assert torch.allclose(patch_score(x, q), torch.tensor([[0.6, 0.0, -1.0, 0.0]]), atol=1e-7)
    assert lazyclip.patch_score is patch_score


def test_the_score_agrees_with_float64_loops():
    x, q = draw(3, 10, 17), draw(3, 17, seed=1)
    expected = np.zeros((3, 10))
    for b in range(3):
        for n in range(10):
            p, g = x[b, n].double().numpy(), q[b].double().numpy()
            expected[b, n] = (p * g).sum() / math.sqrt((p * p).sum() * (g * g).sum())
    np.testing.assert_allclose(patch_score(x, q).numpy(), expected, atol=1e-6)
    exact = patch_score(x.double(), q.double())
    assert exact.dtype == torch.float64
    assert patch_score(x.double(), q).dtype == torch.float32
    np.testing.assert_allclose(exact.numpy(), expected, atol=1e-14)


@given(
    exponent=st.sampled_from([-38, -25, -10, 0, 10, 25, 37]),
    other=st.sampled_from([-38, -25, 0, 25, 37]),
)
def test_lengths_do_not_matter_however_extreme(exponent, other):
    x, q = draw(2, 5, 8).clamp(-2, 2), draw(2, 8, seed=3).clamp(-2, 2)
    scaled = patch_score(x * 10.0**exponent, q * 10.0**other)
    assert torch.allclose(scaled, patch_score(x, q), atol=1e-5)


def test_zero_vectors_score_zero_on_either_side():
    x = draw(2, 4, 6)
    x[0, 2] = 0
    assert patch_score(x, draw(2, 6))[0, 2] == 0
    assert not patch_score(x, torch.zeros(2, 6)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_out_as_float32_even_under_autocast(dtype):
    x, q = draw(2, 4, 64).to(dtype), draw(2, 64, seed=1).to(dtype)
    expected = patch_score(x.float(), q.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = patch_score(x, q)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_permuting_patches_permutes_scores():
    x, q = draw(1, 9, 5), draw(1, 5, seed=2)
    order = torch.tensor([3, 0, 8, 1, 2, 7, 6, 5, 4])
    assert torch.equal(patch_score(x[:, order], q), patch_score(x, q)[:, order])


@pytest.mark.parametrize(
    ("x", "q"), [((2, 4, 6), (2, 5)), ((2, 4, 6), (3, 6)), ((4, 6), (4, 6)), ((2, 4, 6), (2, 1, 6))]
)
def test_shapes_that_do_not_fit_are_refused_with_both(x, q):
    with pytest.raises(ValueError, match="do not fit") as caught:
        patch_score(torch.ones(x), torch.ones(q))
    assert str(x) in str(caught.value)
    assert str(q) in str(caught.value)


# --- Point-in-Box --------------------------------------------------------------------------------


def test_the_lowest_index_wins_a_tie_and_zeros_are_one_value():
    scores = torch.tensor([[0.1, 0.9, 0.9], [0.0, -0.0, -1.0], [-0.0, 0.0, -1.0], [2.0, 2.0, 2.0]])
    assert first_maximum(scores).tolist() == [1, 0, 0, 0]


def test_ties_are_ties_of_float32():
    # The second differs in float64 only.
    scores = torch.tensor([[0.5, 0.5 + 1e-12]], dtype=torch.float64)
    assert first_maximum(scores).tolist() == [0]


@given(
    values=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=5)
)
def test_the_first_maximum_is_pythons(values):
    scores = torch.tensor(values, dtype=torch.float32)
    assert first_maximum(scores).tolist() == [row.index(max(row)) for row in values]


def test_an_image_counts_when_its_best_patch_is_in_the_box():
    scores = torch.tensor([[0.1, 0.8, 0.3, 0.2], [0.9, 0.1, 0.1, 0.2], [0.5, 0.5, 0.0, 0.0]])
    hits = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 1], [0, 1, 0, 0]]).bool()
    assert point_in_box(scores, hits).tolist() == [True, False, False]
    assert chance_share(hits).tolist() == [0.5, 0.75, 0.25]


def test_a_random_score_hits_as_often_as_chance_says():
    hits = torch.rand(4000, 16, generator=torch.Generator().manual_seed(1)) < 0.3
    share = point_in_box(draw(4000, 16, seed=2), hits).double().mean().item()
    assert share == pytest.approx(chance_share(hits).mean().item(), abs=0.03)


def test_nan_scores_and_other_shapes_are_refused():
    hits = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="1 of 2 images hold NaN"):
        point_in_box(torch.tensor([[0.0, 1, 2], [0, math.nan, 1]]), hits)
    with pytest.raises(ValueError, match="do not fit"):
        point_in_box(torch.zeros(2, 4), hits)
    with pytest.raises(ValueError, match="bool"):
        point_in_box(torch.zeros(2, 3), hits.float())


def test_the_middle_is_four_patches_of_an_even_grid_one_of_an_odd_two_of_a_mixed():
    even = torch.zeros(1, 16, dtype=torch.bool)
    even[0, [5, 6, 9]] = True  # three of the four middle patches 5, 6, 9, 10
    assert centre_share(even, (4, 4)).tolist() == [0.75]
    odd = torch.zeros(1, 9, dtype=torch.bool)
    odd[0, 4] = True
    assert centre_share(odd, (3, 3)).tolist() == [1.0]
    mixed = torch.zeros(1, 12, dtype=torch.bool)
    mixed[0, 5] = True  # 3 x 4: the middle is patches 5 and 6
    assert centre_share(mixed, (3, 4)).tolist() == [0.5]
    with pytest.raises(ValueError, match="does not fit"):
        centre_share(mixed, (4, 4))


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    # Solutions of (p - s)^2 = z^2 s (1 - s) / n, worked by hand for z = 1.96.
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0),
     (81, 263, 0.2553, 0.3662)],
)  # fmt: skip
def test_wilsons_interval_in_known_cases(count, n, low, high):
    assert wilson_interval(count, n) == pytest.approx((low, high), abs=1e-4)


@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_both_ends_of_wilsons_interval_solve_its_equation(n, share):
    count = round(share * n)
    low, high = wilson_interval(count, n, z=2.0)
    assert 0 <= low <= count / n <= high <= 1
    for end in (low, high):
        assert (count / n - end) ** 2 == pytest.approx(4 * end * (1 - end) / n, abs=1e-9)


def test_no_interval_without_trials():
    for count, n in ((0, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="no share"):
            wilson_interval(count, n)
