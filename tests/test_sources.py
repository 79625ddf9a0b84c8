"""Which shards a run reads, how many samples they hold, and who reads which."""

import json
import math
from collections import Counter
from itertools import islice, takewhile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyclip.base.errors import UserError
from lazyclip.shards import ShardError
from tests.toy import caption_shards, write_shard
from training.data import sources
from training.data.sources import Source, count_samples, open_source, require_captions

SEEDS = st.integers(0, 1000)


def named(count: int) -> tuple[Path, ...]:
    return tuple(Path(f"{i:05d}.tar") for i in range(count))


def opened(pattern: str, **how) -> Source:
    how = {"samples": None, "resampled": False, "lanes": 1, "workers": 0, **how}
    return open_source(pattern, **how)


def one_pass(source: Source, seed: int, number: int, lanes: int) -> list[list[int]]:
    """Each lane's slots in one pass."""
    walks = [
        takewhile(lambda turn: turn.number <= number, source.lane(seed, lane, lanes))
        for lane in range(lanes)
    ]
    return [[turn.slot for turn in walk if turn.number == number] for walk in walks]


# --- what a pattern means -------------------------------------------------------------------------


def test_braces_globs_folders_and_joined_sources_name_the_same_shards(tmp_path):
    braces = caption_shards(tmp_path, shards=3, per_shard=2)
    files = sorted(tmp_path.glob("*.tar"))
    assert len(files) == 3
    for pattern in (braces, f"{tmp_path}/*.tar", str(tmp_path), "::".join(map(str, files))):
        source = opened(pattern)
        assert list(source.shards) == files
        assert source.samples == 6


def test_a_source_named_twice_counts_twice(tmp_path):
    pattern = caption_shards(tmp_path, shards=2, per_shard=3)
    source = opened(f"{pattern}::{pattern}")
    assert len(source.shards) == 4
    assert source.samples == 12


def test_no_shard_at_all_says_what_was_tried_and_how_to_quote(tmp_path):
    with pytest.raises(
        UserError, match=r"names 0 existing shards; first tried: .*00000.tar.*Quote"
    ):
        opened(f"{tmp_path}/{{00000..00003}}.tar")


def test_a_range_that_goes_too_far_names_the_first_missing_shard(tmp_path):
    caption_shards(tmp_path, shards=2, per_shard=1)
    with pytest.raises(UserError, match=r"2 of 4 shards do not exist, first: .*00002.tar"):
        opened(f"{tmp_path}/{{00000..00003}}.tar")


# --- preflight ------------------------------------------------------------------------------------


def test_fewer_shards_than_loader_processes_names_the_flag_that_helps(tmp_path):
    pattern = caption_shards(tmp_path, shards=5, per_shard=1)
    with pytest.raises(UserError) as caught:
        opened(pattern, lanes=2 * 4, workers=4)
    assert str(caught.value) == (
        "5 shards < 2 ranks x 4 workers; use --workers 2, or --dataset-resampled"
    )
    with pytest.raises(UserError, match="5 shards < 6 ranks x 1 workers; make more, smaller"):
        opened(pattern, lanes=6, workers=0)
    assert opened(pattern, lanes=5, workers=5).samples == 5
    assert opened(pattern, lanes=8, workers=4, resampled=True).resampled


def test_shards_without_captions_are_refused_with_the_suffixes_they_have(tmp_path):
    shard = write_shard(tmp_path / "0.tar", [{"jpg": b"x", "cls": b"1"}] * 3 + [{"png": b"x"}])
    with pytest.raises(UserError) as caught:
        opened(str(shard))
    text = str(caught.value)
    assert "seen: cls in 3, jpg in 3, png in 1 of 4 samples" in text
    assert "jpg, jpeg, png, webp" in text
    assert "(txt)" in text


def test_shards_without_samples_are_refused(tmp_path):
    shard = write_shard(tmp_path / "0.tar", [])
    with pytest.raises(UserError, match="no samples at all"):
        opened(str(shard))


def test_a_first_shard_without_a_fit_is_forgiven_when_the_next_has_one(tmp_path):
    write_shard(tmp_path / "0.tar", [{"jpg": b"x"}])
    write_shard(tmp_path / "1.tar", [{"jpg": b"x", "txt": b"a"}])
    assert opened(str(tmp_path)).samples == 1


def test_the_look_at_captions_ends_after_the_first_samples(tmp_path):
    shard = write_shard(tmp_path / "0.tar", [{"jpg": b"x"}] * 300 + [{"jpg": b"x", "txt": b"a"}])
    with pytest.raises(UserError, match="jpg in 200 of 200 samples"):
        require_captions([shard])


def test_a_damaged_first_shard_is_named(tmp_path):
    shard = tmp_path / "0.tar"
    shard.write_bytes(b"no tar at all" * 100)
    with pytest.raises(ShardError, match=r"0.tar is truncated or damaged after 0 whole samples"):
        opened(str(shard))


# --- counting -------------------------------------------------------------------------------------


def test_counting_reads_only_samples_with_picture_and_caption(tmp_path):
    good, no_text, no_picture = {"jpg": b"x", "txt": b"a"}, {"png": b"x"}, {"txt": b"a"}
    shard = write_shard(tmp_path / "0.tar.gz", [good, no_text, good, no_picture, good])
    assert count_samples([shard]) == 3


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz"])
def test_the_count_beside_a_shard_is_taken_without_reading_it(tmp_path, ending):
    shard = write_shard(tmp_path / f"00007{ending}", [{"jpg": b"x", "txt": b"a"}] * 2)
    (tmp_path / "00007_stats.json").write_text(json.dumps({"successes": 40, "count": 50}))
    assert count_samples([shard]) == 40


@pytest.mark.parametrize("text", ["{", "[]", '{"count": 3}', '{"successes": "3"}'])
def test_an_unreadable_count_beside_a_shard_makes_it_be_read(tmp_path, text):
    shard = write_shard(tmp_path / "0.tar", [{"jpg": b"x", "txt": b"a"}] * 2)
    (tmp_path / "0_stats.json").write_text(text)
    assert count_samples([shard]) == 2


def test_a_damaged_shard_counts_what_comes_before_the_damage(tmp_path, caplog):
    shard = write_shard(tmp_path / "0.tar", [{"jpg": b"x" * 600, "txt": b"a"}] * 5)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: 3 * (512 + 1024 + 512 + 512) + 100])
    assert count_samples([shard]) == 2
    assert "0.tar is truncated" in caplog.text


def test_too_much_to_count_asks_for_the_number(tmp_path, monkeypatch):
    pattern = caption_shards(tmp_path, shards=2, per_shard=1)
    monkeypatch.setattr(sources, "COUNT_LIMIT", 1000)
    with pytest.raises(UserError, match="pass --train-num-samples N"):
        opened(pattern)
    assert opened(pattern, samples=7).samples == 7


# --- who reads which ------------------------------------------------------------------------------


@given(seed=SEEDS, world=st.integers(1, 4), workers=st.integers(0, 4), extra=st.integers(0, 9),
       number=st.integers(0, 3))  # fmt: skip
def test_every_pass_hands_every_shard_to_exactly_one_lane(seed, world, workers, extra, number):
    lanes = world * max(workers, 1)
    source = Source(named(lanes + extra), 1, False)
    walks = one_pass(source, seed, number, lanes)
    assert sorted(slot for walk in walks for slot in walk) == list(range(len(source.shards)))
    assert all(walks)
    assert max(map(len, walks)) - min(map(len, walks)) <= 1


@given(seed=SEEDS, lanes=st.integers(1, 6))
def test_the_order_follows_from_the_seed_and_changes_from_pass_to_pass(seed, lanes):
    source = Source(named(40), 1, False)
    assert one_pass(source, seed, 0, lanes) == one_pass(source, seed, 0, lanes)
    assert one_pass(source, seed, 0, lanes) != one_pass(source, seed, 1, lanes)
    assert one_pass(source, seed, 0, lanes) != one_pass(source, seed + 1, 0, lanes)


@given(seed=SEEDS, resampled=st.booleans(), lanes=st.integers(1, 5))
def test_a_turn_never_comes_twice_and_names_its_shard(seed, resampled, lanes):
    source = Source(named(5), 1, resampled)
    turns = [t for lane in range(lanes) for t in islice(source.lane(seed, lane, lanes), 30)]
    assert len({(t.number, t.slot) for t in turns}) == len(turns)
    assert all(t.shard == source.shards[t.slot] for t in turns)


@given(seed=SEEDS, lanes=st.integers(2, 12))
def test_resampled_lanes_never_run_dry_and_draw_for_themselves(seed, lanes):
    source = Source(named(3), 1, True)  # fewer shards than lanes is allowed here
    walks = [[t.slot for t in islice(source.lane(seed, lane, lanes), 40)] for lane in range(lanes)]
    assert [len(walk) for walk in walks] == [40] * lanes
    assert len(set(map(tuple, walks))) == lanes
    again = [t.slot for t in islice(source.lane(seed, 1, lanes), 40)]
    assert again == walks[1]


def test_resampled_shards_are_drawn_evenly_with_replacement():
    source = Source(named(8), 1, True)
    drawn = [t.slot for t in islice(source.lane(0, 0, 1), 8000)]
    counts = Counter(drawn)
    spread = 5 * math.sqrt(8000 / 8)
    assert all(abs(counts[slot] - 1000) < spread for slot in range(8))
    assert len(set(drawn[:8])) < 8
