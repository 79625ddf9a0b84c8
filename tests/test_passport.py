"""What a saved file says of how its weights want to be run, and who may contradict it."""

import dataclasses
import logging

import numpy as np
import open_clip
import pytest
import torch

from lazyclip import factory, weights
from lazyclip.base.errors import UserError
from lazyclip.export import save_model
from lazyclip.pooling import PoolSpec
from lazyclip.tower import pooling_of
from tests import reference
from tests.toy_models import EVA, NATIVE, activations, pixels, saved, weight_file

LAST_NATIVE = f"LaSt-{NATIVE}"
DOORS = {"open_clip": open_clip.create_model, "build": factory.build}


@pytest.mark.parametrize("door", ["open_clip", "build"])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_saved_model_brings_activation_and_pooling_from_its_record(door, as_file, tmp_path):
    folder = saved(
        tmp_path / "model", LAST_NATIVE, force_quick_gelu=True, last={"k": 3, "score": "repo"}
    )
    given = str(folder / weights.WEIGHT_FILE) if as_file else str(folder)
    if door == "open_clip":
        model = open_clip.create_model(LAST_NATIVE, pretrained=given)
    else:
        model = factory.build(LAST_NATIVE, given).model
    assert activations(model) == {"QuickGELU"}
    assert pooling_of(model) == PoolSpec(k=3, score="repo")


def test_a_weight_file_moved_away_from_its_config_still_knows(tmp_path):
    folder = saved(tmp_path / "model", LAST_NATIVE, force_quick_gelu=True, last={"k": 3})
    moved = tmp_path / "alone.safetensors"
    (folder / weights.WEIGHT_FILE).rename(moved)
    built = factory.build(LAST_NATIVE, str(moved))
    assert built.info.activation == "quickgelu"
    assert built.info.pooling["k"] == 3


@pytest.mark.parametrize(
    ("door", "name"),
    # A plain name through open_clip's own door is open_clip's own affair.
    [
        ("build", NATIVE),
        *((d, n) for d in DOORS for n in (f"{LAST_NATIVE}-quickgelu", LAST_NATIVE)),
    ],
)
def test_a_saved_gelu_model_asked_for_as_quickgelu_is_an_error(door, name, tmp_path):
    folder = saved(tmp_path / "model", LAST_NATIVE)
    forced = not name.endswith("-quickgelu")
    with pytest.raises(UserError, match="trained with GELU"):
        DOORS[door](name, pretrained=str(folder), force_quick_gelu=forced)


def test_a_saved_folder_asked_for_as_quickgelu_is_an_error(tmp_path):
    folder = saved(tmp_path / "model", LAST_NATIVE)
    for name in (str(folder), f"local-dir:{folder}"):
        with pytest.raises(UserError, match="trained with GELU"):
            factory.build(name, force_quick_gelu=True)


def test_a_bare_file_takes_the_names_activation_and_says_so(tmp_path, caplog):
    file = weight_file(tmp_path / "bare.pt")
    with caplog.at_level(logging.WARNING):
        built = factory.build(LAST_NATIVE, str(file))
    assert built.info.activation == "gelu"
    assert "records neither activation nor pooling" in caplog.text
    forced = factory.build(LAST_NATIVE, str(file), force_quick_gelu=True)
    assert forced.info.activation == "quickgelu"
    named = factory.build(f"{LAST_NATIVE}-quickgelu", str(file))
    assert named.info.activation == "quickgelu"


def test_last_weights_in_a_plain_tower_are_announced(tmp_path, caplog):
    folder = saved(tmp_path / "model", LAST_NATIVE, force_quick_gelu=True)
    with caplog.at_level(logging.WARNING):
        built = factory.build(NATIVE, str(folder))
    assert built.info.pooling["pooling"] == "token"
    assert built.info.activation == "quickgelu"
    assert "was trained with pooling 'last'" in caplog.text


@pytest.mark.parametrize("given", ["gone.pt", "folder/gone.safetensors"])
def test_a_file_that_is_not_there_is_named(given, tmp_path):
    with pytest.raises(UserError, match=r"neither|no file"):
        factory.build(LAST_NATIVE, str(tmp_path / given))


def test_a_timm_model_saved_at_another_size_loads_again_by_name_and_by_folder(tmp_path):
    built = factory.build(f"LaSt-{EVA}", image_size=48, random_weights_seed=2)
    save_model(built.model, built.info, tmp_path / "m")
    wanted = built.model.encode_image(pixels(1, 48))
    for call in (
        lambda: factory.build(str(tmp_path / "m")).model,
        lambda: open_clip.create_model(f"local-dir:{tmp_path / 'm'}").eval(),
        lambda: factory.build(f"LaSt-{EVA}", str(tmp_path / "m"), image_size=48).model,
    ):
        model = call()
        assert torch.equal(model.encode_image(pixels(1, 48)), wanted)
        assert model.visual.image_size == (48, 48)
    # Asked for at the name's own size, its positions are interpolated down.
    smaller = factory.build(f"LaSt-{EVA}", str(tmp_path / "m"))
    assert smaller.info.image_size == (32, 32)


@pytest.mark.parametrize("kind", [NATIVE, EVA])
def test_a_model_saved_at_a_size_that_is_not_square_is_read_by_height_and_width(tmp_path, kind):
    # 16 x 64 px are 2 x 8 patches: as many as the name's own 4 x 4, in another order.
    wide = open_clip.create_model(f"LaSt-{kind}", force_image_size=(16, 64)).eval()
    info = dataclasses.replace(factory.build(f"LaSt-{kind}").info, image_size=(16, 64), grid=(2, 8))
    save_model(wide, info, tmp_path / "m")
    images = pixels(1, (16, 64))
    for model in (
        factory.build(str(tmp_path / "m")).model,
        open_clip.create_model(f"local-dir:{tmp_path / 'm'}").eval(),
    ):
        assert torch.equal(model.encode_image(images), wide.encode_image(images))
    square = factory.build(f"LaSt-{kind}", str(tmp_path / "m")).model
    key = "visual.positional_embedding" if kind == NATIVE else "visual.trunk.pos_embed"
    before, after = (m.state_dict()[key].reshape(17, -1).double().numpy() for m in (wide, square))
    wanted = reference.resize_positions(before, (2, 8), (4, 4))
    np.testing.assert_allclose(after, wanted, atol=1e-6)
