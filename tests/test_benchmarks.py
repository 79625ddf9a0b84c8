"""The benchmark's rendition of the released procedure, and the timing by alternating rounds."""

import pytest
import torch

from lazyclip.pooling import last_pool


@pytest.mark.parametrize("k", [1, 8, 25, 49])
@pytest.mark.parametrize("width", [48, 768])
def test_the_released_procedure_step_by_step_pools_as_the_released_options(load, k, width):
    load("timing")
    bench = load("bench_pooling")
    x = torch.randn(3, 49, width, generator=torch.Generator().manual_seed(k)).double()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = last_pool(b, k, score="repo", kernel="repo", eps=0.0)
    theirs = bench.released(a, k)
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-12)
    theirs.sum().backward()
    ours.sum().backward()
    assert torch.allclose(a.grad, b.grad, rtol=0, atol=1e-12)


def test_other_options_do_not_pass_the_comparison(load, monkeypatch):
    load("timing")
    bench = load("bench_pooling")
    case = bench.Case("small", 2, 49, 64, 8)
    assert bench.compare(case)["changed"] == 0
    monkeypatch.setattr(bench, "released_options", lambda x, k: last_pool(x, k, sigma=2.0))
    assert bench.compare(case)["changed"] > bench.MAX_CHANGED


def test_rounds_alternate_and_the_warm_up_is_dropped(load):
    timing = load("timing")
    calls: list[str] = []
    variants = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timings = timing.interleave(variants, "a", repeats=7, warmup=2)
    assert calls == ["a", "b", "b", "a"] * 4 + ["a", "b"]
    assert timings["a"].ratio == timings["a"].ratio_lower == timings["a"].ratio_upper == 1


def test_a_ratio_is_taken_round_by_round(load):
    timing = load("timing")
    slow, fast = [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0], [1.0, 1.0, 2.0, 2.0, 5.0, 3.0, 7.0]
    found = timing._timing(fast, slow)
    assert (found.median, found.fastest) == (2.0, 1.0)
    assert found.ratio == 3.0  # of 2, 4, 3, 4, 2, 4, 2
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_too_few_rounds_and_an_unknown_baseline_are_refused(load):
    timing = load("timing")
    for arguments in ({"repeats": 6}, {"baseline": "c"}):
        with pytest.raises(ValueError, match="repeats"):
            timing.interleave({"a": list, "b": list}, **{"baseline": "a", **arguments})
