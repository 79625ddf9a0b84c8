"""What windows take in earnest is never more than what is told."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.test_exact import exact, jpeg, loading
from tests.toy import write_shard
from training.data import chunks, memory
from training.data.chunks import SLACK, Buffers
from training.data.exact import Exact, _split, _Worker

BATCH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Some hundred samples of uneven sizes."""
    draw = np.random.default_rng(1)
    sizes = [int(size) for size in draw.lognormal(8, 0.7, 512)]
    return folder_of(tmp_path_factory.mktemp("uneven"), sizes)


def folder_of(folder: Path, sizes: list[int], shards: int = 4) -> str:
    """Write samples of about so many bytes each, one size after the other, in some shards."""
    each = len(sizes) // shards
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        samples = [
            {"jpg": jpeg(n, (8, 8)) + bytes(sizes[n]), "txt": f"caption {n}".encode()}
            for n in numbers
        ]
        write_shard(folder / f"{shard:05d}.tar", samples)
    return str(folder)


def held(source: Exact, world: int, steps: int) -> tuple[int, int]:
    """Run rank 0's processes in this one; return the most bytes of chunks, and of all beside."""
    lanes = range(0, source.lanes, world)
    order = source.order(0, lanes)
    for epoch in range(steps * BATCH // order.samples + 3):  # tables of passes are no windows
        order.window_at(0, epoch * order.length(0))
    parts = _split(lanes, min(max(source.workers, 1), len(lanes)))
    tracemalloc.start()
    workers = [_Worker(source, order, loading(BATCH), part, 0) for part in parts]
    streams = [worker.steps() for worker in workers]
    most = beside = 0
    for _ in range(steps):
        for stream in streams:
            next(stream)
        now = sum(worker.chunks.held for worker in workers)
        most, beside = max(most, now), max(beside, tracemalloc.get_traced_memory()[0] - now)
    tracemalloc.stop()
    for stream in streams:
        stream.close()
    return most, beside


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize(
    ("lanes", "window", "chunk"), [(64, 8, 16), (16, 8, 16), (16, 2, 8), (64, 2, 4), (4, 2, 8)]
)
def test_what_is_held_is_at_most_what_is_told(folder, lanes, window, chunk, workers):
    source = exact(folder, lanes, window, chunk)
    source = dataclasses.replace(source, workers=workers)
    for world in (1, 2):
        most, beside = held(source, world, 12)
        told = source.window_bytes(world)
        assert most + beside <= told
        assert most + beside >= told / 2.2  # nor is it a number that says nothing


def test_processes_hold_their_own_and_lanes_of_one_share(folder):
    source = exact(folder, 64, 8, 16)
    assert source.workers == 0
    alone = source.window_bytes(1)
    assert dataclasses.replace(source, workers=1).window_bytes(1) == alone
    four = dataclasses.replace(source, workers=4)
    assert four.window_bytes(1) > 1.3 * alone
    assert dataclasses.replace(source, workers=999).window_bytes(1) > four.window_bytes(1)
    # A window beyond the lane's own part of a pass takes no more.
    assert dataclasses.replace(four, window=500).window_bytes(1) == four.window_bytes(1)


def test_a_large_share_of_a_step_is_not_held_as_a_whole(folder):
    """One lane with a batch of many windows; each is let go before the next but one."""
    source = exact(folder, 1, 1, 4)
    most, _ = held(source, 1, 6)
    largest = np.sort(source.reader.manifest.lengths)[-2:].sum()
    assert most <= largest * SLACK


def test_one_chunk_among_many_small_ones_counts(tmp_path):
    sizes = [100] * 255 + [3_000_000]
    source = exact(folder_of(tmp_path, sizes), 4, 1, 4)
    assert source.window_bytes(1) > 3_000_000
    most, beside = held(source, 1, 8)
    assert 3_000_000 < most + beside <= source.window_bytes(1)


def test_the_bound_of_many_chunks_is_near_their_mean():
    rng = np.random.default_rng(0)
    held = rng.normal(2e6, 1.5e5, 100_000)
    sizes = memory._Sizes(
        np.concatenate([[0.0], np.cumsum(np.sort(held)[::-1][: memory.LARGEST])]),
        float(held.mean()), float(held.var()), float(held.max()), float(held.sum()), 1, held,
    )  # fmt: skip
    bounds = [memory._of_chunks(sizes, n) / n for n in (1, 16, 768, 6144, 99_000, 100_000)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == held.max()
    assert bounds[3] < 1.01 * held.mean()
    assert bounds[-1] * 100_000 == pytest.approx(held.sum())
    for n in (16, 768, 6144):
        drawn = max(rng.choice(held, n, replace=False).sum() for _ in range(50))
        assert drawn <= memory._of_chunks(sizes, n)


def test_free_memory_is_used_again_and_never_adds_to_the_most_that_was_used():
    buffers, out, most = Buffers(), list[bytearray](), 0
    draw = np.random.default_rng(2)
    again = set()
    for _ in range(2000):
        if out and (len(out) > 12 or draw.random() < 0.45):
            back = out.pop(int(draw.integers(len(out))))
            again.add(id(back))
            buffers.give(back)
        else:
            length = int(draw.normal(1000, 80))
            out.append(buffers.take(length))
            assert length <= len(out[-1]) <= SLACK * length
        most = max(most, sum(map(len, out)))
        assert sum(map(len, out)) <= buffers.held <= most
    assert len(again) < 400  # of about a thousand


def test_chunks_that_are_not_held_take_nothing(folder, monkeypatch):
    source = exact(folder, 4, 2, 8)
    before = source.window_bytes(1)
    memory._sizes.cache_clear()
    monkeypatch.setattr(memory, "WHOLE_UP_TO", 0)
    assert source.window_bytes(1) < before / 4
    memory._sizes.cache_clear()
    assert chunks.WHOLE_UP_TO > 0


def test_lengths_of_chunks_are_those_of_their_spans(folder):
    manifest = exact(folder, 4, 2, 7).reader.manifest
    spans = [manifest.span(n).length for n in range(len(manifest.starts))]
    assert manifest.lengths.tolist() == spans
