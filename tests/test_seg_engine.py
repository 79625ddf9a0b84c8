"""A picture through all steps, against the step-by-step reference, and a tower between them."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eval.segmentation.engine import WAITING, batched_maps, cosine_maps, predict, segment
from eval.segmentation.loading import make_item
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
    found = segment(image, fast_maps(linear), protocol, OWNERS, patch=PATCH, batch_size=3)
    assert found.shape == size
    assert found.dtype == np.uint8
    clear = margin > 0.02  # a grey level of the resized picture moves a score by less
    assert clear.mean() > 0.9
    assert np.array_equal(found[clear], expected[clear])
    assert len(np.unique(found)) > 1


def test_pamr_stands_between_the_maps_and_the_decision():
    size = (30, 38)
    protocol = protocol_of(short=32, window=24, stride=16, pamr="naclip", threshold=0.3)
    image = blocks(*size, seed=2)
    linear = weights(5)
    about = (protocol.mean, protocol.std)
    canvas = reference.canvas_of(
        image, slow_maps(linear), protocol.short, protocol.cap, protocol.window,
        protocol.stride, *about,
    )  # fmt: skip
    full = reference.bilinear_maps(canvas, *size)
    resized = reference.resize_uint8(image, *reference.target_size(*size, 32, protocol.cap))
    pixels = np.moveaxis((resized - np.array(about[0])) / np.array(about[1]), -1, 0)
    refined = reference.pamr(full, reference.bilinear_maps(pixels, *size), 10, (8, 16))
    scores = reference.class_scores(refined, OWNERS, 3, protocol.logit_scale)
    expected, margin = reference.decide(scores, protocol.threshold)
    found = segment(image, fast_maps(linear), protocol, OWNERS, patch=PATCH)
    clear = margin > 0.02
    assert clear.mean() > 0.8
    assert np.array_equal(found[clear], expected[clear])
    plain = segment(
        image, fast_maps(linear), dataclasses.replace(protocol, pamr="off"), OWNERS, patch=PATCH
    )
    assert not np.array_equal(found, plain)


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

    found = segment(halves(375, 500), maps, protocol, (0, 1), patch=patch)
    assert found.shape == (375, 500)
    blur = int(patch * 500 / 448) + 1
    assert np.all(found[:, : 250 - blur] == 0)
    assert np.all(found[:, 250 + blur :] == 1)


# --- many pictures --------------------------------------------------------------------------------


SIZES = [(60, 50), (50, 60), (60, 50), (33, 90), (48, 48), (90, 33), (61, 50)]


def items(protocol):
    return [
        make_item(f"p{i}", blocks(*size, seed=i), None, protocol, PATCH)
        for i, size in enumerate(SIZES)
    ]


@pytest.mark.parametrize("window", [32, 0])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
def test_pictures_share_batches_and_keep_their_label_maps(window, batch_size):
    protocol = protocol_of(short=48, window=window, stride=16 if window else 0)
    maps = fast_maps(weights(3))
    alone = {
        f"p{i}": segment(blocks(*size, seed=i), maps, protocol, OWNERS, patch=PATCH, batch_size=1)
        for i, size in enumerate(SIZES)
    }
    found = [
        (item.name, labels.numpy())
        for item, labels in predict(items(protocol), maps, protocol, OWNERS, batch_size)
    ]
    assert sorted(name for name, _ in found) == sorted(alone)
    for name, labels in found:
        assert np.array_equal(labels, alone[name]), name


def test_batches_are_full_where_windows_have_one_size():
    protocol = protocol_of(short=48, window=32, stride=16)
    seen = []

    def maps(windows):
        seen.append(len(windows))
        return fast_maps(weights(3))(windows)

    pictures = items(protocol)
    total = sum(len(item.windows) for item in pictures)
    assert len(list(batched_maps(pictures, maps, 4))) == len(pictures)
    assert seen == [4] * (total // 4) + [total % 4] * bool(total % 4)


def test_pictures_that_share_no_size_do_not_pile_up():
    protocol = protocol_of(short=48, window=0, stride=0)
    started, ended = 0, 0

    def source():
        nonlocal started
        for i in range(30):
            started += 1
            assert started - ended <= 2 * WAITING + 1
            yield make_item(f"p{i}", blocks(50, 60 + 9 * i, seed=i), None, protocol, PATCH)

    for _ in batched_maps(source(), fast_maps(weights(3)), 2):
        ended += 1
    assert ended == 30


def test_a_picture_too_narrow_for_a_patch_is_refused():
    protocol = protocol_of(short=48, cap=100, window=32, stride=16)
    maps = fast_maps(weights(3))
    with pytest.raises(UserError, match="holds no patch of 8"):
        segment(blocks(5, 200, seed=0), maps, protocol, OWNERS, patch=PATCH)
    with pytest.raises(UserError, match="900x1 pixels shrink to 100x0"):
        segment(blocks(1, 900, seed=0), maps, protocol, OWNERS, patch=PATCH)


# --- a tower --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LaSt-ViT-nano", "ViT-nano"])
def test_cosine_maps_are_the_cosines_of_dense_features_and_queries(name):
    built = build(name, random_weights_seed=3)
    draw = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(4, built.info.embed_dim, generator=draw), dim=1)
    windows = torch.randn(2, 3, 64, 64, generator=draw)
    found = cosine_maps(built.model, queries)(windows)
    with torch.no_grad():
        dense = encode_dense(built.model, windows)
    expected = [reference.cosines(d.double().numpy(), queries.double().numpy()) for d in dense]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=1e-5)


def test_bfloat16_stays_near_the_float32_cosines():
    built = build("LaSt-ViT-nano", random_weights_seed=3)
    draw = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(4, built.info.embed_dim, generator=draw), dim=1)
    windows = torch.randn(1, 3, 64, 64, generator=draw)
    exact = cosine_maps(built.model, queries)(windows)
    rough = cosine_maps(built.model, queries, precision="amp_bf16")(windows)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 2e-2


def test_features_that_are_not_finite_stop_the_run():
    built = build("ViT-nano", random_weights_seed=3)
    with torch.no_grad():
        built.model.visual.proj[0, 0] = torch.nan
    maps = cosine_maps(built.model, torch.ones(2, built.info.embed_dim))
    with pytest.raises(UserError, match=r"dense features are not finite.*--precision fp32"):
        maps(torch.zeros(1, 3, 64, 64))
