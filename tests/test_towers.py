"""No route through a tower passes the pooling by; attach, detach and refusals.

The expected vector is made by hand on every route: the tokens behind the tower's final norm are
caught, pooled by `tests.reference`, and multiplied with the tower's own projection.
"""

import contextlib
import copy
import functools
import io
import pickle

import numpy as np
import open_clip
import pytest
import timm
import torch
from torch import nn

import lazyclip
from lazyclip import bridge
from lazyclip.base.errors import UserError
from lazyclip.pooling import PoolSpec, resolve_k
from lazyclip.tower import pooling_of
from tests import reference, toy_models
from tests.toy_models import EVA, KINDS, NATIVE, TIMM, N, make, pixels


def trunk_of(model: nn.Module) -> nn.Module:
    visual = getattr(model, "visual", model)
    return getattr(visual, "trunk", visual)


def final_norm(model: nn.Module) -> nn.Module:
    trunk = trunk_of(model)
    return trunk.ln_post if hasattr(trunk, "ln_post") else trunk.norm


def by_hand(model: nn.Module, patches: torch.Tensor, k: int | float) -> np.ndarray:
    """Pool patch tokens by the reference and project them with the tower's weights, B x E."""
    exact = patches.detach().double().numpy()
    count = resolve_k(k, exact.shape[1])
    pooled = np.stack([reference.last_pool(image, count) for image in exact])
    trunk = trunk_of(model)
    if hasattr(trunk, "proj"):
        return pooled @ trunk.proj.detach().double().numpy()
    weight, bias = (p.detach().double().numpy() for p in (trunk.head.weight, trunk.head.bias))
    return pooled @ weight.T + bias


@contextlib.contextmanager
def caught_patches(model: nn.Module):
    """Collect what the final norm gives out, prefix token removed."""
    found = []
    hook = final_norm(model).register_forward_hook(lambda m, i, out: found.append(out[:, 1:]))
    try:
        yield found
    finally:
        hook.remove()


# --- routes --------------------------------------------------------------------------------------


def through_deepcopy(model, images):
    return copy.deepcopy(model).encode_image(images)


def through_pickle(model, images):
    return pickle.loads(pickle.dumps(model)).encode_image(images)


def through_torch_save(model, images):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False).encode_image(images)


def through_state_dict(model, images):
    fresh = make(f"LaSt-{KIND_OF[type(trunk_of(model)).__name__]}", seed=5)
    lazyclip.attach(fresh, k=pooling_of(model).k)
    fresh.load_state_dict(model.state_dict())
    return fresh.encode_image(images)


def through_output_tokens(model, images):
    model.visual.output_tokens = True
    try:
        return model.visual(images)[0]
    finally:
        model.visual.output_tokens = False


def through_trunk_head(model, images):
    return model.visual.trunk.forward_head(model.visual.trunk.forward_features(images))


def through_pre_logits(model, images):
    trunk = model.visual.trunk
    return trunk.head(trunk.forward_head(trunk.forward_features(images), pre_logits=True))


def through_training(model, images):
    model.train()
    model.set_grad_checkpointing(True)
    try:
        with torch.enable_grad():
            return model.encode_image(images.clone().requires_grad_()).detach()
    finally:
        model.set_grad_checkpointing(False)
        model.eval()


def through_autocast(model, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.encode_image(images)


KIND_OF = {"LaStVisionTransformer": NATIVE, "LaStEva": EVA, "LaStTimmVisionTransformer": TIMM}
ROUTES = {
    "encode_image": lambda m, x: m.encode_image(x),
    "visual": lambda m, x: m.visual(x),
    "forward": lambda m, x: m(x, None)[0] * 1.0,
    "forward_dict": lambda m, x: m.forward_intermediates(image=x, normalize=False)[
        "image_features"
    ],
    "visual_intermediates": lambda m, x: m.visual.forward_intermediates(x)["image_features"],
    "intermediates_of_last_layer": lambda m, x: m.visual.forward_intermediates(
        x, indices=1, normalize_intermediates=True, stop_early=True
    )["image_features"],
    "encode_tokens": lambda m, x: lazyclip.project(m, lazyclip.encode_tokens(m, x).pooled),
    "deepcopy": through_deepcopy,
    "pickle": through_pickle,
    "torch_save": through_torch_save,
    "load_state_dict": through_state_dict,
    "training_with_checkpointing": through_training,
}
NATIVE_ROUTES = {"output_tokens": through_output_tokens}
TIMM_ROUTES = {
    "trunk": lambda m, x: m.visual.trunk(x),
    "forward_head": through_trunk_head,
    "pre_logits": through_pre_logits,
    "pool_by_name": lambda m, x: m.visual.trunk.head(
        m.visual.trunk.pool(m.visual.trunk.forward_features(x), pool_type="token")
    ),
}


@functools.cache
def base(kind: str) -> nn.Module:
    return make(kind)


CASES = [
    *((kind, route) for kind in KINDS for route in ROUTES),
    *((NATIVE, route) for route in NATIVE_ROUTES),
    *((kind, route) for kind in (EVA, TIMM) for route in TIMM_ROUTES),
]


@pytest.mark.parametrize(("kind", "route"), CASES)
def test_every_route_gives_the_pooled_vector(kind, route):
    run = {**ROUTES, **NATIVE_ROUTES, **TIMM_ROUTES}[route]
    images = pixels()
    results = []
    for k in (1, 1.0):
        model = toy_models.last(base(kind), k=k)
        with torch.no_grad():
            with caught_patches(model) as found:
                plain = model.encode_image(images)
            wanted = by_hand(model, found[0], k)
            results.append(run(model, images).double().numpy())
        if route == "forward":  # the model's forward gives unit vectors
            wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
        np.testing.assert_allclose(results[-1], wanted, rtol=1e-4, atol=1e-5)
        assert plain.shape == wanted.shape
        if isinstance(k, float):
            patches = found[0].double().mean(dim=1)
            mean = lazyclip.project(model, patches.float()).detach().numpy()
            if route == "forward":
                mean = mean / np.linalg.norm(mean, axis=1, keepdims=True)
            np.testing.assert_allclose(results[-1], mean, rtol=1e-4, atol=1e-5)
    assert np.abs(results[0] - results[1]).max() > 1e-2


@pytest.mark.parametrize("kind", [NATIVE, EVA])
def test_a_compiled_tower_is_one_graph_and_pools(kind):
    torch._dynamo.reset()
    model, images = toy_models.last(base(kind), k=1), pixels()
    with torch.no_grad():
        patches = lazyclip.encode_tokens(model, images).patches
        compiled = torch.compile(model.visual, fullgraph=True, backend="aot_eager")
        ours = compiled(images)
    np.testing.assert_allclose(ours, by_hand(model, patches, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_in_bf16_pools_by_the_same_rule(kind):
    images = pixels()
    results = []
    for k in (1, 1.0):
        model = toy_models.last(base(kind), k=k)
        with torch.no_grad(), caught_patches(model) as found:
            ours = through_autocast(model, images)
        assert ours.dtype == torch.bfloat16
        wanted = by_hand(model, found[0], k)
        np.testing.assert_allclose(ours.double(), wanted, atol=2e-2 * np.abs(wanted).max())
        results.append(ours)
    assert not torch.allclose(*results, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "amp_bf16"])
def test_models_created_in_another_precision_pool_by_the_same_rule(kind, precision):
    images = pixels()
    if precision != "amp_bf16":
        images = images.bfloat16()
    results = []
    for k in (1, 1.0):
        model = lazyclip.attach(make(f"LaSt-{kind}", precision=precision), k=k)
        with torch.no_grad(), caught_patches(model) as found:
            ours = model.encode_image(images)
        wanted = by_hand(model, found[0], k)
        np.testing.assert_allclose(ours.double(), wanted, atol=3e-2 * np.abs(wanted).max())
        results.append(ours)
    assert not torch.allclose(*results, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_casting_a_model_to_bf16_and_back_does_not_touch_the_filter(kind):
    model = toy_models.last(base(kind), k=0.5)
    plain_buffers = list(dict(base(kind).named_buffers()))
    assert list(dict(model.named_buffers())) == plain_buffers
    cast = copy.deepcopy(model).bfloat16().float()
    with torch.no_grad(), caught_patches(cast) as found:
        ours = cast.encode_image(pixels())
    np.testing.assert_allclose(ours, by_hand(cast, found[0], 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 0.5, 1.0])
@pytest.mark.parametrize("kind", [NATIVE, EVA])
def test_patch_dropout_leaves_a_fraction_of_the_patches_that_stay(kind, k):
    config = {"force_patch_dropout": 0.5} if kind == NATIVE else {}
    model = make(f"LaSt-{kind}", **config)
    if kind == EVA:
        drop = toy_models.toy_eva(num_classes=16, global_pool="token", patch_drop_rate=0.5)
        model.visual.trunk.patch_drop = drop.patch_drop
    lazyclip.attach(model, k=k).train()
    with torch.no_grad(), caught_patches(model) as found:
        ours = model.encode_image(pixels())
    assert found[0].shape[1] == N // 2
    np.testing.assert_allclose(ours, by_hand(model, found[0], k), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_features_know_every_patch_in_train_mode_with_patch_dropout(kind):
    model = make(f"LaSt-{kind}", **({"force_patch_dropout": 0.5} if kind == NATIVE else {}))
    if kind == EVA:
        source = toy_models.toy_eva(num_classes=16, global_pool="token", patch_drop_rate=0.5)
        model.visual.trunk.patch_drop = source.patch_drop
    if kind == TIMM:
        source = toy_models.toy_timm(num_classes=16, patch_drop_rate=0.5)
        model.visual.trunk.patch_drop = source.patch_drop
    with torch.no_grad():
        calm = lazyclip.encode_dense(model, pixels())
        busy = lazyclip.encode_dense(model.train(), pixels())
        assert lazyclip.encode_tokens(model, pixels()).patches.shape[1] == N
    torch.testing.assert_close(busy, calm)
    assert model.visual.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("pooling", ["token", "mean", "max"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_other_poolings_are_what_their_names_say(kind, pooling):
    model = toy_models.last(base(kind), pooling=pooling)
    with torch.no_grad():
        tokens = lazyclip.encode_tokens(model, pixels())
        wanted = {
            "token": tokens.prefix[:, 0],
            "mean": tokens.patches.mean(dim=1),
            "max": tokens.patches.amax(dim=1),
        }[pooling]
        torch.testing.assert_close(tokens.pooled, wanted)
        torch.testing.assert_close(model.encode_image(pixels()), lazyclip.project(model, wanted))
    if pooling == "token":
        assert torch.equal(model.encode_image(pixels()), base(kind).encode_image(pixels()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_so_ddp_waits_for_none(kind):
    model = toy_models.last(base(kind), k=1).train()
    text = open_clip.get_tokenizer(NATIVE)(["a", "b"])[:, :8]
    image, words, scale = model(pixels(), text)[:3]
    (scale * image @ words.T).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = toy_models.last(base(kind), k=0.5).train()
        model.set_grad_checkpointing(checkpointing)
        model.encode_image(pixels()).square().sum().backward()
        return [p.grad for p in model.visual.parameters()]

    for plain, checked in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checked)


@pytest.mark.dist
@pytest.mark.parametrize("kind", [NATIVE, EVA])
def test_a_model_wrapped_by_ddp_pools_too(kind, tmp_path):
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        text = torch.zeros(2, 8, dtype=torch.int64)
        for k in (1, 1.0):
            model = toy_models.last(base(kind), k=k)
            wrapped = nn.parallel.DistributedDataParallel(model)
            with caught_patches(model) as found:
                ours = wrapped(pixels(), text)[0]
            wanted = by_hand(model, found[0], k)
            wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
            np.testing.assert_allclose(ours.detach(), wanted, rtol=1e-4, atol=1e-5)
            for _ in range(2):  # a second step fails where a parameter was left without gradient
                image, words, scale = wrapped(pixels(), text)[:3]
                (scale * image @ words.T).square().sum().backward()
    finally:
        dist.destroy_process_group()


# --- attach and detach ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_detach_gives_the_own_output_back_bit_for_bit(kind):
    model, images = copy.deepcopy(base(kind)), pixels()
    before = model.encode_image(images)
    keys, kind_before = list(model.state_dict()), type(trunk_of(model))
    assert lazyclip.attach(model, k=1) is model
    assert list(model.state_dict()) == keys
    assert list(dict(model.named_modules())) == list(dict(base(kind).named_modules()))
    assert not torch.allclose(model.encode_image(images), before, atol=1e-2)
    assert lazyclip.detach(model) is model
    assert torch.equal(model.encode_image(images), before)
    assert type(trunk_of(model)) is kind_before
    assert vars(trunk_of(model)).keys() == vars(trunk_of(base(kind))).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_detaching_a_plain_model_changes_nothing(kind):
    model = copy.deepcopy(base(kind))
    before = model.encode_image(pixels())
    lazyclip.detach(lazyclip.detach(model))
    assert torch.equal(model.encode_image(pixels()), before)


@pytest.mark.parametrize("kind", KINDS)
def test_attaching_again_replaces_the_options(kind):
    model = toy_models.last(base(kind), k=1)
    lazyclip.attach(model, k=3, score="repo", kernel="repo", sigma=2.0, eps=0.0)
    assert pooling_of(model) == PoolSpec("last", "repo", 3, 2.0, "repo", 0.0)
    with torch.no_grad():
        tokens = lazyclip.encode_tokens(model, pixels())
        wanted = lazyclip.last_pool(
            tokens.patches, 3, score="repo", kernel="repo", sigma=2.0, eps=0.0
        )
    torch.testing.assert_close(tokens.pooled, wanted)
    lazyclip.detach(model)
    assert torch.equal(model.encode_image(pixels()), base(kind).encode_image(pixels()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_attach_leaves_the_model_as_it_was(kind):
    model = copy.deepcopy(base(kind))
    before = model.encode_image(pixels())
    with pytest.raises(UserError, match=f"17 exceeds the {N} patches of this tower at 32 x 32 px"):
        lazyclip.attach(model, k=17)
    with pytest.raises(UserError, match="unknown score 'papr'"):
        lazyclip.attach(model, score="papr")
    assert torch.equal(model.encode_image(pixels()), before)
    lazyclip.attach(model, k=16)  # the largest that fits


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_pools_by_itself(kind):
    model = toy_models.last(base(kind), k=1)
    twin = copy.deepcopy(model)
    lazyclip.attach(model, k=1.0)
    assert pooling_of(twin).k == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert float(twin.encode_image(pixels()).detach().abs().max()) > 0.1


def test_pooling_of_a_plain_model_is_its_own_aggregation():
    for kind in KINDS:
        assert pooling_of(base(kind)).pooling == "token"
        assert pooling_of(make(f"LaSt-{kind}")) == PoolSpec()
    averaged = open_clip.transformer.VisionTransformer(32, 8, 32, 1, 2, 2.0, pool_type="avg")
    assert pooling_of(averaged).pooling == "mean"


def test_a_visual_tower_and_a_timm_model_can_be_given_alone():
    tower = copy.deepcopy(base(NATIVE)).visual
    lazyclip.attach(tower, k=1)
    torch.testing.assert_close(
        tower(pixels()), toy_models.last(base(NATIVE), k=1).encode_image(pixels())
    )
    for make_timm in (toy_models.toy_eva, toy_models.toy_timm):
        model = make_timm(num_classes=5, global_pool="token").eval()
        before = model(pixels())
        lazyclip.attach(model, k=1)
        tokens = lazyclip.encode_tokens(model, pixels())
        torch.testing.assert_close(
            model(pixels()), model.head(lazyclip.last_pool(tokens.patches, 1))
        )
        torch.testing.assert_close(lazyclip.project(model, tokens.pooled), model(pixels()))
        assert torch.equal(lazyclip.detach(model)(pixels()), before)


def test_registers_are_prefix_tokens():
    model = timm.create_model("toy_timm", num_classes=5, reg_tokens=3, global_pool="token").eval()
    lazyclip.attach(model, k=1)
    tokens = lazyclip.encode_tokens(model, pixels())
    assert tokens.prefix.shape[1] == 4
    assert tokens.patches.shape[1] == N
    torch.testing.assert_close(model(pixels()), model.head(lazyclip.last_pool(tokens.patches, 1)))


def test_a_tower_without_cls_token_takes_last_and_refuses_token():
    model = timm.create_model(
        "toy_timm", num_classes=5, class_token=False, global_pool="avg", fc_norm=False
    ).eval()
    lazyclip.attach(model, k=1.0)
    tokens = lazyclip.encode_tokens(model, pixels())
    assert tokens.prefix.shape[1] == 0
    torch.testing.assert_close(model(pixels()), model.head(tokens.patches.mean(dim=1)))
    with pytest.raises(UserError, match="CLS"):
        lazyclip.attach(model, pooling="token")


def test_another_pool_type_at_call_time_is_an_error_and_no_silent_bypass():
    for kind in (EVA, TIMM):
        trunk = trunk_of(toy_models.last(base(kind), k=1))
        with pytest.raises(ValueError, match="would bypass pooling 'last'"):
            trunk.pool(trunk.forward_features(pixels()), pool_type="avg")


def test_a_new_classifier_head_keeps_the_pooling():
    model = toy_models.toy_timm(num_classes=5, global_pool="token").eval()
    lazyclip.attach(model, k=1)
    model.reset_classifier(3)
    tokens = lazyclip.encode_tokens(model, pixels())
    torch.testing.assert_close(model(pixels()), model.head(lazyclip.last_pool(tokens.patches, 1)))


def test_locking_the_image_tower_works_as_before():
    model = toy_models.last(base(NATIVE), k=1)
    model.lock_image_tower(unlocked_groups=1)
    open_ones = {n for n, p in model.visual.named_parameters() if p.requires_grad}
    assert open_ones == {"proj"}
    eva = toy_models.last(base(EVA), k=1)
    eva.lock_image_tower()
    assert not any(p.requires_grad for p in eva.visual.parameters())


# --- towers that cannot pool so ------------------------------------------------------------------


def siglip() -> nn.Module:
    return timm.create_model("toy_timm", num_classes=0, global_pool="map", class_token=False)


def convnext() -> nn.Module:
    return timm.create_model("convnext_atto", num_classes=0)


def resnet() -> nn.Module:
    return open_clip.model.CLIP(
        16,
        {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        dict(toy_models.TEXT),
    )


def coca() -> nn.Module:
    return open_clip.CoCa(
        16,
        {**dict(toy_models.TEXT), "layers": 2, "vocab_size": 64},
        {**dict(toy_models.TEXT), "embed_cls": True, "output_tokens": True, "vocab_size": 64},
        {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8,
         "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    )  # fmt: skip


def norm_after_pool() -> nn.Module:
    return open_clip.transformer.VisionTransformer(32, 8, 32, 1, 2, 2.0, final_ln_after_pool=True)


def averaging_timm() -> nn.Module:
    return timm.create_model("toy_timm", num_classes=5, global_pool="avg")


def no_pool() -> nn.Module:
    return open_clip.transformer.VisionTransformer(32, 8, 32, 1, 2, 2.0, pool_type="none")


@pytest.mark.parametrize(
    ("build", "named"),
    [(siglip, "attention"), (convnext, "ConvNeXt"), (resnet, "ModifiedResNet"),
     (coca, "attention"), (norm_after_pool, "normalises after pooling"),
     (averaging_timm, "normalises after pooling"), (no_pool, "pool_type none")],
)  # fmt: skip
def test_a_tower_that_cannot_pool_patches_is_refused_by_name(build, named):
    model = build().eval()
    for call in (
        lambda: lazyclip.attach(model),
        lambda: lazyclip.encode_dense(model, pixels()),
        lambda: lazyclip.encode_tokens(model, pixels()),
    ):
        with pytest.raises(UserError, match=named) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert type(bridge.trunk_of(model)).__name__ in str(caught.value)
    lazyclip.detach(model)  # nothing to take away, and no error
