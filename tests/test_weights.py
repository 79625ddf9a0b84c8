"""Weight files in every form that people have, and the message when one does not fit."""

import json
import pickle

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import lazyclip
from lazyclip import factory, weights
from lazyclip.base.errors import UserError
from lazyclip.export import save_model
from tests.toy_models import EVA, KINDS, NATIVE, make, pixels

LAST = f"LaSt-{NATIVE}"


def contiguous(state: dict) -> dict:
    return {key: value.clone().contiguous() for key, value in state.items()}


def write(path, state, wrapper: str | None = None):
    whole = {wrapper: state, "epoch": 3, "name": "a run"} if wrapper else state
    if path.suffix == ".safetensors":
        save_file(contiguous(state), str(path))
    else:
        torch.save(whole, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(
    ("suffix", "wrapper"),
    [(".pt", None), (".pt", "state_dict"), (".pth", "model_state_dict"), (".bin", None),
     (".safetensors", None)],
)  # fmt: skip
def test_a_file_of_any_usual_form_loads(tmp_path, suffix, wrapper, prefix):
    model = make(NATIVE, seed=3)
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    path = write(tmp_path / f"w{suffix}", state, wrapper)
    ours, _, _ = lazyclip.load(LAST, str(path))
    for key, value in ours.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    lazyclip.detach(ours)
    assert torch.equal(ours.encode_image(pixels()), model.encode_image(pixels()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tower_loads_its_plain_weights(tmp_path, kind):
    model = make(kind, seed=3)
    path = write(tmp_path / "w.pt", model.state_dict())
    ours = open_clip.create_model(f"LaSt-{kind}", pretrained=str(path)).eval()
    assert torch.equal(lazyclip.detach(ours).encode_image(pixels()), model.encode_image(pixels()))


def test_a_prefix_on_some_keys_only_is_not_stripped(tmp_path):
    state = dict(make(NATIVE).state_dict())
    state["module.visual.proj"] = state.pop("visual.proj")
    with pytest.raises(UserError, match=r"1 missing: visual\.proj.*1 unexpected: module\.visual"):
        lazyclip.load(LAST, str(write(tmp_path / "w.pt", state)))


@pytest.mark.parametrize("door", [lazyclip.load, open_clip.create_model])
def test_one_renamed_key_is_an_error_that_lists_it(tmp_path, door):
    state = dict(make(NATIVE).state_dict())
    state["visual.proj_"] = state.pop("visual.proj")
    path = write(tmp_path / "w.pt", state)
    with pytest.raises(UserError) as caught:
        door(LAST, pretrained=str(path))
    text = str(caught.value)
    assert "1 missing: visual.proj; 1 unexpected: visual.proj_" in text
    assert "\n" not in text
    assert str(path) in text


def test_many_wrong_keys_are_counted_and_the_first_listed(tmp_path):
    state = {f"x{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(UserError, match="20 unexpected: x0, x1, x10, x11 and 16 more"):
        lazyclip.load(LAST, str(write(tmp_path / "w.pt", state)))


def test_another_architecture_is_an_error_that_names_shapes_and_remedy(tmp_path):
    with torch.random.fork_rng():
        config = open_clip.get_model_config(NATIVE)
        config["vision_cfg"]["width"] = 48
        other = open_clip.CLIP(**config)
    path = write(tmp_path / "w.pt", other.state_dict())
    with pytest.raises(UserError, match="of another shape") as caught:
        lazyclip.load(LAST, str(path))
    assert "48" in str(caught.value)
    assert "32" in str(caught.value)
    assert "--model" in str(caught.value)
    eva = write(tmp_path / "eva.pt", make(EVA).state_dict())
    with pytest.raises(UserError, match="does not fit LaSt-Toy-ViT"):
        lazyclip.load(LAST, str(eva))


def test_a_failed_load_gives_no_half_loaded_model(tmp_path):
    model = make(LAST)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = dict(make(NATIVE, seed=9).state_dict())
    del state["visual.proj"]
    found = weights.read_weights(write(tmp_path / "w.pt", state))
    with pytest.raises(UserError):
        weights.load_state(model, found, LAST)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_archive_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "ViT-B-16.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(
        UserError, match=r"TorchScript archive.*is not read: pass the tag"
    ) as caught:
        lazyclip.load(LAST, str(path))
    assert "\n" not in str(caught.value)


class Foreign:
    """Something that a plain reader must not build."""


def test_a_pickle_with_code_is_not_run(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"state_dict": make(NATIVE).state_dict(), "args": Foreign()}, path)
    with pytest.raises(UserError, match="no weight file that can be read"):
        lazyclip.load(LAST, str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [("w.pt", b""), ("w.pt", b"no tensors here"), ("w.safetensors", b""),
     ("w.safetensors", b"\x00" * 40), ("w.bin", pickle.dumps([1, 2])), ("w.txt", b"hello")],
)  # fmt: skip
def test_a_file_that_is_no_weight_file_is_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        lazyclip.load(LAST, str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": 1}, {}, {"state_dict": {}}, 3])
def test_a_file_without_tensors_is_refused(tmp_path, content):
    path = tmp_path / "w.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"tensors|not a state dict"):
        lazyclip.load(LAST, str(path))


def test_half_precision_weights_load_as_float32(tmp_path):
    model = make(NATIVE, seed=3)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    ours, _, _ = lazyclip.load(LAST, str(write(tmp_path / "w.safetensors", state)))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(
        ours.state_dict()["visual.proj"], model.state_dict()["visual.proj"], atol=1e-3, rtol=1e-3
    )


def test_a_text_tower_at_the_top_level_fits_a_custom_text_model(tmp_path):
    plain = make(NATIVE, seed=3)
    path = write(tmp_path / "w.pt", plain.state_dict())
    ours = open_clip.create_model(LAST, pretrained=str(path), force_custom_text=True).eval()
    text = torch.arange(16).reshape(2, 8)
    torch.testing.assert_close(ours.encode_text(text), plain.encode_text(text))
    assert torch.equal(lazyclip.detach(ours).encode_image(pixels()), plain.encode_image(pixels()))


def test_a_one_element_logit_scale_fits(tmp_path):
    state = dict(make(NATIVE, seed=3).state_dict())
    state["logit_scale"] = state["logit_scale"].reshape(1)
    ours, _, _ = lazyclip.load(LAST, str(write(tmp_path / "w.pt", state)))
    assert ours.logit_scale.shape == ()


@pytest.mark.parametrize("kind", [NATIVE, EVA])
def test_weights_of_another_size_are_interpolated(tmp_path, kind):
    big = make(kind, force_image_size=64)
    path = write(tmp_path / "w.pt", big.state_dict())
    ours = factory.build(f"LaSt-{kind}", str(path))
    assert ours.info.grid == (4, 4)
    same = factory.build(f"LaSt-{kind}", str(path), image_size=64)
    key = "visual.positional_embedding" if kind == NATIVE else "visual.trunk.pos_embed"
    assert torch.equal(same.model.state_dict()[key], big.state_dict()[key])


# --- folders and passports -----------------------------------------------------------------------


def folder_of(path, **how):
    built = factory.build(LAST, random_weights_seed=4, **how)
    save_model(built.model, built.info, path)
    return built


def test_a_run_folder_and_its_model_folder_mean_the_same_weights(tmp_path):
    folder_of(tmp_path / "run" / "model")
    files = {
        weights.find_weight_file(path)
        for path in (
            tmp_path / "run",
            tmp_path / "run" / "model",
            tmp_path / "run" / "model" / weights.WEIGHT_FILE,
        )
    }
    assert len(files) == 1


def test_an_empty_folder_names_the_file_it_should_hold(tmp_path):
    with pytest.raises(UserError, match=r"holds no open_clip_model\.safetensors"):
        lazyclip.load(LAST, str(tmp_path))


def test_a_config_without_weights_is_an_error_and_no_random_model(tmp_path):
    folder_of(tmp_path / "m")
    (tmp_path / "m" / weights.WEIGHT_FILE).unlink()
    for call in (
        lambda: lazyclip.load(str(tmp_path / "m")),
        lambda: open_clip.create_model(f"local-dir:{tmp_path / 'm'}"),
    ):
        with pytest.raises(UserError, match="holds no"):
            call()


def test_a_passport_tells_activation_pooling_and_preprocessing(tmp_path):
    folder_of(tmp_path / "m", force_quick_gelu=True, last={"k": 3})
    for path in (tmp_path / "m" / weights.WEIGHT_FILE,):
        passport = weights.read_passport(path)
        assert passport.activation == "quickgelu"
        assert passport.last["k"] == 3
        assert passport.preprocess["size"] == [32, 32] or passport.preprocess["size"] == (32, 32)
    write(tmp_path / "bare.pt", make(NATIVE).state_dict())
    assert weights.read_passport(tmp_path / "bare.pt") == weights.Passport()


def test_a_file_in_anothers_folder_keeps_its_own_passport(tmp_path):
    folder_of(tmp_path / "quick", force_quick_gelu=True, last={"k": 3})
    folder_of(tmp_path / "gelu")
    stranger = tmp_path / "gelu" / "stranger.safetensors"
    (tmp_path / "quick" / weights.WEIGHT_FILE).rename(stranger)
    built = factory.build(LAST, str(stranger))
    assert built.info.activation == "quickgelu"
    assert built.info.pooling["k"] == 3


def test_an_edited_config_holds_for_its_own_folder(tmp_path):
    folder_of(tmp_path / "m")
    config = tmp_path / "m" / weights.CONFIG_FILE
    changed = json.loads(config.read_text())
    changed["model_cfg"]["vision_cfg"]["last"]["k"] = 2
    config.write_text(json.dumps(changed))
    for given in ((str(tmp_path / "m"),), (LAST, str(tmp_path / "m"))):
        assert factory.build(*given).info.pooling["k"] == 2


def test_a_saved_plain_model_keeps_the_plain_pooling_in_a_last_name(tmp_path):
    built = factory.build(NATIVE)
    save_model(built.model, built.info, tmp_path / "m")
    again = factory.build(LAST, str(tmp_path / "m"))
    # The record says how the weights were trained; a flag decides otherwise.
    assert again.info.pooling["pooling"] == "token"
    asked = factory.build(LAST, str(tmp_path / "m"), last={"pooling": "last"})
    assert asked.info.pooling["pooling"] == "last"


def test_a_damaged_config_names_file_and_place(tmp_path):
    folder_of(tmp_path / "m")
    (tmp_path / "m" / weights.CONFIG_FILE).write_text('{"model_cfg": ')
    with pytest.raises(UserError, match=r"open_clip_config\.json: not readable as JSON"):
        lazyclip.load(LAST, str(tmp_path / "m"))


def test_the_sha256_is_that_of_the_file(tmp_path):
    import hashlib

    path = tmp_path / "w.pt"
    path.write_bytes(b"x" * 5_000_000)
    assert weights.file_sha256(path) == hashlib.sha256(b"x" * 5_000_000).hexdigest()


def test_names_and_bases():
    assert weights.base_name("LaSt-ViT-B-16") == "ViT-B-16"
    assert weights.base_name("ViT-B-16") == "ViT-B-16"
    assert weights.is_last_name("LaSt-x")
    assert not weights.is_last_name("Last-x")


@pytest.mark.parametrize(
    ("door", "name"),
    [(open_clip.create_model, LAST), (factory.build, LAST), (factory.build, NATIVE)],
)
@pytest.mark.parametrize("path", ["logs/gone", "./gone", "gone.safetensors", "gone.pt"])
def test_a_path_that_does_not_exist_is_said_to_be_one_without_tags(
    tmp_path, monkeypatch, door, name, path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--pretrained {path} does not exist, neither") as caught:
        door(name, pretrained=path)
    assert len(str(caught.value).splitlines()) == 1
    assert not {"unknown", "nearest:", "known:"} & set(str(caught.value).split())
