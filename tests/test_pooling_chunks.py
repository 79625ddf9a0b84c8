"""The choice made a few images at a time, as the CPU does, is the choice of the whole batch."""

import pytest
import torch

from lazyclip import pooling
from lazyclip.pooling import last_pool, vote_count

SIZES = [(7, 12, 10), (5, 49, 16), (1, 9, 8), (0, 9, 8)]


def some_tokens(sizes, how: str) -> torch.Tensor:
    B, N, D = sizes
    x = torch.randn(B, N, D, generator=torch.Generator().manual_seed(sum(sizes)))
    if how == "tied":  # each token three times
        return x[:, torch.arange(N) // 3]
    if how == "one image tied":  # a chunk with ties between chunks without
        x[B // 2 : B // 2 + 1] = 1.0
    return x


def both(x: torch.Tensor, k: int, monkeypatch, **options) -> list[tuple]:
    """Pool whole, then one image at a time."""
    results = []
    for values in (1 << 40, 1):
        monkeypatch.setattr(pooling, "_CACHE_VALUES", values)
        tokens = x.clone().requires_grad_()
        pooled = last_pool(tokens, k, **options)
        (gradient,) = torch.autograd.grad(pooled.square().sum(), tokens)
        results.append((pooled.detach(), gradient, vote_count(x, k, **options)))
    return results


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("how", ["free", "tied", "one image tied"])
@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_chunks_change_neither_pool_nor_gradient_nor_votes(sizes, how, k, monkeypatch):
    whole, chunked = both(some_tokens(sizes, how), k, monkeypatch)
    for one, other in zip(whole, chunked, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("score", "eps"), [("repo", 0.0), ("abs", 1e-6), ("value", 1e-6)])
def test_chunks_pass_the_options_on(score, eps, monkeypatch):
    options = {"score": score, "eps": eps, "sigma": 1.5, "kernel": "repo"}
    whole, chunked = both(some_tokens((4, 25, 12), "free"), 5, monkeypatch, **options)
    other = last_pool(some_tokens((4, 25, 12), "free"), 5)
    assert torch.equal(whole[0], chunked[0])
    assert not torch.equal(whole[0], other)


def test_each_chunk_holds_as_many_images_as_fit(monkeypatch):
    seen = []
    plain = pooling._chosen

    def watched(score, k):
        seen.append(len(score))
        return plain(score, k)

    monkeypatch.setattr(pooling, "_chosen", watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(pooling, "_CACHE_VALUES", 2 * 12 * 10 + 1)
    last_pool(some_tokens((7, 12, 10), "free"), 3)
    assert seen == [2, 2, 2, 1]


@pytest.mark.parametrize("k", [1, 2])
def test_the_first_of_equal_scores_wins_for_one_patch_as_for_several(k):
    x = torch.zeros(1, 6, 4)
    x[0, 2:4] = 1.0
    votes = vote_count(x, k, score="value")[0].tolist()
    assert votes == ([0, 0, 4, 0, 0, 0] if k == 1 else [0, 0, 4, 4, 0, 0])


def test_infinities_that_cancel_are_no_nan():
    x = torch.zeros(1, 4, 3)
    x[0, 0], x[0, 1] = torch.inf, -torch.inf
    assert vote_count(x, 1, score="value")[0].tolist() == [3, 0, 0, 0]


def test_nan_beside_infinities_is_refused_and_counted():
    x = torch.zeros(2, 4, 3)
    x[0, 0], x[0, 1], x[1, 2, 1] = torch.inf, -torch.inf, torch.nan
    with pytest.raises(ValueError, match="1 of 8 patch tokens hold NaN"):
        vote_count(x, 1)
