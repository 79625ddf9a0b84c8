"""The algebra of the pooling as properties, and what a spec of it may say."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import lazyclip
from lazyclip.base.errors import UserError
from lazyclip.lowpass import KERNELS
from lazyclip.pooling import (
    PoolSpec,
    last_pool,
    resolve_k,
    stability_score,
    vote_count,
)
from tests.test_pooling import choice_by_gradient, noise, options, sizes, tensor

# --- laws ----------------------------------------------------------------------------------------


@given(sizes=sizes, how=options, seed=st.integers(0, 9999))
def test_k_equal_to_n_is_the_mean_bit_for_bit(sizes, how, seed):
    x = tensor(noise(*sizes, seed=seed))
    for k in (sizes[1], 1.0):
        assert torch.equal(last_pool(x, k, **how), x.mean(dim=1))
        assert torch.equal(
            last_pool(x.bfloat16(), k, **how), x.bfloat16().float().mean(1).bfloat16()
        )


@given(sizes=sizes, how=options, seed=st.integers(0, 9999), fraction=st.floats(0.01, 1))
def test_votes_sum_to_k_times_channels_and_stay_within_them(sizes, how, seed, fraction):
    _, N, D = sizes
    counted = vote_count(tensor(noise(*sizes, seed=seed)), fraction, **how)
    assert counted.dtype == torch.int64
    assert counted.sum(dim=1).tolist() == [resolve_k(fraction, N) * D] * sizes[0]
    assert int(counted.min()) >= 0
    assert int(counted.max()) <= D


@given(sizes=sizes, how=options, seed=st.integers(0, 9999), fraction=st.floats(0.01, 1))
def test_permuting_the_patches_permutes_the_votes_and_leaves_the_pool(sizes, how, seed, fraction):
    x = tensor(noise(*sizes, seed=seed))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(sizes[1]))
    # The order decides among equal scores; white features have none unless rounding is the score.
    scores = stability_score(x, **how).sort(dim=1).values
    gap = (scores[:, 1:] - scores[:, :-1]).amin() if sizes[1] > 1 else torch.tensor(1.0)
    assume(float(gap) > 1e-9)
    assert torch.equal(
        vote_count(x, fraction, **how)[:, order], vote_count(x[:, order], fraction, **how)
    )
    torch.testing.assert_close(
        last_pool(x[:, order], fraction, **how), last_pool(x, fraction, **how), atol=1e-12, rtol=0
    )


@given(sizes=sizes, how=options, seed=st.integers(0, 9999), fraction=st.floats(0.01, 1))
def test_images_of_a_batch_do_not_see_each_other(sizes, how, seed, fraction):
    x = tensor(noise(*sizes, seed=seed))
    alone = torch.cat([last_pool(image[None], fraction, **how) for image in x])
    torch.testing.assert_close(last_pool(x, fraction, **how), alone, atol=1e-12, rtol=0)


@given(
    sizes=sizes,
    score=st.sampled_from(["paper", "repo", "abs"]),
    kernel=st.sampled_from(KERNELS),
    seed=st.integers(0, 9999),
)
def test_without_eps_the_score_forgets_each_patchs_norm(sizes, score, kernel, seed):
    x = tensor(noise(*sizes, seed=seed))
    # Powers of two scale without rounding, so the scores are equal bit for bit.
    powers = np.random.default_rng(seed).integers(-6, 7, (sizes[0], sizes[1], 1))
    how = {"score": score, "kernel": kernel, "eps": 0.0}
    plain = stability_score(x, **how)
    assert torch.equal(stability_score(x * tensor(2.0**powers), **how), plain)


@given(sizes=sizes, score=st.sampled_from(["paper", "repo"]), seed=st.integers(0, 9999))
def test_paper_and_repo_scores_are_odd_under_sign(sizes, score, seed):
    x = tensor(noise(*sizes, seed=seed))
    for eps in (0.0, 1e-6):
        flipped = stability_score(-x, score=score, eps=eps)
        torch.testing.assert_close(flipped, -stability_score(x, score=score, eps=eps))


def test_abs_and_negdist_are_even_and_negdist_prefers_small_tokens():
    x = tensor(noise(2, 9, 16))
    for score in ("abs", "negdist"):
        torch.testing.assert_close(
            stability_score(-x, score=score), stability_score(x, score=score)
        )
    x[:, 3] *= 1e-3
    assert vote_count(x, 1, score="negdist")[:, 3].tolist() == [16, 16]


def test_a_large_eps_breaks_scale_invariance():
    x = tensor(noise(2, 64, 128))
    scaled = x * tensor(2.0 ** np.arange(-3, 5)).repeat(8)[None, :, None]
    exact = [choice_by_gradient(y, 1, eps=0.0) for y in (x, scaled)]
    assert torch.equal(*exact)
    broken = [choice_by_gradient(y, 1, eps=0.1) for y in (x, scaled)]
    assert not torch.equal(*broken)


@pytest.mark.parametrize(("eps", "share"), [(1e-3, 0.03), (1e-2, 0.18), (1e-1, 0.55)])
def test_eps_changes_the_known_share_of_single_choices(eps, share):
    x = tensor(noise(8, 196, 768, seed=5))
    small = choice_by_gradient(x, 1, eps=1e-12)
    changed = 1 - float((small & choice_by_gradient(x, 1, eps=eps)).sum() / small.sum())
    assert changed == pytest.approx(share, rel=0.2)


@given(sizes=sizes, kernel=st.sampled_from(KERNELS), seed=st.integers(0, 9999))
def test_the_two_forms_differ_by_at_most_one(sizes, kernel, seed):
    x = tensor(noise(*sizes, seed=seed))
    r = lazyclip.low_pass(x, kernel=kernel) - x
    paper, repo = (stability_score(x, score=s, kernel=kernel) for s in ("paper", "repo"))
    torch.testing.assert_close(repo, paper - r / (r.abs() + 1e-6), rtol=1e-6, atol=1e-8)
    assert float((repo - paper).abs().max()) <= 1 + 1e-8 * float(paper.abs().max())


@given(sizes=sizes, kernel=st.sampled_from(KERNELS), seed=st.integers(0, 9999))
def test_a_score_is_positive_where_its_numerator_is(sizes, kernel, seed):
    x = tensor(noise(*sizes, seed=seed))
    smooth = lazyclip.low_pass(x, kernel=kernel)
    assert torch.equal(stability_score(x, kernel=kernel) > 0, smooth > 0)
    assert torch.equal(stability_score(x, score="repo", kernel=kernel) > 0, x > 0)


def test_a_smooth_positive_token_is_taken_first_and_a_smooth_negative_one_last():
    x = noise(1, 12, 32)
    x[0, 2], x[0, 7] = 0.5, -0.5
    for score in ("paper", "repo"):
        scores = stability_score(tensor(x), score=score)[0]
        assert (scores.argmax(dim=0) == 2).all()
        assert (scores.argmin(dim=0) == 7).all()
    # Only the forms without a sign rank smoothness alone.
    for score in ("abs", "negdist"):
        ranked = stability_score(tensor(x), score=score)[0]
        assert set(ranked.topk(2, dim=0).indices.flatten().tolist()) == {2, 7}


def test_a_token_constant_over_channels_scores_its_value_over_eps():
    x = torch.full((1, 1, 16), 0.75, dtype=torch.float64)
    x[0, 0, :] *= 2
    scores = stability_score(torch.cat([x, -x], dim=1))
    torch.testing.assert_close(scores[0, 0], torch.full((16,), 1.5e6).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(scores[0, 1], torch.full((16,), -1.5e6).double(), rtol=1e-6, atol=0)


def test_permuting_the_channels_keeps_only_three_per_cent_of_single_choices():
    x = tensor(noise(4, 196, 768, seed=2))
    order = torch.from_numpy(np.random.default_rng(0).permutation(768))
    plain = choice_by_gradient(x, 1)[..., order]
    same = float((plain & choice_by_gradient(x[..., order], 1)).sum() / plain.sum())
    assert same == pytest.approx(0.03, abs=0.012)


def relabelled(state: dict[str, torch.Tensor], order: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rename the residual channels of open_clip's ViT: channel i becomes old channel order[i]."""
    rows = ("conv1.weight", "ln_pre", "ln_post", "ln_1", "ln_2", "out_proj", "c_proj",
            "class_embedding")  # fmt: skip
    columns = ("positional_embedding", "in_proj_weight", "c_fc.weight")
    moved = {}
    for key, value in state.items():
        if any(part in key for part in columns):
            moved[key] = value[:, order].clone()
        elif any(part in key for part in rows):
            moved[key] = value[order].clone()
        else:
            moved[key] = value.clone()
    return moved


def train_losses(tower: nn.Module, order: torch.Tensor | None, steps: int) -> list[float]:
    """Train on fixed noise; `order` permutes the channels before the pooling and back after it."""
    draw = torch.Generator().manual_seed(7)
    images = torch.randn(6, 3, 16, 16, generator=draw, dtype=torch.float64)
    labels = torch.arange(6) % 3
    optimiser = torch.optim.AdamW(tower.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        patches = lazyclip.encode_tokens(tower, images).patches
        pooled = last_pool(patches if order is None else patches[..., order], 0.5)
        loss = nn.functional.cross_entropy(lazyclip.project(tower, pooled), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_a_fixed_channel_order_behind_the_tower_is_a_relabelling_of_its_initial_weights():
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    plain = VisionTransformer(16, 4, 24, 2, 2, 2.0, output_dim=3).double()
    order = torch.from_numpy(np.random.default_rng(1).permutation(24))
    permuted, renamed, untouched = (copy.deepcopy(plain) for _ in range(3))
    renamed.load_state_dict(relabelled(plain.state_dict(), order))
    with_order = train_losses(permuted, order, 15)
    np.testing.assert_allclose(train_losses(renamed, None, 15), with_order, atol=1e-12, rtol=0)
    # The order does matter to the network that is not renamed.
    assert np.abs(np.array(train_losses(untouched, None, 15)) - with_order).max() > 1e-6


def test_white_features_pool_to_the_known_means():
    x = tensor(noise(6, 196, 768, seed=9))
    known = {
        (1, "paper"): 0.31, (1, "repo"): 0.32, (1, "value"): 2.73,
        (49, "paper"): 0.34, (49, "repo"): 0.89, (49, "value"): 1.27,
        (98, "paper"): 0.28, (98, "repo"): 0.79, (98, "value"): 0.80, (98, "abs"): 0.0,
    }  # fmt: skip
    for (k, score), mean in known.items():
        assert float(last_pool(x, k, score=score).mean()) == pytest.approx(mean, abs=0.012)
    half = {score: choice_by_gradient(x, 98, score=score) for score in ("paper", "repo", "value")}
    overlap = {s: float((half[s] & half["value"]).sum() / half["value"].sum()) for s in half}
    assert overlap["repo"] == pytest.approx(0.98, abs=0.01)
    assert overlap["paper"] == pytest.approx(0.61, abs=0.01)


# --- the spec ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [PoolSpec(), PoolSpec("mean"), PoolSpec(k=7, score="repo", sigma=3.0, kernel="repo", eps=0.0),
     PoolSpec(sigma=math.inf), PoolSpec(sigma=0)],
    ids=str,
)  # fmt: skip
def test_a_spec_survives_its_own_json(spec):
    import json

    text = json.dumps(spec.to_dict(), allow_nan=False)
    assert PoolSpec.from_mapping(json.loads(text), "x.json") == spec


def test_the_word_sqrt_is_the_default_sigma():
    assert PoolSpec.from_mapping({"sigma": "sqrt"}, "x").sigma is None


@pytest.mark.parametrize(
    ("values", "said"),
    [({"kk": 1}, "unknown key 'kk'"), ({"score": "x"}, "paper"), ({"kernel": "x"}, "centred"),
     ({"pooling": "lst"}, "last"), ({"k": 0}, "k is 0"), ({"k": 1.5}, "1.5"),
     ({"k": "half"}, "half"), ({"sigma": -2}, "-2"), ({"sigma": "wide"}, "wide"),
     ({"eps": -1}, "-1"), ({"eps": math.inf}, "inf"), ({"eps": "tiny"}, "tiny")],
)  # fmt: skip
def test_a_wrong_spec_names_the_file_the_value_and_what_is_known(values, said):
    with pytest.raises(UserError, match=r"^model\.json: ") as caught:
        PoolSpec.from_mapping(values, "model.json")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
