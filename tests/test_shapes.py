"""Models as shapes alone, and what is said of positions that do not fit the image size."""

import logging

import pytest
import torch

from lazyclip.base.errors import UserError
from lazyclip.factory import build
from lazyclip.weights import trained_size
from tests.toy_models import EVA, NATIVE, make, saved, weight_file
from tests.toy_run import train, world

LAST = f"LaSt-{NATIVE}"


@pytest.mark.parametrize("name", [NATIVE, LAST, f"LaSt-{EVA}", "LaSt-ViT-nano"])
def test_shapes_are_those_of_the_model_and_take_no_memory(name):
    real, shapes = build(name, image_size=64), build(name, image_size=64, device="meta")
    assert {p.device.type for p in shapes.model.parameters()} == {"meta"}
    assert shapes.info == real.info
    own = {key: value.shape for key, value in real.model.state_dict().items()}
    assert {key: value.shape for key, value in shapes.model.state_dict().items()} == own


@pytest.mark.parametrize(
    ("name", "tag", "activation"),
    [("LaSt-ViT-B-16", "openai", "quickgelu"), ("ViT-B-16", "openai", "quickgelu"),
     ("LaSt-ViT-B-16", "laion400m_e32", "gelu"), ("LaSt-ViT-L-14", "metaclip", "quickgelu")],
)  # fmt: skip
def test_shapes_have_the_activation_of_a_tag_that_is_not_fetched(name, tag, activation):
    info = build(name, tag, device="meta").info
    assert (info.activation, info.weights_sha256) == (activation, None)


def test_shapes_have_the_activation_of_a_record(tmp_path):
    folder = saved(tmp_path / "quick", LAST, force_quick_gelu=True)
    assert build(LAST, str(folder), device="meta").info.activation == "quickgelu"
    assert build(str(folder), device="meta").info.activation == "quickgelu"


def test_shapes_of_unknown_or_contradicting_weights_are_refused():
    with pytest.raises(UserError, match="--pretrained of LaSt-ViT-B-16"):
        build("LaSt-ViT-B-16", "openay", device="meta")
    with pytest.raises(UserError, match="was trained with GELU"):
        build("LaSt-ViT-B-16", "laion400m_e32", device="meta", force_quick_gelu=True)


def test_the_size_of_weights_is_that_of_name_record_or_folder(tmp_path):
    assert trained_size("LaSt-ViT-L-14", "metaclip_fullcc") == (224, 224)
    assert trained_size("LaSt-ViT-L-14-336", "openai") == (336, 336)
    assert trained_size(LAST, str(weight_file(tmp_path / "w.pt"))) == (32, 32)
    assert trained_size(LAST, None) is None
    larger = saved(tmp_path / "larger", LAST, image_size=64)
    assert trained_size(LAST, str(larger)) == (64, 64)
    assert trained_size(str(larger), None) == (64, 64)


def test_positions_of_a_smaller_grid_are_interpolated_and_it_is_said(tmp_path, caplog):
    file = weight_file(tmp_path / "w.pt")
    with caplog.at_level(logging.INFO):
        built = build(LAST, str(file), image_size=64)
    before = make(NATIVE, seed=3).visual.positional_embedding
    after = built.model.visual.positional_embedding
    assert after.shape == (65, 32)
    assert torch.equal(after[0], before[0])  # of the CLS token
    grid = before[1:].T.reshape(1, 32, 4, 4)
    wanted = torch.nn.functional.interpolate(grid, (8, 8), mode="bicubic", antialias=True)
    assert torch.allclose(after[1:], wanted[0].flatten(1).T, atol=1e-6)
    assert "positions are interpolated, the weights have those of 32 x 32 px" in caplog.text
    caplog.clear()
    build(LAST, str(file))
    assert "interpolated" not in caplog.text


def test_the_plan_says_that_positions_are_interpolated(tmp_path):
    file = weight_file(tmp_path / "w.pt")
    how = {"train_data": world(), "model": LAST, "pretrained": file, "dry_run": True}
    ran = train(tmp_path / "logs", force_image_size=64, **how)
    assert "image 64 x 64 px (positions interpolated from 32 x 32), 8 x 8 patches" in ran.out
    assert "interpolated" not in train(tmp_path / "logs", **how).out
