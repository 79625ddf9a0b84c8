"""The guard against an open_clip that does not fit, and the hooks into the one that does."""

import inspect

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva

import lazyclip
from lazyclip import bridge
from tests.toy_models import EVA, KINDS, NATIVE, make


def test_the_installed_open_clip_fits():
    bridge.check_open_clip()
    assert open_clip.__version__.split(".")[0] == "3"


@pytest.mark.parametrize("version", ["2.24.0", "2.32.0", "4.2.0.dev0", "unknown"])
def test_another_major_version_is_named_with_the_supported_range(monkeypatch, version):
    monkeypatch.setattr(open_clip, "__version__", version)
    with pytest.raises(ImportError) as caught:
        bridge.check_open_clip()
    text = str(caught.value)
    assert version in text
    assert "open_clip_torch>=3.0,<4" in text
    assert "\n" not in text


def other_builder(embed_dim, vision_cfg):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [(bridge._model, "_build_vision_tower", other_builder, "_build_vision_tower lacks"),
     (bridge._factory, "create_model", other_builder, "create_model lacks"),
     (bridge._pretrained, "_PRETRAINED", [], "table of pretrained tags")],
)  # fmt: skip
def test_a_changed_function_is_named(monkeypatch, owner, name, value, said):
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(ImportError, match=said) as caught:
        bridge.check_open_clip()
    assert open_clip.__version__ in str(caught.value)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(VisionTransformer, "_global_pool"), (VisionTransformer, "_pool"),
     (VisionTransformer, "_embeds"), (VisionTransformer, "forward_intermediates"),
     (Eva, "pool"), (timm.models.vision_transformer.VisionTransformer, "pool")],
)  # fmt: skip
def test_a_missing_method_of_a_tower_is_named(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError, match=name.strip("_")):
        bridge.check_open_clip()


@pytest.mark.parametrize(
    ("owner", "name"), [(bridge._model, "_build_vision_tower"), (bridge._factory, "create_model")]
)
def test_a_missing_function_is_named_and_no_attribute_error(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError, match=name):
        bridge.check_open_clip()


def test_the_wrapped_functions_keep_open_clips_signatures():
    for ours in (open_clip.create_model, bridge._model._build_vision_tower):
        assert list(inspect.signature(ours).parameters) == list(
            inspect.signature(ours.lazyclip_plain).parameters
        )


def test_the_hooked_methods_are_called_with_what_we_expect():
    # The towers' own methods, as our overrides replace them: names and number of arguments.
    assert list(inspect.signature(VisionTransformer._global_pool).parameters) == ["self", "x"]
    for owner in (Eva, timm.models.vision_transformer.VisionTransformer):
        assert list(inspect.signature(owner.pool).parameters) == ["self", "x", "pool_type"]


@pytest.mark.parametrize("kind", KINDS)
def test_geometry_and_width_are_those_of_the_tower(kind):
    trunk = bridge.trunk_of(make(kind, force_image_size=(48, 32)))
    assert bridge.geometry(trunk) == ((48, 32), (8, 8), (6, 4))
    assert bridge.width_of(trunk) == 32


def test_the_classes_pickle_by_name_and_stay_what_they_were():
    for plain, last in bridge._LAST_CLASS.items():
        assert issubclass(last, plain)
        assert getattr(bridge, last.__name__) is last
        assert "forward" not in vars(last)  # only the pooling is replaced
    model = lazyclip.attach(make(NATIVE))
    assert isinstance(model.visual, VisionTransformer)


def test_activation_of_looks_at_both_towers():
    assert bridge.activation_of(make(NATIVE)) == "gelu"
    assert bridge.activation_of(make(f"{NATIVE}-quickgelu")) == "quickgelu"
    # A timm tower ignores the flag; its text tower does not.
    assert bridge.activation_of(make(EVA, force_quick_gelu=True)) == "quickgelu"


def test_tags_are_copies():
    taken = bridge.tags_of("ViT-B-16")
    taken["openai"]["mean"] = None
    assert open_clip.get_pretrained_cfg("ViT-B-16", "openai")["mean"] is not None
    assert bridge.tags_of("no-such-model") == {}


def test_a_state_dict_that_fits_is_passed_through_and_never_changed_in_place():
    state = make(NATIVE, force_image_size=64).state_dict()
    before = {key: value.clone() for key, value in state.items()}
    fitted = bridge.adapt_state_dict(make(NATIVE), state)
    assert fitted["visual.positional_embedding"].shape == (17, 32)
    assert all(torch.equal(state[key], before[key]) for key in before)
    same = bridge.adapt_state_dict(make(NATIVE), make(NATIVE).state_dict())
    assert all(torch.equal(same[key], value) for key, value in make(NATIVE).state_dict().items())
