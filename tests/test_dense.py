"""Dense features: by hand at the own size, at every multiple of the patch, and what is refused."""

import copy

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

import lazyclip
from lazyclip import bridge
from lazyclip.base.errors import UserError
from lazyclip.dense import METHODS
from tests import reference, reference_dense, toy_models
from tests.test_towers import base, caught_patches, final_norm, trunk_of
from tests.toy_models import EVA, KINDS, NATIVE, PATCH, SIZE, TIMM, make, pixels

SIZES = [(32, 32), (40, 40), (64, 64), (8, 8), (16, 64), (64, 16), (24, 56)]


def projected(model: nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """Tokens times the tower's own projection, in float64, ... x E."""
    trunk = trunk_of(model)
    exact = tokens.detach().double().numpy()
    if hasattr(trunk, "proj"):
        return exact @ trunk.proj.detach().double().numpy()
    weight, bias = (p.detach().double().numpy() for p in (trunk.head.weight, trunk.head.bias))
    return exact @ weight.T + bias


def norm_by_hand(x: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    weight, bias = (p.detach().double().numpy() for p in (norm.weight, norm.bias))
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + norm.eps) * weight + bias


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_vanilla_is_final_norm_then_projection_of_every_patch(kind, plain):
    model = base(kind) if plain else toy_models.last(base(kind), k=1)
    before_norm = []
    hook = final_norm(model).register_forward_pre_hook(lambda m, i: before_norm.append(i[0]))
    with torch.no_grad():
        model.encode_image(pixels())  # the plain way through the tower, not ours
        hook.remove()
        dense = lazyclip.encode_dense(model, pixels())
    tokens = norm_by_hand(before_norm[0].double().numpy(), final_norm(model))
    wanted = projected(model, torch.from_numpy(tokens))[:, 1:]  # B x N x E
    assert dense.shape == (2, 16, 4, 4)
    for y in range(4):
        for x in range(4):  # patches are numbered row by row
            np.testing.assert_allclose(dense[:, :, y, x], wanted[:, 4 * y + x], atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cls_token_on_the_same_way_is_the_plain_towers_output(kind):
    with torch.no_grad():
        tokens = lazyclip.encode_tokens(base(kind), pixels())
        ours = lazyclip.project(base(kind), tokens.prefix[:, 0])
        assert torch.equal(tokens.pooled, tokens.prefix[:, 0])
        torch.testing.assert_close(ours, base(kind).encode_image(pixels()))


@pytest.mark.parametrize("kind", KINDS)
def test_with_k_equal_to_n_the_mean_of_the_dense_map_is_the_image_feature(kind):
    model = toy_models.last(base(kind), k=1.0)
    with torch.no_grad():
        dense = lazyclip.encode_dense(model, pixels())
        torch.testing.assert_close(dense.mean(dim=(2, 3)), model.encode_image(pixels()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_pooling_does_not_change_the_dense_map(kind):
    with torch.no_grad():
        plain = lazyclip.encode_dense(base(kind), pixels())
        assert torch.equal(lazyclip.encode_dense(toy_models.last(base(kind), k=1), pixels()), plain)


INTERPOLATION = {
    "antialias": reference.resize_positions,
    "offset": reference_dense.offset_positions,
}


def created_at(kind: str, size: tuple[int, int], positions: str = "antialias") -> nn.Module:
    """The base model's weights in a model that was created at another size, positions resized."""
    model = make(kind, force_image_size=size)
    grid = (size[0] // PATCH, size[1] // PATCH)
    state = dict(base(kind).state_dict())
    key = "visual.positional_embedding" if kind == NATIVE else "visual.trunk.pos_embed"
    rows = state[key].reshape(-1, state[key].shape[-1]).double().numpy()
    resized = rows  # on the own grid neither changes them
    if grid != (SIZE // PATCH, SIZE // PATCH):
        resized = INTERPOLATION[positions](rows, (SIZE // PATCH, SIZE // PATCH), grid)
    state[key] = torch.from_numpy(resized).float().reshape(model.state_dict()[key].shape)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("positions", INTERPOLATION)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes_equal_a_tower_created_at_that_size(kind, size, positions):
    images = pixels(size=size)
    other = created_at(kind, size, positions)
    with torch.no_grad():
        dense = lazyclip.encode_dense(base(kind), images, positions=positions)
        with caught_patches(other) as found:
            pooled = other.encode_image(images)
        h, w = size[0] // PATCH, size[1] // PATCH
        assert dense.shape == (2, 16, h, w)
        flat = dense.flatten(2).transpose(1, 2)
        np.testing.assert_allclose(flat, projected(other, found[0]), atol=2e-4)
        if positions != "antialias":
            return
        tokens = lazyclip.encode_tokens(base(kind), images)
        assert tokens.grid == (h, w)
        torch.testing.assert_close(
            lazyclip.project(base(kind), tokens.pooled), pooled, atol=2e-4, rtol=1e-3
        )


@pytest.mark.parametrize("positions", INTERPOLATION)
@pytest.mark.parametrize("kind", KINDS)
def test_a_grid_of_equal_count_and_other_shape_gets_other_positions(kind, positions):
    # 2 x 8 and 4 x 4 patches are both 16: by count alone the positions would be taken unchanged.
    wide = pixels(size=(16, 64))
    with torch.no_grad():
        right = lazyclip.encode_dense(base(kind), wide, positions=positions)
        trap = copy.deepcopy(created_at(kind, (16, 64)))
        key = "visual.positional_embedding" if kind == NATIVE else "visual.trunk.pos_embed"
        trap.load_state_dict({**trap.state_dict(), key: base(kind).state_dict()[key]})
        wrong = lazyclip.encode_dense(trap, wide)
    assert float((right - wrong).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_at_another_size_leaves_the_tower_as_it_was(kind):
    model = copy.deepcopy(base(kind))
    before, fields = model.encode_image(pixels()), copy.copy(vars(trunk_of(model)))
    embed = vars(trunk_of(model).patch_embed).copy() if kind != NATIVE else {}
    lazyclip.encode_dense(model, pixels(size=(16, 64)))
    if kind != NATIVE:
        assert vars(trunk_of(model)) == fields
        assert vars(trunk_of(model).patch_embed) == embed
        with pytest.raises(AssertionError):  # timm's own check is on again
            model.encode_image(pixels(size=(16, 64)))
    assert torch.equal(model.encode_image(pixels()), before)


@pytest.mark.parametrize("kind", [EVA, TIMM])
def test_a_tower_is_restored_after_an_error_inside_the_call(kind):
    model = copy.deepcopy(base(kind))
    embed = vars(trunk_of(model).patch_embed).copy()
    with pytest.raises(RuntimeError):
        lazyclip.encode_dense(model, torch.zeros(1, 5, 64, 64))  # five colours
    assert vars(trunk_of(model).patch_embed) == embed
    assert not getattr(trunk_of(model), "dynamic_img_size", False)


@pytest.mark.parametrize("size", [(33, 32), (32, 33), (4, 4), (32, 7), (0, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_sides_that_the_patch_does_not_divide_are_refused_by_name(kind, size):
    with pytest.raises(
        UserError, match=f"{size[0]} x {size[1]} pixels.*patches of 8 x 8"
    ) as caught:
        lazyclip.encode_dense(base(kind), torch.zeros(1, 3, *size))
    assert "multiples of the patch" in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 32, 32), (32, 32), (1, 1, 3, 32, 32)])
def test_images_without_a_batch_are_refused_with_their_shape(shape):
    with pytest.raises(ValueError, match="B x 3 x H x W"):
        lazyclip.encode_dense(base(NATIVE), torch.zeros(shape))


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown dense method 'vanila'; known: vanilla"):
        lazyclip.encode_dense(base(NATIVE), pixels(), method="vanila")


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_gives_a_finite_map_of_the_grid(kind, method):
    with torch.no_grad():
        dense = lazyclip.encode_dense(base(kind), pixels(size=(24, 56)), method)
    assert dense.shape == (2, 16, 3, 7)
    assert bool(dense.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_dense_features_carry_a_gradient(kind):
    images = pixels().requires_grad_()
    lazyclip.encode_dense(base(kind), images)[:, :, 1, 2].sum().backward()
    assert float(images.grad.abs().sum()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_dense_features_work_in_bf16_and_under_autocast(kind):
    with torch.no_grad():
        exact = lazyclip.encode_dense(base(kind), pixels(size=(16, 64)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = lazyclip.encode_dense(base(kind), pixels(size=(16, 64)))
        whole = lazyclip.encode_dense(
            copy.deepcopy(base(kind)).bfloat16(), pixels(size=(16, 64)).bfloat16()
        )
    scale = float(exact.abs().max())
    for other in (mixed, whole):
        assert other.shape == exact.shape
        assert float((other.float() - exact).abs().max()) < 0.1 * scale


# --- resizing positions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [((14, 14), (7, 28)), ((7, 7), (10, 10)), ((14, 14), (9, 15)), ((2, 8), (4, 4)),
     ((4, 4), (1, 1)), ((3, 5), (5, 3)), ((4, 4), (6, 6))],
)  # fmt: skip
def test_resized_positions_equal_the_reference(old, new):
    rows = np.random.default_rng(0).standard_normal((2 + old[0] * old[1], 3))
    ours = bridge.resize_positions(torch.from_numpy(rows), old, new, prefix=2)
    wanted = reference.resize_positions(rows, old, new, prefix=2)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours, wanted, atol=1e-5)
    np.testing.assert_array_equal(ours[:2], rows[:2])


def test_an_own_grid_is_returned_unchanged():
    rows = torch.randn(17, 8)
    for how in bridge.POSITIONS:
        assert bridge.resize_positions(rows, (4, 4), (4, 4), how=how) is rows


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize(
    ("old", "new"),
    [((14, 14), (7, 28)), ((14, 14), (28, 28)), ((14, 14), (10, 10)), ((24, 24), (16, 16)),
     ((14, 14), (14, 9)), ((2, 8), (4, 4)), ((4, 4), (1, 1)), ((3, 5), (5, 3)), ((1, 1), (2, 3))],
)  # fmt: skip
def test_the_published_interpolation_equals_the_reference(old, new, prefix):
    rows = np.random.default_rng(0).standard_normal((prefix + old[0] * old[1], 3))
    ours = bridge.resize_positions(torch.from_numpy(rows), old, new, prefix, "offset")
    wanted = reference_dense.offset_positions(rows, old, new, prefix)
    assert ours.shape == (prefix + new[0] * new[1], 3)
    np.testing.assert_allclose(ours, wanted, atol=2e-5)
    np.testing.assert_array_equal(ours[:prefix], rows[:prefix])


def test_the_published_interpolation_has_the_wanted_count_on_any_grid():
    for old in range(1, 38):
        for new in range(1, 66):
            rows = bridge.resize_positions(torch.zeros(old, 1), (1, old), (2, new), 0, "offset")
            assert rows.shape == (2 * new, 1)


def test_an_unknown_interpolation_is_refused_even_on_the_own_grid():
    for size in (SIZE, 64):
        with pytest.raises(UserError, match="interpolation of positions 'ofset'; known: offset"):
            lazyclip.encode_dense(base(NATIVE), pixels(size=size), positions="ofset")


@pytest.mark.parametrize("kind", KINDS)
def test_a_resized_embedding_passes_its_gradient_on(kind):
    model = copy.deepcopy(base(kind))
    name = "positional_embedding" if kind == NATIVE else "pos_embed"
    for positions in bridge.POSITIONS:
        model.zero_grad()
        lazyclip.encode_dense(model, pixels(size=(16, 64)), positions=positions).sum().backward()
        assert float(getattr(trunk_of(model), name).grad.abs().sum()) > 0


@pytest.mark.parametrize("size", [48, 24, (24, 40)])
def test_positions_of_a_file_are_resized_as_open_clip_does(size, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(base(NATIVE).state_dict(), path)
    theirs = open_clip.create_model(NATIVE, pretrained=str(path), force_image_size=size)
    ours = open_clip.create_model(f"LaSt-{NATIVE}", pretrained=str(path), force_image_size=size)
    torch.testing.assert_close(ours.visual.positional_embedding, theirs.visual.positional_embedding)


def test_dense_features_do_not_pool_so_a_count_may_exceed_a_small_window() -> None:
    model = lazyclip.attach(lazyclip.load("LaSt-ViT-nano")[0], k=60)
    dense = lazyclip.encode_dense(model, torch.randn(1, 3, 64, 48))
    assert dense.shape[-2:] == (8, 6)
    assert bool(dense.isfinite().all())
