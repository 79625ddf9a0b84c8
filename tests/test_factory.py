"""Names, tags and activations in open_clip's factory; building by name.

Nothing is downloaded: tags of the toy models point to local files by open_clip's `file` key, and
the large configs are built on the meta device.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

import lazyclip
from lazyclip import bridge, factory, weights
from lazyclip.base.errors import UserError
from lazyclip.base.resources import config_names, config_root
from lazyclip.export import save_model
from lazyclip.pooling import PoolSpec
from lazyclip.tower import pooling_of
from tests import toy_models
from tests.toy_models import KINDS, NATIVE, activations, make, pixels, saved, weight_file

SHIPPED = config_names("models", ".json")
LAST = [name for name in SHIPPED if name.startswith("LaSt-")]
LAST_NATIVE = f"LaSt-{NATIVE}"
ROOT = Path(__file__).resolve().parents[1]


def shape_only(name: str) -> nn.Module:
    """Build a model of any size without memory, through open_clip's own classes."""
    config = open_clip.get_model_config(name)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        return kind(**config)


@pytest.fixture
def tagged(tmp_path):
    """Give the toy model two tags, one of each activation, that lead to a local file."""
    file = str(weight_file(tmp_path / "tag.pt"))
    entries = {
        "plain_e1": {"file": file, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25),
                     "interpolation": "bilinear", "resize_mode": "squash"},
        "quick": {"file": file, "quick_gelu": True},
    }  # fmt: skip
    quick = {tag: entry for tag, entry in entries.items() if entry.get("quick_gelu")}
    with (
        toy_models.tags(NATIVE, **entries),
        toy_models.tags(LAST_NATIVE, **entries),
        toy_models.tags(f"{LAST_NATIVE}-quickgelu", **quick),
    ):
        yield torch.load(file)


# --- registration --------------------------------------------------------------------------------


def test_the_promised_names_are_registered():
    promised = {
        "LaSt-ViT-B-32", "LaSt-ViT-B-16", "LaSt-ViT-L-14", "LaSt-ViT-L-14-336", "LaSt-EVA02-B-16",
        "LaSt-EVA02-L-14", "LaSt-EVA02-L-14-336", "LaSt-ViT-tiny", "LaSt-ViT-nano", "ViT-tiny",
        "ViT-nano", "LaSt-ViT-B-32-quickgelu", "LaSt-ViT-B-16-quickgelu",
        "LaSt-ViT-L-14-quickgelu", "LaSt-ViT-L-14-336-quickgelu",
    }  # fmt: skip
    assert promised <= set(open_clip.list_models())
    assert promised == set(SHIPPED)


def test_registering_again_stacks_no_wrapper():
    before = open_clip.list_models()
    assert lazyclip.register() == lazyclip.register() == SHIPPED
    for function in (open_clip.create_model, bridge._model._build_vision_tower):
        plain = function.lazyclip_plain
        assert not hasattr(plain, "lazyclip_plain")
        assert plain.__module__.startswith("open_clip")
    assert open_clip.create_model is bridge._factory.create_model
    assert open_clip.list_models() == before


RELOAD = """
import importlib, open_clip, lazyclip
from lazyclip import bridge, factory, pooling, tower
rooms = (bridge.guard, bridge.pooled, bridge.tokens, bridge.text, bridge.hooks)
for module in (pooling, *rooms, bridge, tower, factory, lazyclip, lazyclip):
    importlib.reload(module)
assert open_clip.create_model.__module__ == "lazyclip.creation", open_clip.create_model
plain = open_clip.create_model.lazyclip_plain
assert plain.__module__ == "open_clip.factory" and not hasattr(plain, "lazyclip_plain")
model = open_clip.create_model("LaSt-ViT-nano")
assert lazyclip.tower.pooling_of(model).pooling == "last"
import sys
import lazyclip.cli
assert lazyclip.cli.main(["nothing"]) == 2  # the table alone imports no command
assert not [m for m in sys.modules if m.split(".")[0] in ("training", "eval", "open_clip_train")]
print("fine")
"""


@pytest.mark.slow  # a process of its own
def test_importing_and_reloading_in_a_fresh_process_registers_once_and_loads_no_trainer():
    done = subprocess.run(
        [sys.executable, "-c", RELOAD], cwd="/", capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"


def test_a_name_that_open_clip_already_has_is_not_replaced_in_silence(tmp_path, monkeypatch):
    models = tmp_path / "models"
    models.mkdir()
    (models / "ViT-B-32.json").write_text((config_root() / "models/ViT-nano.json").read_text())
    monkeypatch.setattr(factory, "config_root", lambda: tmp_path)
    monkeypatch.setattr(factory, "config_names", lambda kind, suffix: ["ViT-B-32"])
    before = open_clip.get_model_config("ViT-B-32")
    with pytest.raises(ImportError, match="another model named ViT-B-32"):
        factory.register()
    assert open_clip.get_model_config("ViT-B-32") == before


def test_a_config_that_open_clip_passes_over_is_an_error(tmp_path, monkeypatch):
    models = tmp_path / "models"
    models.mkdir()
    (models / "LaSt-half.json").write_text('{"embed_dim": 8, "vision_cfg": {}}')  # no text_cfg
    monkeypatch.setattr(factory, "config_root", lambda: tmp_path)
    monkeypatch.setattr(factory, "config_names", lambda kind, suffix: ["LaSt-half"])
    with pytest.raises(ImportError, match="did not take the configs LaSt-half"):
        factory.register()


def test_open_clips_other_models_are_left_alone():
    with pytest.raises(RuntimeError, match="not found"):
        open_clip.create_model("no-such-model")
    model = open_clip.create_model(NATIVE)
    assert type(model.visual).__name__ == "VisionTransformer"


# --- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAST)
def test_a_last_config_is_its_base_plus_the_pooling(name):
    ours = json.loads((config_root() / "models" / f"{name}.json").read_text())
    last = ours["vision_cfg"].pop("last")
    assert PoolSpec.from_mapping(last, name) == PoolSpec(
        "last", "paper", 0.5, None, "centred", 1e-6
    )
    assert set(last) == {"pooling", "score", "k", "sigma", "kernel", "eps"}
    base = open_clip.get_model_config(name.removeprefix("LaSt-"))
    assert ours == base


MARKED = [
    pytest.param(name, marks=pytest.mark.slow) if "EVA02-L" in name else name for name in LAST
]


@pytest.mark.parametrize("name", MARKED)
def test_state_dicts_of_a_last_model_and_its_base_fit_each_other(name):
    ours, base = shape_only(name), shape_only(name.removeprefix("LaSt-"))
    mine, theirs = ours.state_dict(), base.state_dict()
    assert list(mine) == list(theirs)  # the same keys in the same order
    assert [v.shape for v in mine.values()] == [v.shape for v in theirs.values()]
    assert list(dict(ours.named_parameters())) == list(dict(base.named_parameters()))
    assert list(dict(ours.named_buffers())) == list(dict(base.named_buffers()))
    assert pooling_of(ours) == PoolSpec()
    assert pooling_of(base).pooling == "token"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_from_last_to_base_and_back_strictly(kind):
    base, ours = make(kind, seed=1), make(f"LaSt-{kind}", seed=2)
    ours.load_state_dict(base.state_dict(), strict=True)
    lazyclip.detach(ours)
    assert torch.equal(ours.encode_image(pixels()), base.encode_image(pixels()))
    other = make(f"LaSt-{kind}", seed=3)
    base.load_state_dict(other.state_dict(), strict=True)
    text = torch.zeros(1, 8, dtype=torch.int64)
    assert torch.equal(base.encode_text(text), other.encode_text(text))


@pytest.mark.parametrize("name", ["LaSt-ViT-nano", "LaSt-ViT-tiny", "ViT-nano", "ViT-tiny"])
def test_the_small_models_run_forward_and_backward(name):
    built = factory.build(name)
    text = built.tokenizer(["a red box", "a blue box"])
    assert text.shape == (2, built.info.context_length)
    size, width, embed, context = {
        "tiny": (64, 192, 192, 32), "nano": (64, 128, 128, 16)
    }[name.rsplit("-", 1)[-1]]  # fmt: skip
    info = built.info
    assert (info.image_size, info.width, info.embed_dim) == ((size, size), width, embed)
    assert (info.context_length, info.patch_size, info.grid) == (context, 8, (8, 8))
    out = built.model.train()(pixels(2, 64), text)
    (out["image_features"] @ out["text_features"].T * out["logit_scale"]).sum().backward()
    assert all(p.grad is not None for p in built.model.parameters())
    assert info.parameters == sum(p.numel() for p in built.model.parameters())
    assert info.pooling["pooling"] == ("last" if name.startswith("LaSt") else "token")
    assert json.dumps(info.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("last", "said"),
    [({"kk": 1}, "unknown key 'kk'"), ({"score": "papr"}, "paper"), ({"k": 17}, "16 patches"),
     ({"pooling": "cls"}, "token"), ({"k": 0}, "k is 0")],
)  # fmt: skip
def test_a_wrong_pooling_in_a_config_names_the_key(last, said):
    vision = {**toy_models.config_of(NATIVE)["vision_cfg"], "last": last}
    with pytest.raises(UserError, match=said) as caught:
        open_clip.create_model(LAST_NATIVE, vision_cfg=vision)
    assert "\n" not in str(caught.value)


def test_an_own_config_file_with_a_pooling_works_under_any_name(tmp_path):
    config = toy_models.config_of(NATIVE)
    config["vision_cfg"]["last"] = {"pooling": "max"}
    (tmp_path / "My-own.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model = open_clip.create_model("My-own")
    assert pooling_of(model).pooling == "max"


# --- tags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in LAST if "nano" not in n and "tiny" not in n])
def test_a_last_name_has_every_tag_of_its_base(name):
    ours = set(open_clip.list_pretrained_tags_by_model(name))
    base = set(open_clip.list_pretrained_tags_by_model(name.removeprefix("LaSt-")))
    assert ours
    if name.endswith("-quickgelu"):
        assert ours == base
    else:
        twin = open_clip.list_pretrained_tags_by_model(f"{name.removeprefix('LaSt-')}-quickgelu")
        assert ours == base | set(twin)


@pytest.mark.parametrize(
    ("name", "tag", "activation"),
    [("LaSt-ViT-B-16", "openai", "quickgelu"), ("LaSt-ViT-B-16", "metaclip_fullcc", "quickgelu"),
     ("LaSt-ViT-B-16", "dfn2b", "quickgelu"), ("LaSt-ViT-B-16", "laion2b_s34b_b88k", "gelu"),
     ("LaSt-ViT-L-14", "metaclip_400m", "quickgelu"), ("LaSt-ViT-L-14", "dfn2b", "quickgelu"),
     ("LaSt-ViT-L-14", "laion2b_s32b_b82k", "gelu"), ("LaSt-ViT-L-14-336", "openai", "quickgelu"),
     ("LaSt-EVA02-L-14-336", "merged2b_s6b_b61k", "gelu"),
     ("LaSt-ViT-B-32", "openai", "quickgelu")],
)  # fmt: skip
def test_the_activation_of_known_weights_is_that_of_their_tag(name, tag, activation):
    assert tag in open_clip.list_pretrained_tags_by_model(name)
    assert weights.tag_activation(name, tag) == activation


def test_a_quickgelu_name_has_no_tag_of_gelu_weights():
    for name in SHIPPED:
        if name.endswith("-quickgelu"):
            for tag in open_clip.list_pretrained_tags_by_model(name):
                assert weights.tag_activation(name, tag) == "quickgelu", (name, tag)


def test_our_tags_are_copies_and_keep_their_preprocessing():
    ours = open_clip.get_pretrained_cfg("LaSt-ViT-L-14", "laion2b_s32b_b82k")
    theirs = open_clip.get_pretrained_cfg("ViT-L-14", "laion2b_s32b_b82k")
    assert ours == theirs
    assert ours is not theirs
    assert tuple(ours["mean"]) == tuple(ours["std"]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("typed", "tag"),
    [("openai", "openai"), ("OpenAI", "openai"), ("laion2b-s34b-b88k", "laion2b_s34b_b88k"),
     ("metaclip", "metaclip_fullcc"), ("metaclip_2.5b", "metaclip_fullcc"),
     ("metaclip_400m", "metaclip_400m"), ("laion400m", "laion400m_e32")],
)  # fmt: skip
def test_tags_are_found_as_people_type_them(typed, tag):
    assert weights.clean_tag(typed) == tag
    assert open_clip.is_pretrained_cfg("LaSt-ViT-B-16", weights.clean_tag(typed))


@pytest.mark.parametrize("door", ["open_clip", "build"])
@pytest.mark.parametrize(
    ("name", "tag", "activation"),
    [(LAST_NATIVE, "quick", {"QuickGELU"}), (LAST_NATIVE, "plain_e1", {"GELU"}),
     (LAST_NATIVE, "PLAIN-E1", {"GELU"}), (f"{LAST_NATIVE}-quickgelu", "quick", {"QuickGELU"})],
)  # fmt: skip
def test_a_tag_brings_weights_and_its_activation(tagged, door, name, tag, activation):
    if door == "open_clip":
        model = open_clip.create_model(name, pretrained=tag).eval()
    else:
        built = factory.build(name, tag)
        model = built.model
        assert {"gelu": {"GELU"}, "quickgelu": {"QuickGELU"}}[built.info.activation] == activation
        assert built.info.weights_sha256 is not None
    assert activations(model) == activation
    for key, value in model.state_dict().items():
        assert torch.equal(value, tagged[key])
    assert pooling_of(model) == PoolSpec()


def test_the_activation_changes_the_features_so_a_silent_mistake_would_count(tagged):
    quick, plain = (
        open_clip.create_model(LAST_NATIVE, pretrained=t) for t in ("quick", "plain_e1")
    )
    assert not torch.allclose(quick.encode_image(pixels()), plain.encode_image(pixels()), atol=1e-3)


def test_a_tag_brings_its_preprocessing(tagged):
    built = factory.build(LAST_NATIVE, "plain_e1")
    assert built.info.mean == (0.5, 0.5, 0.5)
    assert built.info.std == (0.25, 0.25, 0.25)
    picture = built.preprocess_val(Image.new("RGB", (100, 50), (255, 255, 255)))
    assert picture.shape == (3, 32, 32)
    torch.testing.assert_close(picture, torch.full((3, 32, 32), 2.0))  # squashed: no border


DOORS = {"open_clip": open_clip.create_model, "build": factory.build}


@pytest.mark.parametrize("door", ["open_clip", "build"])
@pytest.mark.parametrize(
    ("name", "forced"), [(LAST_NATIVE, True), (f"{LAST_NATIVE}-quickgelu", False)]
)
def test_asking_for_quickgelu_with_gelu_weights_is_an_error(tagged, door, name, forced):
    entry = open_clip.get_pretrained_cfg(LAST_NATIVE, "plain_e1")
    with (
        toy_models.tags(name, plain_e1=entry),
        pytest.raises(UserError, match="'plain_e1' was trained with GELU") as caught,
    ):
        DOORS[door](name, pretrained="plain_e1", force_quick_gelu=forced)
    assert LAST_NATIVE in str(caught.value)


@pytest.mark.parametrize(("tag", "activation"), [("quick", "quickgelu"), ("plain_e1", "gelu")])
def test_the_plain_names_get_the_tags_activation_in_our_own_commands(tagged, tag, activation):
    built = factory.build(NATIVE, tag)
    assert built.info.activation == activation
    assert built.info.pooling["pooling"] == "token"
    with pytest.raises(UserError, match="trained with GELU"):
        factory.build(NATIVE, "plain_e1", force_quick_gelu=True)


def test_a_tag_whose_file_cannot_be_had_is_one_line_and_no_random_model():
    for call in (
        lambda: lazyclip.load("LaSt-ViT-B-16", "openai"),
        lambda: lazyclip.load("ViT-B-16", "openai"),
        lambda: open_clip.create_model("LaSt-ViT-B-16", pretrained="openai"),
        lambda: open_clip.create_model_and_transforms("LaSt-EVA02-B-16", "merged2b_s8b_b131k"),
    ):
        with pytest.raises(UserError, match="could not be downloaded") as caught:
            call()
        text = str(caught.value)
        assert "--pretrained" in text
        assert "\n" not in text


def test_a_tag_whose_local_file_is_gone_is_an_error(tagged, tmp_path):
    entry = {"file": str(tmp_path / "gone.pt")}
    with toy_models.tags(LAST_NATIVE, gone=entry), pytest.raises((UserError, FileNotFoundError)):
        open_clip.create_model(LAST_NATIVE, pretrained="gone")


def test_without_loading_weights_a_tag_gives_activation_and_preprocessing_and_no_download():
    far = {"hf_hub": "nobody/nothing/", "quick_gelu": True, "mean": (0.5, 0.5, 0.5)}
    with toy_models.tags(LAST_NATIVE, far=far):
        model = open_clip.create_model(LAST_NATIVE, pretrained="far", load_weights=False)
    assert activations(model) == {"QuickGELU"}
    assert tuple(bridge.preprocess_of(model)["mean"]) == (0.5, 0.5, 0.5)
    assert pooling_of(model) == PoolSpec()


@pytest.mark.parametrize("door", ["open_clip", "build"])
def test_an_unknown_tag_names_the_nearest(tagged, door):
    call = {"open_clip": open_clip.create_model, "build": factory.build}[door]
    with pytest.raises(UserError, match=r"unknown --pretrained of LaSt-Toy-ViT 'quik'") as caught:
        call(LAST_NATIVE, pretrained="quik")
    assert "known: quick" in str(caught.value)


@pytest.mark.parametrize("call", [lazyclip.load, factory.build])
def test_an_unknown_model_names_the_nearest(call):
    with pytest.raises(UserError, match="unknown model 'LaSt-ViT-B16'; nearest: LaSt-ViT-B-16"):
        call("LaSt-ViT-B16")


def test_weights_that_are_required_and_not_given_are_an_error():
    with pytest.raises(UserError, match="needs weights"):
        open_clip.create_model(LAST_NATIVE, require_pretrained=True)
    with pytest.raises(UserError, match="needs weights"):
        open_clip.create_model_from_pretrained(LAST_NATIVE)


# --- what would take the pooling away -------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [({"force_naflex_vision": True}, "bypass"), ({"jit": True}, "jit"),
     ({"vision_cfg": {"image_size": 32}}, "'last'")],
)  # fmt: skip
def test_flags_that_would_lose_the_pooling_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        open_clip.create_model(LAST_NATIVE, **flags)


@pytest.mark.parametrize(
    "flags",
    [{}, {"precision": "bf16"}, {"precision": "pure_bf16"}, {"force_custom_text": True},
     {"force_patch_dropout": 0.3}, {"force_image_size": 48}, {"force_context_length": 7},
     {"output_dict": True}, {"device": "cpu"}, {"force_quick_gelu": True}],
    ids=str,
)  # fmt: skip
def test_open_clips_other_flags_keep_the_pooling(flags):
    model = open_clip.create_model(LAST_NATIVE, **flags)
    assert pooling_of(model) == PoolSpec()
    plain = open_clip.create_model(NATIVE, **flags)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert activations(model) == activations(plain)


def test_the_transform_doors_of_open_clip_give_a_last_model():
    model, train, val = open_clip.create_model_and_transforms(LAST_NATIVE)
    assert pooling_of(model) == PoolSpec()
    assert val(Image.new("RGB", (70, 40))).shape == train(Image.new("RGB", (70, 40))).shape
    slashed = open_clip.create_model("LaSt-Toy/ViT")
    assert pooling_of(slashed) == PoolSpec()


def test_coca_with_a_pooling_of_ours_is_refused_and_not_ignored():
    config = toy_models.config_of(NATIVE)
    config["vision_cfg"]["last"] = {"pooling": "last"}
    text = {**toy_models.TEXT, "embed_cls": True, "output_tokens": True}
    with pytest.raises((TypeError, UserError), match="last"):
        open_clip.CoCa(16, multimodal_cfg=dict(toy_models.TEXT), text_cfg=text,
                       vision_cfg=config["vision_cfg"])  # fmt: skip


# --- build ---------------------------------------------------------------------------------------


def test_random_weights_follow_the_seed_and_leave_the_global_state_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = (
        factory.build(LAST_NATIVE, random_weights_seed=s).model for s in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (m.state_dict()["visual.proj"] for m in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_random_weights_are_announced_by_no_warning_where_asked_for(caplog):
    with caplog.at_level(logging.WARNING):
        factory.build(LAST_NATIVE)
    assert "random" not in caplog.text


def test_load_gives_an_eval_model_with_transform_and_tokenizer():
    model, preprocess, tokenizer = lazyclip.load("LaSt-ViT-nano")
    assert not model.training
    assert preprocess(Image.new("L", (80, 70))).shape == (3, 64, 64)
    assert tokenizer(["a", "b c"]).shape == (2, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_another_image_size_is_built_and_described(kind):
    built = factory.build(f"LaSt-{kind}", image_size=48)
    assert (built.info.image_size, built.info.grid) == ((48, 48), (6, 6))
    assert built.model.encode_image(pixels(1, 48)).shape == (1, 16)
    assert built.preprocess_val(Image.new("RGB", (60, 60))).shape == (3, 48, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tag_at_another_size_has_its_positions_interpolated(kind, tmp_path):
    file = weight_file(tmp_path / "w.pt", kind)
    with toy_models.tags(f"LaSt-{kind}", tag={"file": str(file)}):
        built = factory.build(f"LaSt-{kind}", "tag", image_size=48)
    again = factory.build(f"LaSt-{kind}", str(file), image_size=48)
    assert built.info.grid == again.info.grid == (6, 6)
    torch.testing.assert_close(
        built.model.encode_image(pixels(1, 48)), again.model.encode_image(pixels(1, 48))
    )


def test_overrides_of_the_pooling_change_single_keys():
    built = factory.build(LAST_NATIVE, last={"k": 3})
    assert pooling_of(built.model) == PoolSpec(k=3)
    assert built.info.pooling["k"] == 3
    plain = factory.build(NATIVE, last={"pooling": "last", "score": "repo"})
    assert pooling_of(plain.model) == PoolSpec(score="repo")
    with pytest.raises(UserError, match="300 exceeds the 16 patches"):
        factory.build(LAST_NATIVE, last={"k": 300})
    with pytest.raises(UserError, match="--last-"):
        factory.build(LAST_NATIVE, last={"kk": 300})


def test_a_hub_name_without_network_is_one_line():
    with pytest.raises(UserError, match="hf-hub:nobody/nothing") as caught:
        factory.build("hf-hub:nobody/nothing")
    assert "\n" not in str(caught.value)


def test_weights_beside_a_name_that_has_its_own_are_refused(tmp_path):
    folder = saved(tmp_path / "model", LAST_NATIVE)
    for name in (str(folder), f"local-dir:{folder}", "hf-hub:nobody/nothing"):
        with pytest.raises(UserError, match="leave --pretrained out"):
            factory.build(name, "openai")


def test_the_records_preprocessing_is_used(tmp_path, tagged):
    built = factory.build(LAST_NATIVE, "plain_e1")
    save_model(built.model, built.info, tmp_path / "m")
    again = factory.build(LAST_NATIVE, str(tmp_path / "m"))
    assert again.info.mean == (0.5, 0.5, 0.5)
    assert bridge.preprocess_of(again.model)["resize_mode"] == "squash"
