"""Score, choice, pooled vector, votes and gradient against `tests.reference`, and their laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import lazyclip
from lazyclip.lowpass import KERNELS
from lazyclip.pooling import (
    POOLINGS,
    SCORES,
    PoolSpec,
    last_pool,
    pool,
    pool_tokens,
    resolve_k,
    stability_score,
    vote_count,
)
from tests import reference
from tests.test_lowpass import X4, X5

X4_SCORE = np.array(
    [
        [8.78716927, 4.98719052, -1.75162154, 2.1687345],
        [6.67348309, -3.10845746, 21.69402694, 11.91228229],
        [-4.37917391, 2.54018743, 8.19454661, -2.84375192],
    ]
)
# tokens, kernel, scores, K, pooled, votes
GOLDEN = [
    (X4, "centred", ("paper", "repo", "value"), 1, [1, 2, 1.2, 2.2], [2, 2, 0]),
    (X4, "centred", ("paper", "repo", "value"), 2, [0.65, 1.4, 0.8, 1.35], [3, 3, 2]),
    (X4, "centred", ("abs",), 2, [0.65, 0.65, 0.8, 1.0], [2, 4, 2]),
    (X4, "centred", ("negdist",), 2, [0.65, 0.05, 0.8, 0.15], [2, 3, 3]),
    (X4, "repo", ("paper", "repo"), 1, [0.3, 2, 1.2, 0.5], [2, 2, 0]),
    (X4, "repo", ("abs",), 2, [-0.6, 1.4, 0.1, 1.35], [3, 3, 2]),
    *((X5, kernel, ("paper",), 1, [1, 2, 0.4, 2.2, 0.25], [3, 1, 1]) for kernel in KERNELS),
    *((X5, kernel, ("repo",), 1, [1, 2, 0.4, 2.2, 1.1], [2, 1, 2]) for kernel in KERNELS),
    *((X5, kernel, ("abs",), 2, [-0.25, 1.4, 0.8, 1.35, 0.675], [4, 2, 4]) for kernel in KERNELS),
    *((X4, kernel, SCORES, 3, X4.mean(axis=0), [4, 4, 4]) for kernel in KERNELS),
    *((X5, kernel, SCORES, 3, X5.mean(axis=0), [5, 5, 5]) for kernel in KERNELS),
]
ROWS = [(x, kern, score, *rest) for x, kern, scores, *rest in GOLDEN for score in scores]
options = st.fixed_dictionaries(
    {
        "score": st.sampled_from(SCORES),
        "kernel": st.sampled_from(KERNELS),
        "sigma": st.one_of(st.none(), st.floats(0.2, 30), st.just(math.inf)),
    }
)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))


@pytest.fixture
def compiled_pool():
    torch._dynamo.reset()  # graphs of earlier tests would count towards the recompile limit
    return torch.compile(last_pool, fullgraph=True, backend="aot_eager")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def tensor(array: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def choice_by_gradient(x: torch.Tensor, k: int | float, **how) -> torch.Tensor:
    """B x N x D bool: the chosen entries, read off the gradient of the pooled sum."""
    leaf = x.detach().clone().requires_grad_()
    last_pool(leaf, k, **how).sum().backward()
    return leaf.grad != 0


# --- printed values ------------------------------------------------------------------------------


def test_scores_of_the_known_tokens_equal_the_known_values():
    ours = stability_score(tensor(X4[None]))[0].numpy()
    np.testing.assert_allclose(ours, X4_SCORE, atol=1e-8)
    np.testing.assert_allclose(reference.stability(X4), X4_SCORE, atol=1e-8)


@pytest.mark.parametrize(("x", "kernel", "score", "k", "pooled", "votes"), ROWS)
def test_known_tokens_pool_to_the_known_values(x, kernel, score, k, pooled, votes):
    how = {"score": score, "kernel": kernel}
    np.testing.assert_allclose(last_pool(tensor(x[None]), k, **how)[0], pooled, atol=1e-12)
    assert vote_count(tensor(x[None]), k, **how)[0].tolist() == votes
    marked = reference.choose(reference.stability(x, **how), k)
    np.testing.assert_allclose(reference.pooled(x, marked), pooled, atol=1e-12)
    assert reference.votes(marked).tolist() == votes


# --- the independent reference -------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sigma", [None, 0.7, math.inf])
def test_scores_equal_the_reference_in_float64(score, kernel, sigma):
    for width in (7, 8):
        x = noise(2, 9, width)
        ours = stability_score(tensor(x), score=score, kernel=kernel, sigma=sigma).numpy()
        for image, found in zip(x, ours, strict=True):
            wanted = reference.stability(image, score, sigma, kernel)
            np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("n", "width"), [(1, 8), (2, 5), (9, 6), (49, 16), (64, 33), (196, 12)])
def test_pool_votes_and_gradient_equal_the_reference_in_float64(score, n, width):
    x = noise(2, n, width, seed=n)
    upstream = noise(2, width, seed=1)
    for k in sorted({1, max(1, n // 2), n}):
        for kernel in KERNELS:
            leaf = tensor(x).requires_grad_()
            Q = last_pool(leaf, k, score=score, kernel=kernel)
            Q.backward(tensor(upstream))
            counted = vote_count(tensor(x), k, score=score, kernel=kernel)
            for b in range(2):
                marked = reference.choose(reference.stability(x[b], score, kernel=kernel), k)
                pooled = reference.pooled(x[b], marked)
                np.testing.assert_allclose(Q[b].detach(), pooled, atol=1e-10)
                assert counted[b].tolist() == reference.votes(marked).tolist()
                wanted = reference.gradient(marked, upstream[b])
                np.testing.assert_allclose(leaf.grad[b], wanted, atol=1e-10)


@pytest.mark.parametrize(("n", "k"), [(576, 288), (577, 1), (577, 0.5)])
def test_large_grids_equal_the_reference(n, k):
    x = noise(1, n, 10, seed=n)
    wanted = reference.last_pool(x[0], k if isinstance(k, int) else reference.kept(k, n))
    np.testing.assert_allclose(last_pool(tensor(x), k)[0], wanted, atol=1e-10)


def check_against_reference(x: torch.Tensor, k: int, score: str, tolerance: float) -> None:
    """Compare a rounded dtype: the choice where score gaps exceed the tolerance, then the mean."""
    marked = choice_by_gradient(x, k, score=score)
    exact = x.double().numpy()
    assert torch.equal(marked.sum(dim=1), torch.full((len(x), x.shape[2]), k))
    pooled = last_pool(x, k, score=score)
    assert pooled.dtype == x.dtype
    for b in range(len(x)):
        scores = reference.stability(exact[b], score)
        # Relative to the residual, float32 is off by 1e-7 |x| / r; that is what a score may move.
        residual = np.abs(reference.low_pass(exact[b]) - exact[b]) + 1e-6
        slack = 1e-6 * np.abs(exact).max() / residual * (np.abs(scores) + 1)
        ours = marked[b].numpy()
        for j in range(x.shape[2]):
            lowest_in = (scores[ours[:, j], j] + slack[ours[:, j], j]).min()
            outside = ~ours[:, j]
            if outside.any():
                assert (scores[outside, j] - slack[outside, j]).max() <= lowest_in
        wanted = reference.pooled(exact[b], ours)
        scale = np.abs(exact[b]).max()
        np.testing.assert_allclose(pooled[b].double(), wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("k", [1, 24, 49])
def test_float32_stays_within_1e_5_of_the_reference(score, k):
    check_against_reference(tensor(noise(2, 49, 48), torch.float32), k, score, 1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("k", [1, 24, 49])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_2e_2_of_the_reference(score, k, dtype):
    # The input's own rounding is no error of the pooling: the reference gets the rounded tokens.
    check_against_reference(tensor(noise(2, 49, 48), dtype), k, score, 2e-2)


def test_float32_makes_the_same_choice_as_float64_on_white_features():
    x = tensor(noise(2, 196, 384), torch.float32)
    for k in (1, 98):
        same = choice_by_gradient(x, k) == choice_by_gradient(x.double(), k)
        assert float(same.double().mean()) > 0.99999


@given(sizes=sizes, how=options, seed=st.integers(0, 9999), fraction=st.floats(0.01, 1))
def test_any_tokens_pool_as_the_reference_says(sizes, how, seed, fraction):
    x = noise(*sizes, seed=seed)
    k = resolve_k(fraction, sizes[1])
    assert k == reference.kept(fraction, sizes[1])
    ours = last_pool(tensor(x), fraction, **how).numpy()
    for image, found in zip(x, ours, strict=True):
        scores = np.sort(reference.stability(image, **how), axis=0)[::-1]
        clear = np.ones(sizes[2], dtype=bool)
        if k < sizes[1]:  # rounding may decide where two scores nearly tie
            clear = scores[k - 1] - scores[k] > 1e-9 * (1 + np.abs(scores[k]))
        wanted = reference.last_pool(image, k, **how)
        np.testing.assert_allclose(found[clear], wanted[clear], atol=1e-10)


@pytest.mark.parametrize("k", [1, 0.5])
def test_a_batch_larger_than_the_cache_gives_what_its_images_give_alone(k):
    x = tensor(noise(24, 100, 128), torch.float32)  # worked on in several parts on the CPU
    alone = [last_pool(image[None], k) for image in x]
    torch.testing.assert_close(last_pool(x, k), torch.cat(alone), atol=1e-6, rtol=0)
    counted = vote_count(x, k)
    for b in (0, 23):  # of the first part and of the last
        assert torch.equal(counted[b], vote_count(x[b : b + 1], k)[0])
        exact = x[b].double().numpy()
        scores = reference.stability(exact)
        marked = reference.choose(scores, resolve_k(k, 100))
        assert np.abs(counted[b].numpy() - reference.votes(marked)).sum() <= 4  # float32 near ties


def test_an_empty_batch_gives_an_empty_result():
    assert last_pool(torch.zeros(0, 4, 8), 0.5).shape == (0, 8)
    assert vote_count(torch.zeros(0, 4, 8), 1).shape == (0, 4)


# --- ties ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["value", "negdist", "paper", "abs", "repo"])
def test_exactly_tied_scores_go_to_the_lowest_patch_index(score):
    # Small whole numbers tie often; an infinite sigma keeps the scores free of rounding.
    x = np.random.default_rng(3).integers(-2, 3, (2, 30, 12)).astype(np.float64)
    for k in (1, 7, 15, 29):
        marked = choice_by_gradient(tensor(x), k, score=score, sigma=math.inf).numpy()
        for b in range(2):
            wanted = reference.choose(reference.stability(x[b], score, math.inf), k)
            assert (marked[b] == wanted).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_equal_tokens_choose_the_first_k_patches(dtype):
    row = tensor(noise(1, 1, 24), dtype)
    x = row.expand(2, 50, 24).contiguous()
    counted = vote_count(x, 10)
    assert counted.tolist() == [[24] * 10 + [0] * 40] * 2
    torch.testing.assert_close(last_pool(x, 10), row[:, 0].expand(2, -1))


def test_duplicated_tokens_tie_and_the_first_copy_wins():
    x = noise(1, 20, 16)
    twice = np.concatenate([x, x], axis=1)
    for k in (1, 5):
        first = vote_count(tensor(twice), 2 * k)[0]
        assert first[:20].tolist() == first[20:].tolist() == vote_count(tensor(x), k)[0].tolist()
        np.testing.assert_allclose(
            last_pool(tensor(twice), 2 * k), last_pool(tensor(x), k), atol=1e-12
        )
    assert int(vote_count(tensor(twice), 1)[0, 20:].sum()) == 0


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_zero_tokens_score_zero_and_stay_finite(score, eps):
    zeros = torch.zeros(1, 6, 8)
    scored = stability_score(zeros, score=score, eps=eps)
    assert torch.equal(scored, torch.zeros_like(scored))
    assert vote_count(zeros, 2, score=score, eps=eps).tolist() == [[8, 8, 0, 0, 0, 0]]
    assert torch.equal(last_pool(zeros, 2, score=score, eps=eps), torch.zeros(1, 8))


def test_one_zero_token_among_others_ranks_between_signs():
    x = noise(1, 9, 16)
    x[0, 4] = 0
    scores = stability_score(tensor(x))[0]
    assert torch.equal(scores[4], torch.zeros(16, dtype=torch.float64))
    np.testing.assert_allclose(last_pool(tensor(x), 4)[0], reference.last_pool(x[0], 4), atol=1e-12)


@pytest.mark.parametrize("score", ["value", "paper", "repo"])
def test_minus_zero_ties_with_zero(score):
    x = torch.zeros(1, 6, 2)
    x[0, 0], x[0, 3] = -0.0, -0.0
    counted = vote_count(x, 2, score=score, sigma=math.inf)
    assert counted.tolist() == [[2, 2, 0, 0, 0, 0]]
    x[0, 5] = 1.0
    assert vote_count(x, 2, score=score, sigma=math.inf).tolist() == [[2, 0, 0, 0, 0, 2]]


# --- K -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "kept"),
    [(0.5, 49, 25), (0.5, 1, 1), (0.5, 3, 2), (0.5, 5, 3), (0.001, 196, 1), (1.0, 7, 7),
     (0.5, 36, 18), (0.999, 4, 4), (1 / 7, 49, 7), (0.125, 64, 8), (7, 7, 7), (1, 196, 1)],
)  # fmt: skip
def test_k_is_a_count_or_a_fraction_rounded_half_up(k, n, kept):
    assert resolve_k(k, n) == kept
    if isinstance(k, float):
        assert reference.kept(k, n) == kept


@pytest.mark.parametrize("k", [0, -1, 197, 0.0, -0.5, 1.5, math.nan, math.inf, True, "half", None])
def test_a_k_outside_its_range_is_refused_with_k_and_n(k):
    with pytest.raises(ValueError, match="k ") as caught:
        last_pool(torch.zeros(1, 196, 4), k)
    assert str(k) in str(caught.value) or repr(k) in str(caught.value)
    if isinstance(k, int) and not isinstance(k, bool):
        assert "196" in str(caught.value)


def test_k_equal_to_one_and_one_point_zero_mean_different_things():
    x = tensor(noise(1, 9, 8))
    assert not torch.allclose(last_pool(x, 1), last_pool(x, 1.0))


# --- gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 8, 16])
def test_the_gradient_is_one_over_k_at_the_chosen_entries_only(dtype, k):
    x = tensor(noise(2, 16, 8), dtype).requires_grad_()
    last_pool(x, k).sum().backward()
    assert x.grad.dtype == dtype
    values = set(x.grad.flatten().tolist())
    assert values == ({1 / k, 0.0} if k < 16 else {1 / k})
    assert torch.equal((x.grad != 0).sum(dim=2), vote_count(x.detach(), k))


def test_no_gradient_flows_through_the_selection():
    # A perturbation too small to change the choice moves Q by exactly the chosen entries' mean.
    x = tensor(noise(1, 12, 8))
    step = 1e-6 * tensor(noise(1, 12, 8, seed=1))
    leaf = x.clone().requires_grad_()
    last_pool(leaf, 5).sum().backward()
    moved = last_pool(x + step, 5).sum() - last_pool(x, 5).sum()
    assert float(moved) == pytest.approx(float((leaf.grad * step).sum()), rel=1e-6)
    assert torch.autograd.gradcheck(lambda t: last_pool(t, 5), x.clone().requires_grad_())


def test_scores_and_votes_can_be_taken_of_tokens_with_a_gradient():
    x = tensor(noise(1, 6, 4)).requires_grad_()
    assert not vote_count(x, 2).requires_grad
    assert stability_score(x).requires_grad


def test_activation_checkpointing_gives_the_same_value_and_gradient():
    for reentrant in (False, True):
        x, y = (tensor(noise(2, 16, 8)).requires_grad_() for _ in range(2))
        direct = last_pool(x, 0.5)
        again = checkpoint(lambda t: last_pool(t, 0.5), y, use_reentrant=reentrant)
        direct.square().sum().backward()
        again.square().sum().backward()
        assert torch.equal(direct, again)
        assert torch.equal(x.grad, y.grad)


# --- modes of torch ------------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "k"), [("paper", 1), ("paper", 0.5), ("abs", 1.0), ("value", 3)])
def test_it_compiles_into_one_graph_with_the_same_result(compiled_pool, score, k):
    x = tensor(noise(2, 16, 8), torch.float32)
    x[0, 3] = x[0, 9]  # ties compile too
    a, b = (x.clone().requires_grad_() for _ in range(2))
    ours, wanted = compiled_pool(a, k, score=score), last_pool(b, k, score=score)
    torch.testing.assert_close(ours, wanted)
    ours.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_votes_compile_into_one_graph():
    compiled = torch.compile(vote_count, fullgraph=True, backend="aot_eager")
    x = tensor(noise(2, 16, 8), torch.float32)
    assert torch.equal(compiled(x, 4), vote_count(x, 4))


def test_autocast_in_bf16_leaves_choice_and_sums_alone():
    x = tensor(noise(2, 49, 64), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, counted = last_pool(x, 0.5), vote_count(x, 0.5)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, last_pool(x, 0.5))
    assert torch.equal(counted, vote_count(x, 0.5))


def test_bf16_tokens_are_summed_in_float32():
    x = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    x[:, ::2] = 1.0078125
    assert last_pool(x, 1.0).dtype == torch.bfloat16
    torch.testing.assert_close(
        last_pool(x, 1.0).float(), torch.full((1, 2), 1.0039), atol=5e-3, rtol=0
    )


def test_meta_tensors_give_shapes():
    x = torch.empty(2, 16, 8, device="meta")
    assert last_pool(x, 0.5).shape == (2, 8)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 9, 1.0])
def test_nan_tokens_are_refused_on_the_cpu_without_gradient(k):
    x = tensor(noise(2, 9, 4))
    x[0, 3, 1] = math.nan
    x[1, 3, 1] = math.nan
    for call in (last_pool, vote_count, pool_last):
        with pytest.raises(ValueError, match="2 of 18 patch tokens hold NaN"):
            call(x, k)


def pool_last(x: torch.Tensor, k: int | float) -> torch.Tensor:
    return pool(x, "last", k)


@pytest.mark.parametrize("k", [1, 4, 1.0])
@pytest.mark.parametrize("score", SCORES)
def test_nan_flows_into_the_pool_where_a_gradient_is_asked_for(k, score):
    x = tensor(noise(2, 9, 4))
    x[0, 3, 1] = math.nan
    leaf = x.requires_grad_()
    Q = last_pool(leaf, k, score=score)
    assert bool(Q[0, 1].isnan())
    assert bool(Q[1].isfinite().all())


def test_nan_flows_when_compiled(compiled_pool):
    x = tensor(noise(1, 9, 4), torch.float32)
    x[0, 8, 2] = math.nan
    assert bool(compiled_pool(x, 2)[0, 2].isnan())


def test_an_infinite_token_shows_in_the_result():
    x = tensor(noise(1, 9, 4)).requires_grad_()
    with torch.no_grad():
        x[0, 5, 1] = math.inf
    assert not bool(last_pool(x, 3).isfinite().all())


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(4, 8), torch.zeros(1, 2, 4, 8), torch.zeros(1, 0, 8), torch.zeros(1, 4, 0),
     torch.zeros(1, 4, 8, dtype=torch.int64), torch.zeros(1, 4, 8, dtype=torch.complex64)],
    ids=lambda t: f"{tuple(t.shape)}-{t.dtype}",
)  # fmt: skip
def test_tokens_of_another_form_are_refused_with_their_shape(bad):
    for call in (stability_score, lambda x: last_pool(x, 1), lambda x: vote_count(x, 1)):
        with pytest.raises(ValueError, match="B x N x D") as caught:
            call(bad)
        assert str(tuple(bad.shape)) in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("score", "papr"), ("kernel", "gauss"), ("sigma", -1.0), ("eps", -1e-9), ("eps", math.nan),
     ("eps", math.inf), ("eps", "small"), ("sigma", math.nan)],
)  # fmt: skip
def test_unknown_options_are_refused_with_their_value(option, value):
    x = torch.ones(1, 4, 8)
    for call in (last_pool, vote_count):
        with pytest.raises(ValueError, match=option) as caught:
            call(x, 1, **{option: value})
        assert repr(value) in str(caught.value)


def test_an_unknown_option_is_refused_for_k_equal_to_n_too():
    with pytest.raises(ValueError, match="score"):
        last_pool(torch.ones(1, 4, 8), 1.0, score="papr")
    with pytest.raises(ValueError, match="kernel"):
        last_pool(torch.ones(1, 4, 8), 4, kernel="gauss")


# --- the post-hoc door ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_pool_takes_numpy_and_gives_numpy_back(dtype):
    x = noise(2, 9, 8).astype(dtype)
    before = x.copy()
    ours = lazyclip.pool(x, k=4)
    assert isinstance(ours, np.ndarray)
    assert ours.dtype == dtype
    for image, found in zip(x, ours, strict=True):
        np.testing.assert_allclose(found, reference.last_pool(image, 4), rtol=1e-5, atol=1e-6)
    assert (x == before).all()


def test_pool_takes_numpy_views_read_only_and_reversed():
    x = noise(2, 9, 8)
    frozen = x.copy()
    frozen.flags.writeable = False
    np.testing.assert_allclose(lazyclip.pool(frozen, k=4), lazyclip.pool(x, k=4))
    backwards = x[:, ::-1]
    np.testing.assert_allclose(lazyclip.pool(backwards, k=4), lazyclip.pool(x, k=4), atol=1e-12)


def test_mean_max_and_token_poolings_are_what_their_names_say():
    x = tensor(noise(2, 9, 8))
    assert torch.equal(pool(x, "mean"), x.mean(dim=1))
    assert torch.equal(pool(x, "max"), x.amax(dim=1))
    prefix = tensor(noise(2, 3, 8, seed=1))
    assert torch.equal(pool_tokens(x, prefix, PoolSpec("token")), prefix[:, 0])
    for missing in (None, prefix[:, :0]):
        with pytest.raises(ValueError, match="CLS token"):
            pool_tokens(x, missing, PoolSpec("token"))


def test_value_with_one_patch_is_max_pooling():
    x = tensor(noise(2, 9, 8))
    assert torch.equal(last_pool(x, 1, score="value"), pool(x, "max"))


def test_an_unknown_pooling_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown pooling 'lastt'; known: last"):
        pool(torch.ones(1, 2, 2), "lastt")
    assert tuple(POOLINGS) == ("token", "mean", "max", "last")
