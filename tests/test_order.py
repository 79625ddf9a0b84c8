"""The order of samples: each once in a pass, the same for every world, from any place on."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyclip.base.errors import UserError
from training.data.order import Order, check_lanes, fewer_lanes, lanes_for

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(lambda c: sum(c) > 0)


def make(counts, lanes, *, seed=0, window=3, factors=None) -> Order:
    factors = [1] * len(counts) if factors is None else factors
    return Order(np.array(counts), np.array(factors), seed=seed, lanes=lanes, window=window)


def one_pass(order: Order, epoch: int = 0) -> list:
    found = []
    for lane in range(order.lanes):
        n = order.length(lane)
        found += itertools.islice(order.stream(lane, epoch * n), n)
    return found


@given(COUNTS, st.integers(1, 12), st.integers(1, 5), st.integers(0, 3), st.integers(0, 2**40))
def test_each_sample_comes_once_in_a_pass(counts, lanes, window, epoch, seed):
    lanes = min(lanes, sum(counts))
    found = one_pass(make(counts, lanes, seed=seed, window=window), epoch)
    assert {slot.epoch for slot in found} == {epoch}
    expected = {(chunk, place) for chunk, n in enumerate(counts) for place in range(n)}
    assert len(found) == len(expected)
    assert {(slot.chunk, slot.place) for slot in found} == expected


@given(COUNTS, st.integers(1, 12))
def test_lanes_have_equal_lengths_give_or_take_one(counts, lanes):
    lanes = min(lanes, sum(counts))
    order = make(counts, lanes)
    lengths = [order.length(lane) for lane in range(lanes)]
    assert sum(lengths) == sum(counts)
    assert max(lengths) - min(lengths) <= 1


@given(COUNTS, st.integers(1, 6), st.integers(1, 4), st.integers(0, 200))
def test_a_restart_is_the_tail_of_the_uninterrupted_stream(counts, lanes, window, k):
    lanes = min(lanes, sum(counts))
    for lane in range(lanes):
        whole = itertools.islice(make(counts, lanes, window=window).stream(lane), k + 40)
        again = itertools.islice(make(counts, lanes, window=window).stream(lane, k), 40)
        assert list(again) == list(whole)[k:]


@given(COUNTS, st.lists(st.integers(1, 3), min_size=30, max_size=30), st.integers(1, 8))
def test_a_chunk_with_a_factor_comes_so_often_and_its_copies_are_told_apart(counts, factors, lanes):
    factors = factors[: len(counts)]
    total = int(np.dot(counts, factors))
    order = make(counts, min(lanes, total), factors=factors)
    found = one_pass(order)
    assert order.samples == len(found) == len(set(found)) == total
    times = Counter((slot.chunk, slot.place) for slot in found)
    assert all(times[chunk, 0] == factors[chunk] for chunk, n in enumerate(counts) if n)


@given(COUNTS, st.integers(1, 12), st.integers(0, 300), st.integers(1, 9))
def test_a_border_is_a_step_that_holds_slots_of_two_passes(counts, lanes, k, share):
    order = make(counts, min(lanes, sum(counts)))
    epochs = {
        slot.epoch
        for lane in range(order.lanes)
        for slot in itertools.islice(order.stream(lane, k), share)
    }
    assert order.at_border(k, share) == (len(epochs) > 1)


def global_batches(order: Order, batch: int, world: int, steps: int) -> list[list]:
    """Serve the steps as so many ranks would: rank r has the lanes l with l mod R = r."""
    share = batch // order.lanes
    ranks = [
        [order.stream(lane) for lane in range(rank, order.lanes, world)] for rank in range(world)
    ]
    found = []
    for _ in range(steps):
        parts = [[next(s) for s in streams for _ in range(share)] for streams in ranks]
        assert {len(part) for part in parts} == {batch // world}
        found.append(sorted(itertools.chain(*parts)))
    return found


def test_the_global_batches_are_the_same_for_every_world_that_divides_the_lanes():
    counts = [7, 5, 8, 8, 0, 1, 8, 3, 8, 8, 2]
    expected = global_batches(make(counts, 12), 24, 1, 9)
    for world in (2, 3, 4, 6, 12):
        assert global_batches(make(counts, 12), 24, world, 9) == expected


def test_the_order_changes_with_seed_and_epoch_and_not_with_who_asks():
    counts = [8] * 20
    first = one_pass(make(counts, 4))
    assert one_pass(make(counts, 4)) == first
    assert one_pass(make(counts, 4, seed=1)) != first
    second = [slot._replace(epoch=0) for slot in one_pass(make(counts, 4), 1)]
    assert second != first
    served = Order(np.array(counts), np.ones(20, dtype=int), seed=0, lanes=4, window=3, serves=(2,))
    assert list(itertools.islice(served.stream(2), 300)) == list(
        itertools.islice(make(counts, 4).stream(2), 300)
    )
    assert one_pass(served) == first


def test_the_order_is_frozen():
    # What a checkpoint of today continues tomorrow: change this only with the manifest's format.
    order = make([4, 4, 3], 2, seed=5, window=2)
    found = [(s.chunk, s.place) for s in itertools.islice(order.stream(0), 8)]
    assert found == FROZEN


FROZEN = [(1, 2), (1, 3), (2, 0), (1, 1), (1, 0), (2, 1), (2, 2), (0, 0)]


def test_windows_hold_m_chunks_and_begin_elsewhere_in_each_lane():
    order = make([8] * 96, 4, window=4)
    for lane in range(4):
        window = order.window_at(lane, 0)
        sizes, starts = [], []
        while window.epoch == 0:
            sizes.append(len(window.pieces))
            starts.append(window.start)
            assert sorted(window.order) == list(range(len(window.order)))
            window = order.window_at(lane, window.stop)
        assert sizes[0] == (lane or 4)
        assert set(sizes[1:-1]) == {4}
        assert sum(sizes) == 24


def test_a_window_is_permuted():
    window = make([8] * 8, 1, window=8).window_at(0, 0)
    assert list(window.order) != sorted(window.order)
    inside = [slot.place for slot in window.slots() if slot.chunk == window.pieces[0].chunk]
    assert inside != sorted(inside)


def test_fewer_samples_than_lanes_are_refused():
    with pytest.raises(UserError, match="7 samples < 8 lanes"):
        make([4, 3], 8)


@pytest.mark.parametrize(
    ("batch", "world", "lanes"),
    [(5376, 8, 384), (5376, 1, 384), (4096, 8, 256), (64, 2, 64), (96, 3, 96), (6, 3, 6),
     (1000, 1, 250), (1000, 3 - 1, 250), (1024, 512, 512), (7, 1, 7), (769, 1, 1)],
)  # fmt: skip
def test_lanes_are_the_largest_divisor_that_the_world_divides(batch, world, lanes):
    assert lanes_for(batch, world) == lanes
    check_lanes(batch, lanes, world)


@given(st.integers(1, 6000), st.integers(1, 64))
def test_chosen_lanes_always_fit(batch, world):
    batch = batch * world
    lanes = lanes_for(batch, world)
    check_lanes(batch, lanes, world)
    better = [n for n in range(lanes + 1, 385) if batch % n == 0 and n % world == 0]
    assert not better


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: lanes_for(100, 8), r"use 96 or 104, or a world size of 2, 4, 5, 10"),
        (lambda: lanes_for(3, 8), r"use 8, or"),
        (lambda: check_lanes(100, 8, 1), r"use 96 or 104, or lanes 2, 4, 5, 10"),
        (lambda: check_lanes(96, 12, 8), r"12 lanes do not divide among 8 ranks; use a world size"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_the_nearest_that_do(call, text):
    with pytest.raises(UserError, match=text):
        call()


@given(st.integers(1, 2000), st.sampled_from([1, 2, 3, 4, 8]))
def test_fewer_lanes_are_all_that_fit_largest_first(batch, world):
    batch *= world
    lanes = lanes_for(batch, world)
    found = fewer_lanes(batch, world, lanes)
    assert found == [n for n in range(lanes - 1, 0, -1) if not batch % n and not n % world]
    for fewer in found:
        check_lanes(batch, fewer, world)
