"""lazyclip.boxes: corners, torchvision's geometry, and the patches a box holds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from lazyclip.base.errors import UserError
from lazyclip.boxes import (
    RULES,
    Box,
    crop_view,
    from_inclusive,
    patch_hits,
    resized_size,
    squash_view,
    to_view,
)

sides = st.integers(20, 300)


def rows_and_columns(hits: torch.Tensor, grid: tuple[int, int]) -> tuple[list[int], list[int]]:
    plane = hits[0].reshape(grid)
    rows, columns = plane.any(dim=1), plane.any(dim=0)
    assert torch.equal(plane, rows[:, None] & columns[None, :])
    return rows.nonzero()[:, 0].tolist(), columns.nonzero()[:, 0].tolist()


def test_inclusive_corners_become_half_open_and_one_pixel_is_no_empty_box():
    assert from_inclusive([0, 0, 63, 63]) == Box(0, 0, 64, 64)
    assert from_inclusive([5, 7, 5, 7]) == Box(5, 7, 6, 8)
    assert from_inclusive([5, 7, 5, 7]).area == 1


@pytest.mark.parametrize(
    "corners",
    [[1, 2, 3], [1, 2, 3, 4, 5], [4, 0, 3, 9], [0, 9, 3, 4], [0, 0, "3", 4], [0, 0, math.nan, 4],
     [0, 0, math.inf, 4], [True, 0, 3, 4]],
)  # fmt: skip
def test_what_is_no_box_is_refused(corners):
    with pytest.raises(ValueError, match="box"):
        from_inclusive(corners)


@given(width=sides, height=sides, shorter=st.integers(8, 80))
def test_the_resized_size_is_torchvisions(width, height, shorter):
    resize = transforms.Resize(shorter, interpolation=InterpolationMode.NEAREST)
    assert resized_size(width, height, shorter) == resize(Image.new("L", (width, height))).size


@pytest.mark.parametrize(
    ("width", "height", "resize", "crop"),
    [(64, 64, 64, 64), (500, 333, 256, 224), (333, 500, 256, 224), (101, 64, 65, 64),
     (103, 197, 73, 64), (214, 100, 77, 64)],
)  # fmt: skip
def test_the_view_is_what_torchvision_cuts_out(width, height, resize, crop):
    across = np.broadcast_to(np.linspace(0, 255, width)[None, :], (height, width))
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    view = crop_view(width, height, resize, crop)
    new_width, new_height = resized_size(width, height, resize)
    resized = transforms.Resize(resize)
    crop_middle = transforms.CenterCrop(crop)
    for plane in (across, down):
        scaled = resized(Image.fromarray(np.uint8(np.round(plane))))
        assert scaled.size == (new_width, new_height)
        box = (view.left, view.top, view.left + crop, view.top + crop)
        assert np.array_equal(np.array(scaled.crop(box)), np.array(crop_middle(scaled)))


def test_odd_margins_are_rounded_half_to_even_as_torchvision_does():
    # 66 - 65 = 1: half a pixel goes to 0; 68 - 65 = 3: one and a half go to 2.
    assert crop_view(66, 65, 65, 65).left == 0
    assert crop_view(68, 65, 65, 65).left == 2


def test_a_box_moves_as_its_pixels_do():
    # 500 x 333 -> 384 x 256 (floor of 384.38) -> offset (80, 16) -> 224 x 224.
    view = crop_view(500, 333, 256, 224)
    assert view[2:] == (80, 16, 224, 224)
    box = to_view(Box(250, 166.5, 300, 200), view)
    assert box == pytest.approx((112, 112, 300 * 384 / 500 - 80, 200 * 256 / 333 - 16))


def test_a_box_is_clipped_to_the_view_and_one_outside_is_empty():
    view = crop_view(100, 50, 50, 50)  # columns 25..75 stay
    assert to_view(Box(0, 0, 50, 50), view) == Box(0, 0, 25, 50)
    assert to_view(Box(0, 0, 25, 50), view).area == 0
    assert to_view(Box(80, 0, 100, 50), view).area == 0


def test_squash_loses_nothing():
    assert to_view(Box(0, 0, 100, 50), squash_view(100, 50, 64, 32)) == Box(0, 0, 64, 32)
    assert to_view(Box(25, 10, 50, 20), squash_view(100, 50, 200, 25)) == Box(50, 5, 100, 10)


def test_a_crop_larger_than_the_resize_is_refused():
    with pytest.raises(ValueError, match="resize 60 and crop 64"):
        crop_view(100, 100, 60, 64)


@pytest.mark.parametrize(
    ("box", "rule", "expected"),
    [
        # A 32 px view of 4 x 4 patches of 8: centres at 4, 12, 20, 28. One axis at a time.
        ((4, 0, 20, 32), "centre", [0, 1]),  # 4 is in, 20 is out: half open
        ((4.5, 0, 20.5, 32), "centre", [1, 2]),
        ((5, 0, 11, 32), "centre", []),
        ((8, 0, 16, 32), "overlap", [1]),
        ((7.9, 0, 16.1, 32), "overlap", [0, 1, 2]),
        ((8, 0, 16, 32), "repo", [1, 2]),  # ends on a border: claims the next one too
        ((9, 0, 15, 32), "repo", [1]),
        ((9.9, 0, 15.9, 32), "repo", [1]),
        ((0, 0, 32, 32), "repo", [0, 1, 2, 3]),  # no patch beyond the grid
    ],
)
def test_which_columns_and_rows_a_rule_takes(box, rule, expected):
    _, columns = rows_and_columns(patch_hits([Box(*box)], (4, 4), (32, 32), rule), (4, 4))
    assert columns == expected
    turned = Box(box[1], box[0], box[3], box[2])
    rows, _ = rows_and_columns(patch_hits([turned], (4, 4), (32, 32), rule), (4, 4))
    assert rows == expected


def test_patches_lie_row_by_row_and_need_not_be_square():
    hits = patch_hits([Box(0, 8, 4, 16)], (2, 3), (16, 12), "centre")
    assert hits.tolist() == [[False, False, False, True, False, False]]


@pytest.mark.parametrize("rule", list(RULES))
def test_an_empty_box_holds_nothing(rule):
    boxes = torch.tensor([[0.0, 0, 0, 32], [40, 0, 40, 40], [4, 12, 9, 12]])
    assert not patch_hits(boxes, (4, 4), (32, 32), rule).any()


corner = st.floats(0, 64, allow_nan=False)


@given(xs=st.tuples(corner, corner), ys=st.tuples(corner, corner))
def test_centre_is_within_overlap_and_overlap_within_repo(xs, ys):
    box = Box(min(xs), min(ys), max(xs), max(ys))
    centre, overlap, repo = (
        patch_hits([box], (8, 8), (64, 64), rule) for rule in ("centre", "overlap", "repo")
    )
    assert bool((centre <= overlap).all())
    assert bool((overlap <= repo).all())


@given(
    x0=st.integers(0, 63),
    y0=st.integers(0, 63),
    width=st.integers(1, 64),
    height=st.integers(1, 64),
)
def test_rules_agree_with_pixels_counted_one_by_one(x0, y0, width, height):
    box = Box(x0, y0, min(64, x0 + width), min(64, y0 + height))
    pixels = np.zeros((64, 64), bool)
    pixels[y0 : y0 + height, x0 : x0 + width] = True
    blocks = pixels.reshape(8, 8, 8, 8).swapaxes(1, 2)  # row, column, pixel row, pixel column
    overlap = patch_hits([box], (8, 8), (64, 64), "overlap").reshape(8, 8).numpy()
    assert np.array_equal(overlap, blocks.any(axis=(2, 3)))
    # The centre of a patch of 8 is the corner shared by pixels 3 and 4: pixel 4 begins there.
    centre = patch_hits([box], (8, 8), (64, 64), "centre").reshape(8, 8).numpy()
    assert np.array_equal(centre, blocks[:, :, 4, 4])


def covered(side: float) -> float:
    """Mean chance that a box of relative side covers a point of the middle 7/8, along one axis."""
    points = np.linspace(1 / 16, 15 / 16, 4001)
    low, high = np.maximum(points - side, 0), np.minimum(points, 1 - side)
    return float(np.mean((high - low) / (1 - side)))


@pytest.mark.parametrize(
    ("area", "centre", "repo"),
    [(0.05, 0.06, 0.10), (0.10, 0.13, 0.18), (0.20, 0.25, 0.32), (0.25, 0.32, 0.39),
     (0.50, 0.63, 0.72)],
)  # fmt: skip
def test_chance_of_square_boxes_after_the_released_crop(area, centre, repo):
    """Uniform positions, resize 256, crop 224, 14 x 14 patches: the crop enlarges the box."""
    picture, view = 512, crop_view(512, 512, 256, 224)
    side = math.sqrt(area) * picture
    starts = np.linspace(0, picture - side, 61)
    boxes = [to_view(Box(x, y, x + side, y + side), view) for x in starts for y in starts]
    boxes = [box for box in boxes if box.area > 0]

    def chance(rule: str) -> float:
        return float(patch_hits(boxes, (14, 14), (224, 224), rule).double().mean())

    assert chance("centre") == pytest.approx(covered(math.sqrt(area)) ** 2, abs=0.012)
    assert chance("centre") == pytest.approx(centre, abs=0.012)
    assert chance("repo") == pytest.approx(repo, abs=0.012)


def test_shapes_grids_and_rules_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="B x 4"):
        patch_hits(torch.zeros(4), (2, 2), (8, 8), "centre")
    with pytest.raises(ValueError, match="does not divide"):
        patch_hits(torch.zeros(1, 4), (3, 2), (8, 8), "centre")
    with pytest.raises(UserError, match="unknown rule 'touch'; known: "):
        patch_hits(torch.zeros(1, 4), (2, 2), (8, 8), "touch")
