"""The guard against an open_clip that does not fit, and the hooks into the one that does."""

import inspect

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from torch import nn
from torch.nn import functional

import lazyclip
from lazyclip import bridge
from lazyclip.bridge.shadow import shadowed
from tests.toy_models import EVA, KINDS, NATIVE, config_of, make


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
     (Eva, "pool"), (timm.models.vision_transformer.VisionTransformer, "pool"),
     (Eva, "_pos_embed"), (timm.models.vision_transformer.VisionTransformer, "_pos_embed")],
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


# --- other tensors for one call -------------------------------------------------------------------


def test_a_shadow_is_read_in_place_of_parameter_and_buffer_and_goes_with_the_block():
    module = nn.BatchNorm1d(2)
    weight, mean = module.weight, module.running_mean
    order = list(module.state_dict())
    shadow = 2 * weight
    with shadowed(module, weight=shadow, running_mean=torch.ones(2)):
        assert module.weight is shadow
        assert module.running_mean.tolist() == [1, 1]
        assert list(module.state_dict()) == order
        module.weight.sum().backward()
    assert module.weight is weight
    assert weight.grad.tolist() == [2, 2]
    assert module.running_mean is mean
    assert not set(vars(module)) & {"weight", "running_mean"}


def test_a_shadow_goes_after_an_error_too_and_shadows_nest():
    module = nn.Linear(1, 1).requires_grad_(False)
    with shadowed(module, bias=torch.tensor([3.0])):
        with pytest.raises(RuntimeError), shadowed(module, bias=torch.tensor([4.0])):
            module(torch.zeros(1, 5))
        assert float(module.bias) == 3
        with shadowed(module, bias=torch.tensor([4.0])):
            assert float(module(torch.zeros(1))) == 4
        assert float(module(torch.zeros(1))) == 3
    assert isinstance(module.bias, nn.Parameter)


# --- the text tower -------------------------------------------------------------------------------

TEXTS = ["cat", "a red bus", "the old dog at the very end of a long road that never ends"]


def text_model(kind: str = NATIVE, **text) -> nn.Module:
    return make(kind, text_cfg={**config_of(kind)["text_cfg"], "layers": 2, **text})


def tokens_of(texts: list[str]) -> torch.Tensor:
    return open_clip.get_tokenizer(NATIVE)(texts)


@pytest.mark.parametrize("kind", [NATIVE, EVA])
def test_a_cut_prompt_gives_the_feature_of_the_full_length(kind):
    model = text_model(kind, context_length=77)
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    assert bridge.text_lengths(model, tokens).tolist() == [3, 5, 16]
    owner = getattr(model, "text", model)
    seen = []
    owner.token_embedding.register_forward_hook(lambda m, a, out: seen.append(tuple(a[0].shape)))
    for texts, longest in ((tokens, 16), (tokens[:2], 5), (tokens[:1], 3)):
        with torch.no_grad():
            short, full = bridge.encode_text(model, texts), model.encode_text(texts)
        assert seen[-2:] == [(len(texts), longest), (len(texts), 77)]
        unit, wanted = (functional.normalize(x, dim=-1) for x in (short, full))
        torch.testing.assert_close(unit, wanted, rtol=0, atol=1e-6)
    assert not {"attn_mask", "positional_embedding"} & set(vars(owner))


def test_a_cut_before_the_end_token_would_be_another_feature():
    # So that the equality above shows that the length is right and not just that all lengths do.
    model = text_model(context_length=77)
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    with torch.no_grad():
        full = model.encode_text(tokens)
        owner = {"attn_mask": model.attn_mask[:15, :15],
                 "positional_embedding": model.positional_embedding[:15]}  # fmt: skip
        with shadowed(model, **owner):
            cut = model.encode_text(tokens[:, :15])
    torch.testing.assert_close(cut[:2], full[:2], rtol=0, atol=1e-5)
    assert float((cut[2] - full[2]).abs().max()) > 1e-2


def test_the_end_token_is_found_by_its_id_where_the_tower_pools_there():
    model = text_model(EVA, pool_type="eos", eos_id=49407)
    tokens = tokens_of(["cat", "a red bus"])
    assert bridge.text_lengths(model, tokens).tolist() == [3, 5]
    with torch.no_grad():
        ours, full = bridge.encode_text(model, tokens), model.encode_text(tokens)
    torch.testing.assert_close(ours, full, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [{"no_causal_mask": True}, {"embed_cls": True}, {"pool_type": "last"}, {"pool_type": "first"}],
    ids=str,
)
def test_where_a_cut_is_not_exact_the_full_length_is_taken(how):
    model = text_model(EVA, **how)
    tokens = tokens_of(["cat", "dog"])
    assert bridge.text_lengths(model, tokens).tolist() == [8, 8]
    with torch.no_grad():
        assert torch.equal(bridge.encode_text(model, tokens), model.encode_text(tokens))


class OtherText(nn.Module):
    """A text tower that is not open_clip's own, as one from Hugging Face."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.register_buffer("attn_mask", torch.full((8, 8), -torch.inf).triu_(1))
        self.pool_type, self.positional_embedding = "argmax", torch.zeros(8, 1)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return text.shape[1] * self.weight.expand(len(text), -1)


def test_a_text_tower_of_another_make_gets_the_full_length():
    model = make(EVA)
    model.text = OtherText()
    assert bridge.encode_text(model, tokens_of(["cat"])).unique().tolist() == [8]


def test_a_model_of_another_make_gets_the_full_length():
    class Other(type(make(NATIVE))):
        """What it does with the tokens is not known."""

    model = make(NATIVE)
    model.__class__ = Other
    assert bridge.text_lengths(model, tokens_of(["cat"])).tolist() == [8]


def test_no_text_is_no_error_and_a_gradient_reaches_the_positions_read():
    model = make(NATIVE)
    assert bridge.encode_text(model, tokens_of(["cat"])[:0]).shape == (0, 16)
    bridge.encode_text(model, tokens_of(["cat"])).sum().backward()
    read = model.positional_embedding.grad.abs().sum(dim=1) > 0
    assert read.tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize("kind", [NATIVE, EVA])
def test_cut_prompts_work_under_autocast(kind):
    model = make(kind)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        short = bridge.encode_text(model, tokens_of(["cat"])).float()
        full = model.encode_text(tokens_of(["cat"])).float()
    assert float((short - full).abs().max()) < 0.05 * float(full.abs().max())
