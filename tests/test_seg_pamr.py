"""PAMR against a pixel-by-pixel float64 version, and its laws."""

import numpy as np
import pytest
import torch

from eval.segmentation import pamr
from eval.segmentation.pamr import SETTINGS, affinity, refine
from tests import reference_seg as reference


def case(size=(11, 14), queries=3, seed=0):
    draw = np.random.default_rng(seed)
    return draw.uniform(-1, 1, (queries, *size)), draw.normal(size=(3, *size))


@pytest.mark.parametrize("setting", ["naclip", "original"])
@pytest.mark.parametrize("size", [(11, 14), (40, 5)])
def test_refined_maps_equal_the_reference(setting, size):
    maps, image = case(size)
    chosen = SETTINGS[setting]
    expected = reference.pamr(maps, image, chosen.iterations, chosen.dilations)
    found = refine(torch.from_numpy(maps).float(), torch.from_numpy(image).float(), setting)
    np.testing.assert_allclose(found.numpy(), expected, atol=5e-6)
    exact = refine(torch.from_numpy(maps), torch.from_numpy(image), setting)
    np.testing.assert_allclose(exact.numpy(), expected, atol=1e-12)


def test_settings_are_the_published_ones():
    assert (SETTINGS["naclip"].iterations, SETTINGS["naclip"].dilations) == (10, (8, 16))
    original = SETTINGS["original"]
    assert (original.iterations, original.dilations) == (10, (1, 2, 4, 8, 12, 24))


@pytest.mark.parametrize("setting", ["naclip", "original"])
def test_a_constant_map_stays_constant(setting):
    _, image = case()
    maps = torch.tensor([0.25, -0.7]).view(2, 1, 1).expand(2, 11, 14)
    found = refine(maps, torch.from_numpy(image).float(), setting)
    torch.testing.assert_close(found, maps.contiguous(), atol=1e-5, rtol=0)
    found = refine(maps.double(), torch.from_numpy(image), setting)
    torch.testing.assert_close(found, maps.double().contiguous(), atol=1e-13, rtol=0)


def test_weights_of_a_plain_picture_are_equal_and_all_sum_to_one():
    weights = affinity(torch.full((3, 6, 7), 0.3), (1, 2))
    torch.testing.assert_close(weights, torch.full((16, 6, 7), 1 / 16))
    _, image = case()
    weights = affinity(torch.from_numpy(image).float(), (1, 3, 5))
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(11, 14))


def test_maps_follow_an_edge_of_the_picture():
    image = torch.zeros(3, 40, 40)
    image[:, :, 23:] = 1.0
    maps = torch.zeros(1, 40, 40)
    maps[:, :, 20:] = 1.0  # three columns off
    found = refine(maps, image, "original")[0]
    assert found[:, :22].max() < 0.5 < found[:, 24:].min()


@pytest.mark.parametrize("bytes_at_once", [1, 11 * 14 * 4 * 2, 1 << 26])
def test_few_maps_at_a_time_give_what_all_give(bytes_at_once, monkeypatch):
    maps, image = (torch.from_numpy(v).float() for v in case(queries=5))
    whole = refine(maps, image, "naclip")
    monkeypatch.setattr(pamr, "CHUNK_BYTES", bytes_at_once)
    assert torch.equal(refine(maps, image, "naclip"), whole)


def test_the_picture_is_resized_to_the_maps():
    maps, _ = case((12, 16))
    small = np.random.default_rng(1).normal(size=(3, 7, 9))
    grown = reference.bilinear_maps(small, 12, 16)
    expected = reference.pamr(maps, grown, 10, (8, 16))
    found = refine(torch.from_numpy(maps), torch.from_numpy(small), "naclip")
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_the_maps_are_left_as_they_are():
    maps, image = (torch.from_numpy(v).float() for v in case())
    before = maps.clone()
    refine(maps, image, "naclip")
    assert torch.equal(maps, before)
