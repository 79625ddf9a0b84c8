"""From shards to batches: which samples, in which order, augmented how, and what is counted."""

import dataclasses
import itertools
import multiprocessing
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2

from lazyclip.factory import build
from tests.toy import jpeg, write_shard
from training.data import batches as module
from training.data.batches import Batch, Loading, batches, seeded
from training.data.sources import Source, open_source

# Python 3.12 warns of any fork of a process that has threads; DataLoader forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
CROP = image_transform_v2(PreprocessCfg(size=16), is_train=True, aug_cfg={"scale": (0.2, 1.0)})
PER_SHARD = 6


def number_of(captions: list[str]) -> torch.Tensor:
    """A tokenizer that reads the sample's number from its caption."""
    return torch.tensor([[int(caption.split()[-1])] for caption in captions])


def good(number: int) -> dict[str, bytes]:
    return {"jpg": jpeg(number, (24, 24)), "txt": f"sample {number}".encode()}


def shards(folder: Path, count: int = 4, change=lambda number, parts: parts) -> str:
    """Shards of `PER_SHARD` samples, numbered through; `change` may spoil some."""
    for shard in range(count):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        write_shard(folder / f"{shard:05d}.tar", [change(n, good(n)) for n in numbers])
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> str:
    return shards(tmp_path_factory.mktemp("shards"))


def source_of(pattern: str, **how) -> Source:
    return open_source(pattern, None, how.pop("resampled", False), 1, 0)


def loading(**how) -> Loading:
    plain = {"batch_size": 3, "transform": CROP, "tokenizer": number_of, "seed": 0, "rank": 0,
             "world": 1, "workers": 0, "pin": False}  # fmt: skip
    return Loading(**{**plain, **how})


def take(pattern: str, count: int, resampled: bool = False, **how) -> list[Batch]:
    endless = batches(source_of(pattern, resampled=resampled), loading(**how))
    taken = list(itertools.islice(endless, count))
    endless.close()
    return taken


def numbers(taken: list[Batch]) -> list[int]:
    return [int(n) for batch in taken for n in batch.texts.flatten()]


def pictures(taken: list[Batch]) -> dict[int, torch.Tensor]:
    """Sample number -> its augmented picture (the last, where one comes twice)."""
    return {
        int(n): image
        for batch in taken
        for n, image in zip(batch.texts.flatten(), batch.images, strict=True)
    }


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(
        torch.equal(x.images, y.images) and torch.equal(x.texts, y.texts)
        for x, y in zip(a, b, strict=True)
    )


# --- which samples --------------------------------------------------------------------------------


@settings(max_examples=10)
@given(ranks=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_ranks_together_see_every_sample_once_a_pass(world, ranks, seed):
    """Four shards over 1, 2 or 4 ranks; over 3, one rank has two shards."""
    per_rank = [Counter() for _ in range(ranks)]
    source = source_of(world)
    for rank in range(ranks):
        turns = itertools.takewhile(lambda t: t.number == 0, source.lane(seed, rank, ranks))
        length = PER_SHARD * len(list(turns))
        taken = take(world, length, batch_size=1, rank=rank, world=ranks, seed=seed)
        per_rank[rank].update(numbers(taken))
    assert sum(per_rank, Counter()) == Counter(range(4 * PER_SHARD))


def test_batches_are_whole_and_cross_the_end_of_a_pass(world):
    taken = take(world, 5, batch_size=7)
    assert all(len(b.images) == len(b.texts) == 7 for b in taken)
    assert taken[0].images.shape == (7, 3, 16, 16)
    first, second = numbers(taken)[:24], numbers(taken)[24:]
    assert sorted(first) == list(range(24))
    assert len(set(second)) == len(second) == 11


def test_samples_are_mixed_over_shards_and_in_another_order_each_pass(world):
    drawn = numbers(take(world, 16))
    first, second = drawn[:24], drawn[24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert len({n // PER_SHARD for n in first[:PER_SHARD]}) > 1


def test_one_loader_process_gives_the_batches_of_none(world):
    assert same(take(world, 10), take(world, 10, workers=1))


def test_two_loader_processes_deliver_the_same_samples_augmented_alike(world):
    alone, shared = take(world, 16), take(world, 16, workers=2)
    for first in (0, 8):  # one pass of 24 samples is 8 batches; each process reads two shards
        a, b = alone[first : first + 8], shared[first : first + 8]
        assert sorted(numbers(a)) == sorted(numbers(b)) == list(range(24))
        seen, other = pictures(a), pictures(b)
        assert all(torch.equal(seen[n], other[n]) for n in seen)
    assert same(shared, take(world, 16, workers=2))


def test_loader_processes_end_with_the_batches(world):
    before = set(multiprocessing.active_children())
    endless = batches(source_of(world), loading(workers=2))
    next(endless)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 2
    endless.close()
    for process in started:
        process.join(20)
    assert not any(process.is_alive() for process in started)


def test_the_pipeline_goes_to_spawned_processes_by_pickle(world):
    built = build("LaSt-ViT-nano")
    how = loading(transform=built.preprocess_train, tokenizer=built.tokenizer)
    pipeline = module._pipeline(source_of(world), how)
    copied = pickle.loads(pickle.dumps(pipeline))
    assert same(list(itertools.islice(pipeline, 2)), list(itertools.islice(copied, 2)))


def test_resampled_samples_come_again_and_each_time_cropped_anew(world):
    endless = batches(source_of(world, resampled=True), loading(batch_size=1))
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in itertools.islice(endless, 80):
        seen.setdefault(int(batch.texts), []).append(batch.images[0])
    crops = [image for images in seen.values() for image in images]
    assert len(crops) == 80
    assert max(map(len, seen.values())) > 2
    assert len({image.numpy().tobytes() for image in crops}) == 80


def test_the_shuffle_buffer_is_bounded_and_filled_before_the_first_draw(world):
    turn = next(source_of(world).lane(0, 0, 1))
    read = 0

    def records():
        nonlocal read
        for index in range(500):
            read += 1
            yield turn, index

    most, drawn = 0, []
    for _, index in module._shuffled(records(), loading(), False, most=50, start=20):
        drawn.append(index)
        most = max(most, read - len(drawn))
        assert read - len(drawn) >= 19 or read == 500
    assert most <= 50
    assert sorted(drawn) == list(range(500))
    assert np.mean(np.abs(np.diff(drawn))) > 10


# --- randomness -----------------------------------------------------------------------------------


def test_one_seed_gives_the_same_batches_whatever_happens_in_between(world):
    torch.manual_seed(1)
    first = take(world, 8)
    torch.manual_seed(2)
    endless = batches(source_of(world), loading())
    again = []
    for batch in itertools.islice(endless, 8):
        torch.rand(1000)  # what a model may draw while it trains
        again.append(batch)
    assert same(first, again)


def test_another_seed_gives_another_order_and_other_crops(world):
    a, b = take(world, 8), take(world, 8, seed=1)
    assert numbers(a) != numbers(b)
    seen, other = pictures(a), pictures(b)
    assert not any(torch.equal(seen[n], other[n]) for n in seen)


def test_a_sample_is_cropped_anew_in_each_pass(world):
    taken = take(world, 16)
    first, second = pictures(taken[:8]), pictures(taken[8:])
    assert not any(torch.equal(first[n], second[n]) for n in first)


def test_a_crop_does_not_depend_on_the_rank_that_makes_it(world):
    alone = pictures(take(world, 24, batch_size=1))
    for rank in range(2):
        for n, image in pictures(take(world, 12, batch_size=1, rank=rank, world=2)).items():
            assert torch.equal(image, alone[n])


def test_equal_pictures_of_two_sources_are_cropped_each_for_itself(tmp_path):
    for name in "ab":
        write_shard(tmp_path / name / "00000.tar", [{"jpg": jpeg(0, (24, 24)), "txt": b"a 1"}])
    taken = take(f"{tmp_path}/a::{tmp_path}/b", 1, batch_size=2)
    assert not torch.equal(taken[0].images[0], taken[0].images[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_random_state_alone(world, workers):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(world, 4, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_draws_by_its_name_and_puts_the_state_back():
    before = torch.get_rng_state()
    drawn = []
    for name in ("a", "b", "a"):
        with seeded(name):
            drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    with pytest.raises(KeyError), seeded("a"):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


# --- what gives no sample -------------------------------------------------------------------------

SPOILED = {
    "no picture": lambda parts: {"txt": parts["txt"]},
    "no caption": lambda parts: {"jpg": parts["jpg"], "json": b"{}"},
    "empty caption": lambda parts: {**parts, "txt": b"\n"},
    "caption not text": lambda parts: {**parts, "txt": b"\xff"},
    "bad picture": lambda parts: {**parts, "jpg": parts["jpg"][:300]},
}


def dropped_in(taken: list[Batch]) -> list[tuple[str, str]]:
    return [(d.reason, d.label) for batch in taken for d in batch.dropped]


@pytest.mark.parametrize("reason", SPOILED)
def test_a_bad_sample_is_counted_by_name_and_the_others_keep_their_order(world, tmp_path, reason):
    spoiled = (5, 13)  # ordinal 5 of the first shard, 1 of the third

    def change(number, parts):
        return SPOILED[reason](parts) if number in spoiled else parts

    taken = take(shards(tmp_path, change=change), 45, batch_size=1)
    clean = take(world, 24 + 24, batch_size=1)
    assert numbers(taken)[:44] == [n for n in numbers(clean) if n not in spoiled]
    one_pass = Counter(dropped_in(taken[:23]))  # what is dropped last shows with the next sample
    assert set(one_pass) == {
        (reason, "00000.tar:5 (key 000000005)"), (reason, "00002.tar:1 (key 000000001)")
    }  # fmt: skip
    kept, all_of_them = pictures(taken[:22]), pictures(clean[:24])
    assert all(torch.equal(kept[n], all_of_them[n]) for n in kept)


def test_a_truncated_shard_is_named_and_the_others_go_on(tmp_path):
    pattern = shards(tmp_path)
    damaged = tmp_path / "00001.tar"
    damaged.write_bytes(damaged.read_bytes()[:4000])
    taken = take(pattern, 40, batch_size=1)
    named = dropped_in(taken)
    assert set(named) == {("rest of shard", "00001.tar")}
    assert 1 <= len(named) <= 3
    assert {n // PER_SHARD for n in numbers(taken)} >= {0, 2, 3}


def test_a_stream_without_a_single_sample_speaks_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHUFFLE", 50)
    pattern = shards(tmp_path, change=lambda number, parts: SPOILED["empty caption"](parts))
    for workers in (0, 1):
        (batch,) = take(pattern, 1, workers=workers)
        assert len(batch.images) == 0
        assert len(batch.dropped) == 50


def test_what_was_dropped_comes_through_loader_processes(tmp_path):
    def change(number, parts):
        return SPOILED["bad picture"](parts) if number % PER_SHARD == 2 else parts

    taken = take(shards(tmp_path, change=change), 40, batch_size=1, workers=2)
    labels = {label for _, label in dropped_in(taken)}
    assert labels == {f"{shard:05d}.tar:2 (key 000000002)" for shard in range(4)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_loader_processes_hand_over_page_locked_batches(world):
    (batch,) = take(world, 1, workers=1, pin=True)
    assert batch.images.is_pinned()
    assert batch.texts.is_pinned()


def test_settings_of_loading_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        loading().seed = 1
