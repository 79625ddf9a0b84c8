"""A saved model is what open_clip reads, bit for bit; without lazyclip it is never read wrongly."""

import json
import os
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

import lazyclip
from lazyclip import factory, weights
from lazyclip.base.resources import config_root
from lazyclip.export import config_of, save_model
from lazyclip.tower import pooling_of
from tests import toy_models
from tests.toy_models import EVA, KINDS, NATIVE, pixels


def saved(folder, name, **how):
    built = factory.build(name, random_weights_seed=4, **how)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(built.model, built.info, folder)
    return built


VARIANTS = [
    *((f"LaSt-{kind}", {}) for kind in KINDS),
    (f"LaSt-{NATIVE}", {"force_quick_gelu": True, "last": {"k": 3, "sigma": 2.0}}),
    (f"LaSt-{NATIVE}", {"image_size": 48, "last": {"sigma": float("inf"), "score": "repo"}}),
    (f"LaSt-{NATIVE}-quickgelu", {"last": {"pooling": "max"}}),
    (f"LaSt-{EVA}", {"image_size": 48}),
    (NATIVE, {"last": {"pooling": "last", "kernel": "repo"}}),
    (NATIVE, {}),
    ("LaSt-ViT-nano", {}),
]


@pytest.mark.parametrize(("name", "how"), VARIANTS, ids=str)
def test_a_saved_model_comes_back_bit_for_bit_through_open_clip(tmp_path, name, how):
    built = saved(tmp_path / "m", name, **how)
    images = pixels(2, built.info.image_size)
    text = torch.zeros(1, built.info.context_length, dtype=torch.int64)
    wanted = built.model.encode_image(images), built.model.encode_text(text)
    theirs, _, val = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'm'}")
    ours = factory.build(str(tmp_path / "m"))
    for model in (theirs.eval(), ours.model):
        assert torch.equal(model.encode_image(images), wanted[0])
        assert torch.equal(model.encode_text(text), wanted[1])
        assert pooling_of(model).to_dict() == dict(built.info.pooling)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8))
    for transform in (val, ours.preprocess_val):
        assert torch.equal(transform(picture), built.preprocess_val(picture))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'm'}")
    assert torch.equal(tokenizer(["a red box"]), built.tokenizer(["a red box"]))
    described = {k: v for k, v in ours.info.to_dict().items()
                 if k not in ("name", "pretrained", "weights_sha256")}  # fmt: skip
    before = built.info.to_dict()
    assert described == {k: before[k] for k in described}
    assert ours.info.weights_sha256 == weights.file_sha256(tmp_path / "m" / weights.WEIGHT_FILE)


def test_a_reloaded_model_saves_the_same_config_again(tmp_path):
    saved(tmp_path / "a", f"LaSt-{NATIVE}", image_size=48, force_quick_gelu=True, last={"k": 3})
    again = factory.build(str(tmp_path / "a"))
    save_model(again.model, again.info, tmp_path / "b")
    texts = [(tmp_path / f / weights.CONFIG_FILE).read_text() for f in "ab"]
    assert texts[0] == texts[1]


def test_weights_are_float32_and_the_config_travels_inside(tmp_path):
    built = factory.build(f"LaSt-{NATIVE}")
    save_model(built.model.bfloat16(), built.info, tmp_path / "m", {"command": "train"})
    with safe_open(str(tmp_path / "m" / weights.WEIGHT_FILE), framework="pt") as stream:
        assert {stream.get_tensor(key).dtype for key in stream.keys()} == {torch.float32}  # noqa: SIM118
        inside = json.loads(stream.metadata()[weights.METADATA_KEY])
    beside = json.loads((tmp_path / "m" / weights.CONFIG_FILE).read_text())
    assert inside == beside == json.loads(json.dumps(config_of(built.model, built.info)))
    assert json.loads((tmp_path / "m" / "record.json").read_text()) == {"command": "train"}
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == sorted(
        [weights.WEIGHT_FILE, weights.CONFIG_FILE, "record.json"]
    )


def test_saving_over_a_model_replaces_it(tmp_path):
    saved(tmp_path / "m", f"LaSt-{NATIVE}")
    second = saved(tmp_path / "m", f"LaSt-{NATIVE}", last={"k": 2})
    again = factory.build(str(tmp_path / "m"))
    assert torch.equal(again.model.encode_image(pixels()), second.model.encode_image(pixels()))


def test_tensors_that_share_memory_are_saved_each(tmp_path):
    built = factory.build(f"LaSt-{NATIVE}")
    block = built.model.visual.transformer.resblocks
    block[1].ln_1.weight = block[0].ln_1.weight
    nn.init.constant_(block[0].ln_1.weight, 1.5)
    save_model(built.model, built.info, tmp_path / "m")
    again = factory.build(str(tmp_path / "m"))
    assert float(again.model.visual.transformer.resblocks[1].ln_1.weight[0].detach()) == 1.5


def test_a_plain_model_is_saved_without_our_key(tmp_path):
    saved(tmp_path / "m", NATIVE)
    config = json.loads((tmp_path / "m" / weights.CONFIG_FILE).read_text())
    assert "last" not in config["model_cfg"]["vision_cfg"]
    assert set(config) == {"model_cfg", "preprocess_cfg"}


def test_every_shipped_config_is_plain_json_that_names_its_pooling():
    for path in (config_root() / "models").glob("LaSt-*.json"):
        assert json.loads(path.read_text())["vision_cfg"]["last"]["pooling"] == "last", path.name


WITHOUT_US = """
import sys
import numpy as np, open_clip, torch
models, weights, saved, out, images = sys.argv[1:]
open_clip.add_model_config(models)
model = open_clip.create_model("Toy-ViT", pretrained=weights).eval()
with torch.no_grad():
    np.save(out, model.encode_image(torch.from_numpy(np.load(images))).numpy())
try:
    open_clip.create_model("local-dir:" + saved)
except TypeError as error:
    assert "'last'" in str(error), error
    print("refused")
assert not [name for name in sys.modules if name.startswith("lazyclip")]
"""


@pytest.mark.slow  # a process of its own
def test_without_lazyclip_weights_fit_the_plain_tower_and_the_config_is_refused(tmp_path):
    built = saved(tmp_path / "m", f"LaSt-{NATIVE}")
    models = tmp_path / "models"
    models.mkdir()
    (models / f"{NATIVE}.json").write_text(json.dumps(toy_models.config_of(NATIVE)))
    np.save(tmp_path / "images.npy", pixels().numpy())
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, str(models), str(tmp_path / "m" / weights.WEIGHT_FILE),
         str(tmp_path / "m"), str(tmp_path / "out.npy"), str(tmp_path / "images.npy")],
        cwd="/", capture_output=True, text=True,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "refused"
    plain = lazyclip.detach(built.model).encode_image(pixels()).detach()
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), plain, atol=1e-6)


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_what_is_saved_may_be_read_by_whom_the_umask_lets(tmp_path, umask):
    built = factory.build(f"LaSt-{NATIVE}", random_weights_seed=4)
    (tmp_path / f"{weights.WEIGHT_FILE}.part").write_text("of a killed run")
    (tmp_path / f"{weights.WEIGHT_FILE}.part").chmod(0o600)
    before = os.umask(umask)
    try:
        for _ in range(2):
            save_model(built.model, built.info, tmp_path, {"by": "a test"})
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    wanted = (weights.WEIGHT_FILE, weights.CONFIG_FILE, "record.json")
    assert modes == dict.fromkeys(wanted, 0o666 & ~umask)
