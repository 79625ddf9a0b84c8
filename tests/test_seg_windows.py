"""Sizes, resizing, windows and stitching: golden cases, an independent reference, properties."""

import dataclasses

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.segmentation.protocol import read_task
from eval.segmentation.windows import (
    Box,
    cut,
    cut_windows,
    drop_remainder,
    make_plan,
    normalise,
    resize_image,
    stitch,
    target_size,
    upsample,
    window_boxes,
)
from lazyclip.base.errors import UserError
from tests import reference_seg as reference


@pytest.mark.parametrize(
    ("width", "height", "short", "new_width", "new_height"),
    [
        (500, 375, 336, 448, 336),
        (500, 333, 336, 505, 336),
        (640, 480, 448, 597, 448),
        (2048, 1024, 560, 1120, 560),
        (683, 512, 336, 448, 336),
        (640, 59, 336, 2048, 189),  # the cap on the long side bites
        (3000, 100, 336, 2048, 68),
    ],
)
def test_target_sizes_are_those_of_mmcv(width, height, short, new_width, new_height):
    assert target_size(height, width, short, 2048) == (new_height, new_width)
    assert target_size(width, height, short, 2048) == (new_width, new_height)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 600))
def test_target_sizes_equal_the_reference(height, width, short):
    expected = reference.target_size(height, width, short, 2048)
    assert target_size(height, width, short, 2048) == expected


def starts(boxes):
    return sorted({b.y0 for b in boxes}), sorted({b.x0 for b in boxes})


def test_windows_of_golden_sizes_lie_where_sclip_puts_them():
    boxes = window_boxes(336, 448, 224, 112)
    assert starts(boxes) == ([0, 112], [0, 112, 224])
    assert len(boxes) == 6
    boxes = window_boxes(336, 500, 224, 112)
    assert starts(boxes) == ([0, 112], [0, 112, 224, 276])
    assert len(boxes) == 8
    assert [b.x0 for b in window_boxes(224, 225, 224, 112)] == [0, 1]
    assert window_boxes(200, 300, 224, 112) == [Box(0, 200, 0, 224), Box(0, 200, 76, 300)]
    assert len(window_boxes(560, 1120, 224, 112)) == 36
    assert len(window_boxes(448, 597, 224, 112)) == 15
    assert len(window_boxes(448, 597, 448, 224)) == 2


def test_window_zero_is_the_whole_image():
    assert window_boxes(336, 500, 0, 0) == [Box(0, 336, 0, 500)]


SIDES = st.integers(1, 90)


@given(SIDES, SIDES, st.integers(1, 40), st.data())
def test_windows_equal_the_reference_and_cover_the_image(height, width, window, data):
    stride = data.draw(st.integers(1, window))
    boxes = window_boxes(height, width, window, stride)
    assert [tuple(b) for b in boxes] == [
        (b[0], b[1], b[2], b[3]) for b in reference.windows(height, width, window, stride)
    ]
    assert {(b.y1 - b.y0, b.x1 - b.x0) for b in boxes} == {
        (min(height, window), min(width, window))
    }
    covered = np.zeros((height, width), dtype=bool)
    for b in boxes:
        covered[b.y0 : b.y1, b.x0 : b.x1] = True
    assert covered.all()


def test_bilinear_golden_case():
    line = upsample(torch.tensor([[[0.0, 1.0]]]), (1, 4))
    assert line.flatten().tolist() == [0.0, 0.25, 0.75, 1.0]


@pytest.mark.parametrize("size", [(7, 5), (31, 44), (12, 9)])
def test_upsampling_equals_the_reference(size):
    maps = np.random.default_rng(0).normal(size=(3, 11, 13))
    ours = upsample(torch.from_numpy(maps), size).numpy()
    np.testing.assert_allclose(ours, reference.bilinear_maps(maps, *size), atol=1e-12)


def pictures():
    draw = np.random.default_rng(1)
    noise = draw.integers(0, 256, (47, 61, 3), dtype=np.uint8)
    y, x = np.mgrid[0:47, 0:61]
    smooth = np.stack([4 * x, 5 * y, 2 * (x + y)], axis=-1).clip(0, 255).astype(np.uint8)
    return {"noise": noise, "smooth": smooth}


@pytest.mark.parametrize("kind", ["noise", "smooth"])
@pytest.mark.parametrize("size", [(42, 55), (26, 33), (94, 122)])
def test_resized_pictures_are_within_one_grey_level_of_the_reference(kind, size):
    picture = pictures()[kind]
    ours = resize_image(picture, size)
    assert ours.dtype == np.uint8
    assert ours.shape == (*size, 3)
    apart = np.abs(ours.astype(int) - reference.resize_uint8(picture, *size).astype(int))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.005  # float32 against float64 at halves


@pytest.mark.parametrize("kind", ["noise", "smooth"])
@pytest.mark.parametrize("size", [(42, 55), (26, 33), (94, 122)])
def test_resized_pictures_are_within_one_grey_level_of_opencv(kind, size):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed; it is no dependency of ours")
    picture = pictures()[kind]
    theirs = cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    assert np.abs(resize_image(picture, size).astype(int) - theirs.astype(int)).max() <= 1


def test_a_picture_of_the_right_size_is_left_alone():
    picture = pictures()["noise"]
    assert np.array_equal(resize_image(picture, picture.shape[:2]), picture)


def test_a_read_only_picture_is_resized_without_a_warning():
    picture = pictures()["noise"]
    picture.setflags(write=False)
    assert resize_image(picture, (20, 20)).shape == (20, 20, 3)
    assert normalise(picture, (0, 0, 0), (1, 1, 1)).shape == (3, 47, 61)


def test_normalising_uses_the_values_of_openai_in_red_green_blue_order():
    protocol = read_task("voc20").protocol
    pixel = np.array([[[255, 0, 128]]], dtype=np.uint8)
    ours = normalise(pixel, protocol.mean, protocol.std).flatten().numpy()
    mean = np.array(open_clip.OPENAI_DATASET_MEAN)
    std = np.array(open_clip.OPENAI_DATASET_STD)
    np.testing.assert_allclose(ours, (pixel.flatten() / 255 - mean) / std, atol=1e-4)


def test_averaging_golden_case():
    boxes = window_boxes(1, 6, 4, 2)
    maps = [torch.zeros(1, 1, 4), torch.ones(1, 1, 4)]
    assert stitch(maps, boxes, (1, 6)).flatten().tolist() == [0, 0, 0.5, 0.5, 1, 1]


@given(SIDES, SIDES, st.integers(1, 40), st.data())
def test_stitching_the_windows_of_an_image_returns_the_image(height, width, window, data):
    stride = data.draw(st.integers(1, window))
    image = torch.randn(2, height, width, generator=torch.Generator().manual_seed(height))
    boxes = window_boxes(height, width, window, stride)
    canvas = stitch(iter(cut_windows(image, boxes)), boxes, (height, width))
    torch.testing.assert_close(canvas, image, atol=1e-5, rtol=1e-5)


def test_maps_are_stretched_over_their_whole_window():
    boxes = window_boxes(8, 8, 8, 8)
    canvas = stitch([torch.tensor([[[0.0, 1.0]]])], boxes, (8, 8))
    expected = reference.bilinear_maps(np.array([[[0.0, 1.0]]]), 8, 8)
    np.testing.assert_allclose(canvas.numpy(), expected, atol=1e-6)


def test_windows_that_leave_a_gap_are_refused():
    with pytest.raises(ValueError, match="do not cover"):
        stitch([torch.zeros(1, 2, 2)], [Box(0, 2, 0, 2)], (2, 3))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        stitch([torch.zeros(1, 2, 2)], window_boxes(2, 4, 2, 2), (2, 4))


def test_the_remainder_is_cut_at_the_right_and_bottom():
    window = torch.arange(35.0).reshape(1, 1, 5, 7)
    assert torch.equal(drop_remainder(window, 3), window[..., :3, :6])
    assert torch.equal(drop_remainder(window, 5), window[..., :5, :5])


def test_a_window_without_a_whole_patch_is_refused():
    with pytest.raises(UserError, match="7x5 pixels holds no patch of 6"):
        drop_remainder(torch.zeros(1, 3, 5, 7), 6)


def protocol_of(**values):
    return dataclasses.replace(read_task("voc20").protocol, **values)


@pytest.mark.parametrize(
    ("size", "values", "windows", "window", "inner", "pad"),
    [
        ((375, 500), {}, 6, (224, 224), (224, 224), (0, 0)),
        ((480, 640), {"short": 448}, 15, (224, 224), (224, 224), (0, 0)),
        ((375, 500), {"window": 0}, 1, (336, 448), (336, 448), (0, 0)),
        ((333, 500), {"window": 0}, 1, (336, 505), (336, 496), (0, 0)),
        ((333, 500), {"window": 0, "remainder": "pad"}, 1, (336, 505), (336, 512), (0, 3)),
        ((59, 640), {}, 18, (189, 224), (176, 224), (0, 0)),
        ((59, 640), {"remainder": "pad"}, 18, (189, 224), (192, 224), (1, 0)),
        ((640, 59), {"remainder": "pad"}, 18, (224, 189), (224, 192), (0, 1)),
        ((5, 100), {"short": 5, "remainder": "pad"}, 1, (5, 100), (16, 112), (5, 6)),
    ],
)
def test_plans_of_golden_sizes(size, values, windows, window, inner, pad):
    plan = make_plan(*size, protocol_of(**values), 16)
    assert plan.original == size
    assert len(plan.boxes) == windows
    assert (plan.window, plan.inner, plan.pad) == (window, inner, pad)
    # A dropped remainder lies under the stretched map, a padded one under the map itself.
    assert plan.stretched == (inner if values.get("remainder") == "pad" else window)


@pytest.mark.parametrize("remainder", ["drop", "pad"])
@pytest.mark.parametrize("size", [(47, 61), (19, 61), (61, 19), (40, 40)])
def test_the_towers_input_is_the_resized_picture_cut_and_mended(size, remainder):
    protocol = protocol_of(short=40, cap=100, window=30, stride=13, remainder=remainder)
    picture = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    plan = make_plan(*size, protocol, 8)
    found = cut(picture, plan, protocol)
    height, width = reference.target_size(*size, 40, 100)
    small = reference.resize_uint8(picture, height, width)
    pixels = (small - np.array(protocol.mean)) / np.array(protocol.std)
    boxes = reference.windows(height, width, 30, 13)
    assert len(found) == len(boxes)
    for window, (y0, y1, x0, x1) in zip(found, boxes, strict=True):
        expected = pixels[y0:y1, x0:x1]
        if remainder == "pad":
            expected, at = reference.padded(expected, 8)
            assert plan.pad == at
        else:
            expected = expected[: (y1 - y0) // 8 * 8, : (x1 - x0) // 8 * 8]
        assert expected.shape[:2] == plan.inner
        grey_level = 1 / min(protocol.std)
        np.testing.assert_allclose(
            window.permute(1, 2, 0).numpy(), expected, atol=1.01 * grey_level
        )
        zeros = np.all(expected == 0, axis=-1)
        assert not window.permute(1, 2, 0).numpy()[zeros].any()


@pytest.mark.parametrize(("size", "patch"), [((8, 13), 8), ((13, 9), 8), ((9, 13), 5)])
def test_a_padded_windows_map_is_stretched_over_the_padding_and_cut(size, patch):
    protocol = protocol_of(short=min(size), window=0, remainder="pad")
    plan = make_plan(*size, protocol, patch)
    maps = np.random.default_rng(0).normal(size=(2, plan.inner[0] // patch, plan.inner[1] // patch))
    found = stitch([torch.from_numpy(maps)], plan.boxes, plan.size, plan.stretched, plan.pad)
    top, left = plan.pad
    whole = reference.bilinear_maps(maps, *plan.inner)
    expected = whole[:, top : top + size[0], left : left + size[1]]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_pictures_too_narrow_are_refused_before_they_are_read_and_padding_takes_some():
    with pytest.raises(UserError, match="3000x1 pixels shrink to 1000x0 at a long side of 1000"):
        make_plan(1, 3000, protocol_of(cap=1000), 16)
    with pytest.raises(UserError, match="window of 224x2 pixels holds no patch of 16"):
        make_plan(1, 900, protocol_of(), 16)
    assert make_plan(1, 900, protocol_of(remainder="pad"), 16).inner == (16, 224)


def test_a_picture_of_another_size_than_its_plan_is_refused():
    protocol = protocol_of()
    with pytest.raises(ValueError, match="plan for"):
        cut(np.zeros((40, 50, 3), dtype=np.uint8), make_plan(50, 40, protocol, 16), protocol)
