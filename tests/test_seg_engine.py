"""A picture through all steps, against the step-by-step reference, and a tower between them."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eval.segmentation.engine import cosine_maps, segment
from eval.segmentation.protocol import read_task
from lazyclip.base.errors import UserError
from lazyclip.dense import encode_dense
from lazyclip.factory import build
from tests import reference_seg as reference

PATCH = 8
OWNERS = (0, 1, 2, 1, 0)


def protocol_of(**values):
    return dataclasses.replace(read_task("voc20").protocol, classes=3, **values)


def weights(seed=0):
    return np.random.default_rng(seed).normal(size=(len(OWNERS), 3)) * 0.15


def fast_maps(linear):
    """Cosines as a bounded linear function of each patch's mean colour, in torch."""

    def maps(windows):
        means = F.avg_pool2d(windows.double(), PATCH)  # drops what is no whole patch
        return torch.einsum("nchw,qc->nqhw", means, torch.from_numpy(linear)).tanh().float()

    return maps


def slow_maps(linear):
    """The same function for one window H x W x 3, in numpy."""

    def maps(window):
        rows, columns = window.shape[0] // PATCH, window.shape[1] // PATCH
        out = np.zeros((len(linear), rows, columns))
        for y in range(rows):
            for x in range(columns):
                patch = window[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
                out[:, y, x] = np.tanh(linear @ patch.reshape(-1, 3).mean(axis=0))
        return out

    return maps


def blocks(height, width, seed):
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((9, 9, 1), dtype=np.uint8))[:height, :width]


CASES = [
    ((50, 66), {"short": 48, "window": 32, "stride": 16}),
    ((50, 66), {"short": 48, "window": 32, "stride": 16, "threshold": 0.45, "area": 0.2}),
    ((41, 37), {"short": 30, "window": 30, "stride": 11, "threshold": 0.3}),  # 30 = 3 patches + 6
    ((30, 90), {"short": 24, "window": 40, "stride": 20}),  # shorter than the window
    ((26, 130), {"short": 48, "cap": 120, "window": 20, "stride": 20}),  # the cap bites
    ((44, 52), {"short": 40, "window": 0, "stride": 0, "area": 0.1}),  # the whole image
]


@pytest.mark.parametrize(("size", "values"), CASES)
def test_label_maps_equal_the_step_by_step_reference(size, values):
    protocol = protocol_of(**values)
    image = blocks(*size, seed=size[0])
    linear = weights(size[1])
    canvas = reference.canvas_of(
        image, slow_maps(linear), protocol.short, protocol.cap, protocol.window,
        protocol.stride, protocol.mean, protocol.std,
    )  # fmt: skip
    full = reference.bilinear_maps(canvas, *size)
    scores = reference.class_scores(full, OWNERS, 3, protocol.logit_scale)
    expected, margin = reference.decide(scores, protocol.threshold, protocol.area)
    found = segment(image, fast_maps(linear), protocol, OWNERS, batch_size=3)
    assert found.shape == size
    assert found.dtype == np.int64
    clear = margin > 0.02  # a grey level of the resized picture moves a score by less
    assert clear.mean() > 0.9
    assert np.array_equal(found[clear], expected[clear])
    assert len(np.unique(found)) > 1


def halves(height, width):
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[:, : width // 2] = (255, 0, 0)
    image[:, width // 2 :] = (0, 0, 255)
    return image


def test_a_red_and_a_blue_half_are_parted_in_the_middle():
    protocol = dataclasses.replace(read_task("voc20").protocol, classes=2)
    linear = np.array([[0.1, 0.0, 0.0], [0.0, 0.0, 0.1]])
    patch = 16

    def maps(windows):
        means = F.avg_pool2d(windows, patch)
        return torch.einsum("nchw,qc->nqhw", means, torch.from_numpy(linear).float())

    found = segment(halves(375, 500), maps, protocol, (0, 1))
    assert found.shape == (375, 500)
    blur = int(patch * 500 / 448) + 1
    assert np.all(found[:, : 250 - blur] == 0)
    assert np.all(found[:, 250 + blur :] == 1)


def test_the_batch_size_does_not_change_the_label_map():
    protocol = protocol_of(short=48, window=32, stride=16)
    image = blocks(60, 50, seed=4)
    maps = fast_maps(weights(3))
    one = segment(image, maps, protocol, OWNERS, batch_size=1)
    assert np.array_equal(one, segment(image, maps, protocol, OWNERS, batch_size=100))


def test_a_picture_too_narrow_for_a_patch_is_refused():
    protocol = protocol_of(short=48, cap=100, window=32, stride=16)
    built = build("ViT-nano")
    maps = cosine_maps(built.model, torch.ones(5, 128), patch=PATCH)
    with pytest.raises(UserError, match="holds no patch of 8"):
        segment(blocks(5, 200, seed=0), maps, protocol, OWNERS)
    with pytest.raises(UserError, match="900x1 pixels shrink to 100x0"):
        segment(blocks(1, 900, seed=0), maps, protocol, OWNERS)


@pytest.mark.parametrize("name", ["LaSt-ViT-nano", "ViT-nano"])
def test_cosine_maps_are_the_cosines_of_dense_features_and_queries(name):
    built = build(name, random_weights_seed=3)
    draw = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(4, built.info.embed_dim, generator=draw), dim=1)
    windows = torch.randn(2, 3, 70, 65, generator=draw)
    found = cosine_maps(built.model, queries, patch=PATCH)(windows)
    with torch.no_grad():
        dense = encode_dense(built.model, windows[..., :64, :64])
    expected = [reference.cosines(d.double().numpy(), queries.double().numpy()) for d in dense]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=1e-5)


def test_bfloat16_stays_near_the_float32_cosines():
    built = build("LaSt-ViT-nano", random_weights_seed=3)
    draw = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(4, built.info.embed_dim, generator=draw), dim=1)
    windows = torch.randn(1, 3, 64, 64, generator=draw)
    exact = cosine_maps(built.model, queries, patch=PATCH)(windows)
    rough = cosine_maps(built.model, queries, patch=PATCH, precision="amp_bf16")(windows)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 2e-2
