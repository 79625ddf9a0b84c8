"""The dense methods: against slow float64, by their identities, and what they refuse."""

import copy
import itertools
import math

import numpy as np
import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention

import lazyclip
from lazyclip import bridge, dense
from lazyclip.base.errors import UserError
from lazyclip.base.registry import Registry
from lazyclip.bridge import Heads, Route
from lazyclip.dense import METHODS, dense_method, nearness, refuse_method
from lazyclip.tower import encode_patches
from tests import reference_dense, toy_models
from tests.reference_dense import Block, gelu, linear, sigmoid
from tests.test_dense import projected
from tests.test_towers import base, final_norm, trunk_of
from tests.toy_models import EVA, KINDS, NATIVE, PATCH, SIZE, TIMM, config_of, make, pixels

PUBLISHED = ("vanilla", "maskclip", "sclip", "clearclip", "naclip")
PLAIN = Route(lambda h: scaled_dot_product_attention(h.q, h.k, h.v, scale=h.scale))


def test_the_methods_are_the_published_ones_in_the_order_of_the_table():
    assert tuple(METHODS) == PUBLISHED == tuple(reference_dense.TABLE)


# --- towers of every build whose last block is read ----------------------------------------------


def noisy(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def eva(**how) -> nn.Module:
    how = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, **how}
    return noisy(Eva(img_size=SIZE, patch_size=PATCH, embed_dim=32, depth=2, num_heads=2,
                     mlp_ratio=2.0, global_pool="token", num_classes=16, use_rot_pos_emb=True,
                     ref_feat_shape=(4, 4), **how))  # fmt: skip


def plain_timm(**how) -> nn.Module:
    return noisy(TimmViT(img_size=SIZE, patch_size=PATCH, embed_dim=32, depth=2, num_heads=2,
                         mlp_ratio=2.0, num_classes=16, **how))  # fmt: skip


def gated(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.attn.gate = nn.Linear(32, 32)
    return noisy(model)


def native(**how) -> nn.Module:
    return make(NATIVE, vision_cfg={**config_of(NATIVE)["vision_cfg"], **how})


TOWERS = {
    "native": lambda: base(NATIVE),
    "native-layer-scale": lambda: native(ls_init_value=0.5),
    "native-quickgelu": lambda: make(f"{NATIVE}-quickgelu"),
    "eva": lambda: base(EVA),
    "eva-fused": lambda: eva(qkv_fused=True),
    "eva-no-bias": lambda: eva(qkv_bias=False, qkv_fused=True),
    "eva-layer-scale": lambda: eva(init_values=0.5),
    "eva-attention-layer-scale": lambda: eva(init_values=0.5, attn_only_layer_scale=True),
    "eva-inner-norm": lambda: eva(scale_attn_inner=True),
    "eva-qk-norm": lambda: eva(qk_norm=True),
    "eva-gated": lambda: gated(eva()),
    "eva-packed-mlp": lambda: eva(scale_mlp=False),
    "eva-plain-mlp": lambda: eva(swiglu_mlp=False, scale_mlp=False),
    "eva-rope-attention": lambda: eva(attn_type="rope", qkv_fused=True),
    "eva-shared-heads": lambda: eva(attn_type="rope", num_kv_heads=1),
    "eva-registers": lambda: eva(num_reg_tokens=2, no_embed_class=True),
    "eva-mixed-rope": lambda: eva(rope_type="mixed"),
    "eva-half-rotation": lambda: eva(rope_rotate_half=True),
    "timm": lambda: base(TIMM),
    "timm-layer-scale": lambda: plain_timm(init_values=0.5),
    "timm-qk-norm": lambda: plain_timm(qk_norm=True, scale_attn_norm=True),
    "timm-registers": lambda: plain_timm(reg_tokens=2),
}


@pytest.mark.parametrize("size", [(SIZE, SIZE), (24, 56)], ids=["own", "wide"])
@pytest.mark.parametrize("name", TOWERS)
def test_taken_apart_and_put_together_again_a_block_is_what_it_was(name, size):
    model = TOWERS[name]()
    images = pixels(size=size)
    with torch.no_grad():
        whole, grid = encode_patches(model, images)
        parts, again = encode_patches(model, images, route=PLAIN)
    assert grid == again
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


# --- against the reference ------------------------------------------------------------------------


def numbers(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().double().numpy()


def layer(module: nn.Linear) -> reference_dense.Linear:
    return numbers(module.weight), numbers(module.bias)


def norm(module: nn.Module) -> tuple[np.ndarray, np.ndarray, float] | None:
    if isinstance(module, nn.Identity):
        return None
    return numbers(module.weight), numbers(module.bias), module.eps


def native_block(block: nn.Module) -> Block:
    attention = block.attn
    weights = np.split(numbers(attention.in_proj_weight), 3)
    biases = np.split(numbers(attention.in_proj_bias), 3)
    quick = type(block.mlp.gelu).__name__ == "QuickGELU"
    act = (lambda x: x * sigmoid(1.702 * x)) if quick else gelu
    first, second = layer(block.mlp.c_fc), layer(block.mlp.c_proj)
    scales = {f"scale{i}": numbers(getattr(block, f"ls_{i}").gamma) for i in (1, 2)
              if hasattr(getattr(block, f"ls_{i}"), "gamma")}  # fmt: skip
    return Block(attention.num_heads, norm(block.ln_1), *zip(weights, biases, strict=True),
                 layer(attention.out_proj), norm(block.ln_2),
                 lambda x: linear(act(linear(x, first)), second), **scales)  # fmt: skip


def swiglu(mlp: nn.Module):
    gate, value, out = (layer(getattr(mlp, name)) for name in ("fc1_g", "fc1_x", "fc2"))

    def run(x: np.ndarray) -> np.ndarray:
        g = linear(x, gate)
        return linear(reference_dense.layer_norm(g * sigmoid(g) * linear(x, value), norm(mlp.norm)),
                      out)  # fmt: skip

    return run


def timm_block(block: nn.Module, rope: torch.Tensor | None) -> Block:
    attention = block.attn
    if getattr(attention, "q_proj", None) is not None:
        qkv = [layer(getattr(attention, f"{name}_proj")) for name in "qkv"]
    else:
        weights = np.split(numbers(attention.qkv.weight), 3)
        if attention.qkv.bias is not None:
            biases = np.split(numbers(attention.qkv.bias), 3)
        else:
            biases = [numbers(attention.q_bias), None, numbers(attention.v_bias)]
        qkv = list(zip(weights, biases, strict=True))
    if hasattr(block.mlp, "fc1_g"):
        mlp = swiglu(block.mlp)
    else:
        first, second = layer(block.mlp.fc1), layer(block.mlp.fc2)
        mlp = lambda x: linear(gelu(linear(x, first)), second)  # noqa: E731
    more = {}
    for i in (1, 2):
        scale = getattr(block, f"gamma_{i}", getattr(getattr(block, f"ls{i}", None), "gamma", None))
        if scale is not None:
            more[f"scale{i}"] = numbers(scale)
    more["gate"] = None if attention.gate is None else layer(attention.gate)
    more["rope"], more["inner_norm"] = numbers(rope), norm(attention.norm)
    more["q_norm"], more["k_norm"] = norm(attention.q_norm), norm(attention.k_norm)
    return Block(attention.num_heads, norm(block.norm1), *qkv, layer(attention.proj),
                 norm(block.norm2), mlp, **more)  # fmt: skip


def into_last_block(model: nn.Module, images: torch.Tensor) -> tuple[np.ndarray, Block]:
    """What the last block gets on the tower's own way, B x T x D, and its numbers."""
    trunk = trunk_of(model)
    native = hasattr(trunk, "transformer")
    block = trunk.transformer.resblocks[-1] if native else trunk.blocks[-1]
    caught = []
    hook = block.register_forward_pre_hook(
        lambda module, args, named: caught.append((args[0], named.get("rope"))), with_kwargs=True
    )
    with torch.no_grad():
        lazyclip.encode_dense(model, images)
    hook.remove()
    x, rope = caught[0]
    return numbers(x), native_block(block) if native else timm_block(block, rope)


def by_hand(
    model: nn.Module, images: torch.Tensor, method: str, x: np.ndarray, block: Block
) -> np.ndarray:
    grid = (images.shape[2] // PATCH, images.shape[3] // PATCH)
    prefix = x.shape[1] - grid[0] * grid[1]
    out = np.stack([reference_dense.last_block(i, block, method, grid, prefix) for i in x])
    tokens = reference_dense.layer_norm(out, norm(final_norm(model)))[:, prefix:]
    joint = projected(model, torch.from_numpy(tokens))  # B x N x E
    return joint.transpose(0, 2, 1).reshape(len(x), -1, *grid)


REFERENCED = [name for name in TOWERS if name not in (
    "eva-packed-mlp", "eva-half-rotation", "eva-shared-heads", "native-quickgelu",
)]  # fmt: skip


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("name", [*REFERENCED, "native-quickgelu"])
def test_every_method_equals_the_reference(name, method):
    model, images = TOWERS[name](), pixels(1, size=(16, 24))
    x, block = into_last_block(model, images)
    wanted = by_hand(model, images, method, x, block)
    with torch.no_grad():
        found = lazyclip.encode_dense(model, images, method)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_without_the_rotary_step_the_reference_is_another():
    # So that the equality above shows that q-q and k-k attentions of EVA keep it.
    model, images = base(EVA), pixels(1, size=(16, 24))
    x, block = into_last_block(model, images)
    assert block.rope is not None
    block.rope = None
    for method in ("sclip", "clearclip", "naclip"):
        other = by_hand(model, images, method, x, block)
        with torch.no_grad():
            found = lazyclip.encode_dense(model, images, method).numpy()
        assert np.abs(found - other).max() > 1e-2 * np.abs(other).max()


# --- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_route_of_the_own_attention_gives_the_pooled_output_at_the_cls_token(kind):
    model = base(kind)
    with torch.no_grad():
        tokens, prefix, _ = bridge.final_tokens(trunk_of(model), pixels(), route=PLAIN)
        assert prefix == 1
        ours = lazyclip.project(model, tokens[:, 0])
        torch.testing.assert_close(ours, model.encode_image(pixels()))


@pytest.mark.parametrize("kind", [NATIVE, EVA, TIMM])
def test_identity_attention_is_the_output_projection_of_the_values(kind):
    model = base(kind)
    x, block = into_last_block(model, pixels())
    values = linear(reference_dense.layer_norm(x, block.norm1), block.v)
    bare = reference_dense.layer_norm(linear(values, block.out), norm(final_norm(model)))
    route = Route(METHODS["maskclip"].attend, residual=False, mlp=False)
    with torch.no_grad():
        found = encode_patches(model, pixels(), route=route)[0]
    np.testing.assert_allclose(found, bare[:, 1:], atol=2e-5)


def heads_of(model: nn.Module, images: torch.Tensor) -> Heads:
    seen = []
    with torch.no_grad():
        encode_patches(model, images, route=Route(lambda h: seen.append(h) or h.v))
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
def test_with_equal_projections_of_q_and_k_sclips_attention_is_twice_the_vanilla_one(kind):
    model = copy.deepcopy(base(kind))
    attention = bridge.last_block.blocks_of(trunk_of(model))[-1].attn
    with torch.no_grad():
        if kind == EVA:  # its k has no bias
            attention.q_proj.bias.zero_()
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        else:
            packed = attention if kind == NATIVE else attention.qkv
            weight, bias = (
                (packed.in_proj_weight, packed.in_proj_bias)
                if kind == NATIVE
                else (packed.weight, packed.bias)
            )
            weight[32:64] = weight[:32]
            bias[32:64] = bias[:32]
    heads = heads_of(model, pixels())
    torch.testing.assert_close(heads.q, heads.k)
    own = PLAIN.attend(heads)
    torch.testing.assert_close(METHODS["sclip"].attend(heads), 2 * own)
    torch.testing.assert_close(METHODS["clearclip"].attend(heads), own)
    before = heads_of(base(kind), pixels())
    assert not torch.allclose(METHODS["sclip"].attend(before), 2 * PLAIN.attend(before), atol=1e-3)


def test_constant_values_show_what_the_rows_sum_to():
    heads = heads_of(base(NATIVE), pixels())
    one = heads._replace(v=torch.ones_like(heads.v))
    for method, total in (("maskclip", 1), ("sclip", 2), ("clearclip", 1), ("naclip", 1)):
        torch.testing.assert_close(METHODS[method].attend(one), torch.full_like(heads.v, total))


def test_nearness_of_three_patches_in_a_row():
    ours = nearness((1, 3))
    assert ours.shape == (4, 4)
    assert ours[0].tolist() == ours[:, 0].tolist() == [0, 0, 0, 0]
    assert ours[1, 1:].tolist() == pytest.approx([1, 0.980199, 0.923116], abs=1e-6)
    torch.testing.assert_close(ours, ours.T)


@pytest.mark.parametrize(("grid", "prefix"), [((3, 5), 1), ((1, 1), 0), ((4, 2), 3)])
def test_nearness_equals_the_reference(grid, prefix):
    wanted = reference_dense.gaussian(grid, prefix, sigma=2.5)
    np.testing.assert_allclose(nearness(grid, prefix, sigma=2.5), wanted, atol=1e-7)


def test_a_vanishing_deviation_leaves_each_patch_near_itself_alone():
    ours = nearness((3, 4), prefix=2, sigma=1e-3)
    assert torch.equal(ours[2:, 2:], torch.eye(12))
    assert not ours[:2].any()
    assert not ours[:, :2].any()


@pytest.mark.parametrize("sigma", [0, -1, math.nan])
def test_a_deviation_that_is_none_is_refused(sigma):
    with pytest.raises(ValueError, match=r"sigma is .*above 0"):
        nearness((2, 2), sigma=sigma)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_of_any_two_methods_differ_somewhere(kind):
    model, images = base(kind), pixels(4, size=(64, 64))
    queries = normalize(torch.randn(9, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    found = {}
    with torch.no_grad():
        for method in METHODS:
            unit = normalize(lazyclip.encode_dense(model, images, method), dim=1)
            found[method] = torch.einsum("behw,qe->bqhw", unit, queries).argmax(dim=1)
    for one, other in itertools.combinations(found, 2):
        assert bool((found[one] != found[other]).any()), f"{one} and {other} predict the same"


# --- whatever the pooling, size, precision --------------------------------------------------------


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_pooling_plays_no_part(kind, method):
    images = pixels(size=(24, 16))
    with torch.no_grad():
        plain = lazyclip.encode_dense(base(kind), images, method)
        for pooling in ("last", "mean"):
            pooled = toy_models.last(base(kind), pooling=pooling)
            assert torch.equal(lazyclip.encode_dense(pooled, images, method), plain)


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_works_in_bf16_and_under_autocast(kind, method):
    images = pixels(size=(16, 64))
    with torch.no_grad():
        exact = lazyclip.encode_dense(base(kind), images, method)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = lazyclip.encode_dense(base(kind), images, method)
        whole = copy.deepcopy(base(kind)).bfloat16()
        low = lazyclip.encode_dense(whole, images.bfloat16(), method)
    assert low.dtype == torch.bfloat16
    for other in (mixed, low):
        assert float((other.float() - exact).abs().max()) < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_see_the_others_of_its_batch_and_a_gradient_flows(kind, method):
    images = pixels(3, size=(24, 32)).requires_grad_()
    whole = lazyclip.encode_dense(base(kind), images, method)
    with torch.no_grad():
        alone = lazyclip.encode_dense(base(kind), images[1:2], method)
    torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-4)
    whole[0].square().sum().backward()
    assert float(images.grad[0].abs().sum()) > 0
    assert not images.grad[1:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_leaves_the_tower_as_it_was(kind):
    model = copy.deepcopy(base(kind))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = model.encode_image(pixels())
    for method in METHODS:
        lazyclip.encode_dense(model, pixels(size=(16, 64)), method)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(model.encode_image(pixels()), before)


def test_the_gaussian_kept_from_inference_mode_serves_training():
    dense._cached_nearness.cache_clear()
    with torch.inference_mode():
        lazyclip.encode_dense(base(NATIVE), pixels(), "naclip")
    images = pixels().requires_grad_()
    lazyclip.encode_dense(base(NATIVE), images, "naclip").sum().backward()
    assert bool(images.grad.isfinite().all())


def test_patch_dropout_drops_nothing_in_training_mode():
    model = copy.deepcopy(native(patch_dropout=0.5)).train()
    assert lazyclip.encode_dense(model, pixels(), "sclip").shape == (2, 16, 4, 4)


# --- registering one ------------------------------------------------------------------------------


def test_a_method_is_one_function_and_one_registration(monkeypatch):
    table = Registry("dense method")
    monkeypatch.setattr(dense, "METHODS", table)

    @dense_method("mean", residual=False, mlp=False)
    def _everyone(heads: Heads) -> torch.Tensor:
        return heads.v.mean(dim=2, keepdim=True).expand_as(heads.v)

    with torch.no_grad():
        found = lazyclip.encode_dense(base(NATIVE), pixels(), "mean")
    torch.testing.assert_close(found, found[:, :, :1, :1].expand_as(found))
    with pytest.raises(RuntimeError, match="registered twice"):
        dense_method("mean", residual=True, mlp=True)(_everyone)


# --- refusals -------------------------------------------------------------------------------------


def diff_attention() -> nn.Module:
    return plain_timm(attn_layer="diff")


UNKNOWN_BLOCKS = {
    "custom-native": (lambda: native(qk_norm=True), "CustomResidualAttentionBlock"),
    "eva-post-norm": (lambda: eva(use_post_norm=True), "EvaBlockPostNorm"),
    "timm-post-norm": (lambda: plain_timm(block_fn=ResPostBlock), "ResPostBlock"),
    "timm-differential": (diff_attention, "DiffAttention"),
}


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("name", UNKNOWN_BLOCKS)
def test_a_block_of_another_build_is_refused_by_name_and_vanilla_runs(name, method):
    build, said = UNKNOWN_BLOCKS[name]
    model = build()
    if method == "vanilla":
        refuse_method(model, method)
        assert lazyclip.encode_dense(model, pixels(), method).shape == (2, 16, 4, 4)
        return
    for refused in (refuse_method, lambda m, how: lazyclip.encode_dense(m, pixels(), how)):
        with pytest.raises(UserError, match=f"'{method}'.*{said}.*use vanilla") as caught:
            refused(model, method)
        assert "\n" not in str(caught.value)


def test_a_block_that_takes_tokens_before_batch_is_refused():
    model = copy.deepcopy(base(NATIVE))
    model.visual.transformer.resblocks[-1].attn.batch_first = False
    with pytest.raises(UserError, match="takes tokens before batch"):
        refuse_method(model, "sclip")


@pytest.mark.parametrize("method", PUBLISHED)
def test_towers_without_patch_tokens_are_refused_for_every_method(method):
    resnet = timm.create_model("resnet18", num_classes=4)
    attention_pooled = plain_timm(global_pool="map")
    for model in (resnet, attention_pooled):
        with pytest.raises(UserError, match=type(model).__name__):
            refuse_method(model, method)


def test_what_fits_is_not_refused_and_an_unknown_name_is():
    for kind, method in itertools.product(KINDS, METHODS):
        refuse_method(base(kind), method)
        refuse_method(toy_models.last(base(kind)), method)
    with pytest.raises(UserError, match="unknown dense method 'nacl'; known: naclip"):
        refuse_method(base(NATIVE), "nacl")


def test_a_route_without_an_attention_is_the_block_itself():
    with pytest.raises(ValueError, match="call the block"):
        bridge.last_block.run_route(
            base(NATIVE).visual, torch.zeros(1, 17, 32), None, (4, 4), Route()
        )
