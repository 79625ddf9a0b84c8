"""The exact loader: batches that depend on nothing but the step, bad samples, reading errors."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from lazyclip.base.errors import UserError
from tests.toy import jpeg, write_shard
from training.data import chunks, reading
from training.data.batches import Loading
from training.data.chunks import Reader
from training.data.exact import Exact, Step, digest, steps
from training.data.prepare import Wanted, prepare
from training.data.reading import Patience, ReadFailed
from training.data.records import Caps
from training.data.survey import How

QUICK = Patience((0.0, 0.0))
BAD = {"jpg": b"no picture", "txt": b"a"}


def draw(picture) -> torch.Tensor:
    """Stand in for augmentation: the picture's first pixel and both kinds of random numbers."""
    return torch.tensor([*picture.getpixel((0, 0)), random.random(), float(torch.rand(()))])


def tokens(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[int(c.split()[-1]) if c else -1] for c in captions])


def loading(batch: int, rank: int = 0, world: int = 1, workers: int = 0, seed: int = 0) -> Loading:
    return Loading(batch // world, draw, tokens, seed, rank, world, workers, False)


def sample(number: int) -> dict[str, bytes]:
    return {"jpg": jpeg(number, (8, 8)), "txt": f"caption {number}".encode()}


def shards(folder: Path, sizes: list[int], bad: tuple[int, ...] = ()) -> str:
    first = 0
    for index, size in enumerate(sizes):
        numbers = range(first, first + size)
        write_shard(folder / f"{index:05d}.tar", [BAD if n in bad else sample(n) for n in numbers])
        first += size
    return str(folder)


def exact(pattern: str, lanes: int, window: int = 2, chunk: int = 4, **more) -> Exact:
    done = prepare(Wanted(pattern, Path(pattern), how=How(chunk=chunk), **more))
    return Exact(Reader(done.manifest, done.shards, QUICK), lanes, window)


def first_steps(source: Exact, number: int, start: int = 0, **how) -> list[Step]:
    return list(itertools.islice(steps(source, loading(**how), start), number))


def same(a: list[Step], b: list[Step]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.texts, y.texts)
        and torch.equal(x.ids, y.ids) and torch.equal(x.masked, y.masked) and x.faults == y.faults
        for x, y in zip(a, b, strict=True)
    )  # fmt: skip


def global_ids(source: Exact, world: int, number: int, batch: int, start: int = 0) -> list[list]:
    ranks = [
        first_steps(source, number, start, batch=batch, rank=rank, world=world)
        for rank in range(world)
    ]
    return [
        sorted(tuple(row) for step in together for row in step.ids.tolist())
        for together in zip(*ranks, strict=True)
    ]


def test_a_pass_holds_each_sample_once_with_its_own_caption(tmp_path):
    source = exact(shards(tmp_path, [10, 7, 11, 4]), lanes=8)
    served = first_steps(source, 4, batch=8)
    captions = torch.cat([step.texts for step in served]).flatten().tolist()
    assert sorted(captions) == list(range(32))
    offsets = [0, 10, 17, 28]
    for step in served:
        assert step.images.shape == (8, 5)
        expected = [offsets[shard] + ordinal for shard, ordinal in step.ids.tolist()]
        assert step.texts.flatten().tolist() == expected
        assert not step.masked.any()
        assert step.faults == ()


def test_the_global_batches_are_the_same_for_every_world_and_after_a_change_of_it(tmp_path):
    source = exact(shards(tmp_path, [10, 7, 11, 5]), lanes=6)
    whole = global_ids(source, 1, 10, batch=12)
    assert global_ids(source, 2, 10, batch=12) == whole
    assert global_ids(source, 3, 10, batch=12) == whole
    halves = global_ids(source, 2, 4, batch=12) + global_ids(source, 6, 6, batch=12, start=8)
    assert halves == whole
    # Another global batch goes on where the first stopped.
    wide = global_ids(source, 1, 2, batch=24, start=8)
    assert wide[0] == sorted(whole[4] + whole[5])


@pytest.mark.dist
def test_batches_are_the_same_bit_for_bit_for_any_number_of_workers(tmp_path):
    source = exact(shards(tmp_path, [10, 7, 11, 5], bad=(3, 4, 20)), lanes=6)
    whole = first_steps(source, 8, batch=12)
    assert sum(len(step.faults) for step in whole) >= 3
    for workers in (1, 2):
        assert same(first_steps(source, 8, batch=12, workers=workers), whole)
        assert same(first_steps(source, 5, 6, batch=12, workers=workers), whole[3:])


@pytest.mark.parametrize("k", [1, 3, 7, 12, 40])
def test_a_restart_gives_the_tail_of_the_uninterrupted_run(tmp_path, k):
    source = exact(shards(tmp_path, [10, 7, 11, 5], bad=(3, 20)), lanes=3)
    whole = first_steps(source, k + 6, batch=3)
    assert same(first_steps(source, 6, k, batch=3), whole[k:])


def test_augmentation_follows_from_seed_epoch_and_sample_and_leaves_other_randomness_alone(
    tmp_path,
):
    source = exact(shards(tmp_path, [12]), lanes=2)
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    a = first_steps(source, 12, batch=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    seen: dict[tuple[int, int], list[list[float]]] = {}
    for step in a:
        for row, image in zip(step.ids.tolist(), step.images.tolist(), strict=True):
            seen.setdefault(tuple(row), []).append(image[3:])
    assert all(len(draws) == 2 and draws[0] != draws[1] for draws in seen.values())
    assert len({tuple(draws[0]) for draws in seen.values()}) == 12
    other = exact(str(tmp_path), lanes=4)  # another order, the same crops
    for step in first_steps(other, 3, batch=4):
        for row, image in zip(step.ids.tolist(), step.images.tolist(), strict=True):
            assert image[3:] == seen[tuple(row)][0]


@pytest.mark.parametrize("share", [1, 2, 4])
def test_a_bad_sample_keeps_its_slot_and_no_batch_holds_a_caption_twice(tmp_path, share):
    bad = (2, 3, 5, 13, 14, 22)
    source = exact(shards(tmp_path, [12, 12, 12], bad), lanes=3, window=2)
    served = first_steps(source, 36 // (3 * share), batch=3 * share)
    names = [(shard, o) for step in served for shard, o in step.ids.tolist()]
    assert len(set(names)) == 36
    faults = [fault for step in served for fault in step.faults]
    assert sorted((f.shard, f.ordinal) for f in faults) == sorted(
        (f"{n // 12:05d}.tar", n % 12) for n in bad
    )
    for step in served:
        captions = step.texts.flatten()[~step.masked].tolist()
        assert max(Counter(captions).values()) == 1
        for fault in step.faults:
            assert fault.reason == "bad picture"
            at = step.ids.tolist().index([int(fault.shard[:5]), fault.ordinal])
            assert bool(step.masked[at]) == (fault.substitute is None)
            if fault.substitute:
                shard, ordinal = fault.substitute.split(":")
                assert int(step.texts[at]) == int(shard[:5]) * 12 + int(ordinal)
    assert any(fault.substitute for fault in faults)


def test_one_substitute_does_not_stand_in_twice_in_a_step(tmp_path):
    source = exact(shards(tmp_path, [16], bad=tuple(range(8))), lanes=1, window=4)
    served = first_steps(source, 4, batch=8)
    for step in served:
        stands = [fault.substitute for fault in step.faults if fault.substitute]
        assert len(set(stands)) == len(stands)
    assert max(len(step.faults) for step in served) > 2


def test_the_substitute_is_the_next_of_the_chunk(tmp_path):
    source = exact(shards(tmp_path, [8], bad=(1, 2, 7)), lanes=1, window=2, chunk=4)
    served = first_steps(source, 8, batch=1)
    stands = {f.ordinal: f.substitute for step in served for f in step.faults}
    assert stands == {1: "00000.tar:3", 2: "00000.tar:3", 7: "00000.tar:4"}


def test_without_a_substitute_the_slot_is_masked(tmp_path):
    # One lane takes its whole window in one step: whatever could stand in is there itself.
    source = exact(shards(tmp_path, [6], bad=(4,)), lanes=1, window=2)
    (step,) = first_steps(source, 1, batch=6)
    assert step.masked.sum() == 1
    at = int(step.masked.nonzero())
    assert step.ids[at].tolist() == [0, 4]
    assert step.texts[at].item() == -1
    assert step.faults[0].substitute is None
    nothing = exact(shards(tmp_path / "all", [4], bad=(0, 1, 2, 3)), lanes=1)
    (step,) = first_steps(nothing, 1, batch=2)
    assert step.masked.all()
    assert len(step.faults) == 2


def test_members_over_their_cap_are_faults(tmp_path):
    write_shard(
        tmp_path / "0.tar", [sample(n) for n in range(6)] + [{**sample(6), "txt": b"x" * 99}]
    )
    source = exact(str(tmp_path), lanes=1)
    small = Exact(Reader(source.reader.manifest, source.reader.shards, QUICK, Caps(text=50)), 1, 2)
    faults = [f for step in first_steps(small, 7, batch=1) for f in step.faults]
    assert [(f.ordinal, f.reason) for f in faults] == [(6, "caption too long")]


@pytest.mark.parametrize(
    ("text", "reason"), [(b"", "empty caption"), (b"\xff\xfe", "caption not text")]
)
def test_a_caption_that_is_none_is_a_fault(tmp_path, text, reason):
    write_shard(tmp_path / "0.tar", [sample(0), {**sample(1), "txt": text}, sample(2)])
    source = exact(str(tmp_path), lanes=1)
    faults = [f for step in first_steps(source, 3, batch=1) for f in step.faults]
    assert [(f.ordinal, f.reason) for f in faults] == [(1, reason)]


def test_filters_and_incomplete_records_leave_their_samples_out(tmp_path):
    parts = [
        {**sample(n), "json": b'{"width": %d}' % n} if n != 5 else {"jpg": b"alone"}
        for n in range(12)
    ]
    write_shard(tmp_path / "0.tar", parts)
    source = exact(str(tmp_path), lanes=2, filters=("width>=3",))
    served = first_steps(source, 4, batch=2)
    captions = sorted(torch.cat([step.texts for step in served]).flatten().tolist())
    assert captions == [3, 4, 6, 7, 8, 9, 10, 11]
    assert sorted(row[1] for step in served for row in step.ids.tolist()) == captions


def test_a_source_with_a_factor_comes_so_often_with_other_crops(tmp_path):
    shards(tmp_path / "a", [4])
    write_shard(tmp_path / "b" / "00009.tar", [sample(100), sample(101)])
    done = prepare(Wanted(f"{tmp_path}/a::{tmp_path}/b", tmp_path, "1::3", how=How(chunk=4)))
    source = Exact(Reader(done.manifest, done.shards, QUICK), 2, 2)
    served = first_steps(source, 5, batch=2)
    captions = Counter(torch.cat([step.texts for step in served]).flatten().tolist())
    assert captions == {0: 1, 1: 1, 2: 1, 3: 1, 100: 3, 101: 3}
    drawn = {tuple(image[3:]) for step in served for image in step.images.tolist()}
    assert len(drawn) == 10


def test_what_comes_more_than_once_in_a_pass_never_stands_in(tmp_path):
    """Another copy of it may stand in the same batch, in another lane."""
    shards(tmp_path / "a", [12], bad=(1, 5, 9))
    done = prepare(Wanted(f"{tmp_path}/a", tmp_path, "2", how=How(chunk=4)))
    source = Exact(Reader(done.manifest, done.shards, QUICK), 4, 2)
    served = first_steps(source, 6, batch=4)
    faults = [fault for step in served for fault in step.faults]
    assert len(faults) == 6
    assert all(fault.substitute is None for fault in faults)
    assert sum(int(step.masked.sum()) for step in served) == 6


def test_a_stand_in_is_never_in_the_batch_itself_where_passes_meet(tmp_path):
    """A lane may be in the next pass already, and hold there what another has at hand."""
    bad, stood, masked = (6, 20), 0, 0
    source = exact(shards(tmp_path, [10, 11], bad=bad), lanes=2)
    for seed in range(8):
        for step in first_steps(source, 12, batch=8, seed=seed):
            present = {f"{shard:05d}.tar:{ordinal}" for shard, ordinal in step.ids.tolist()}
            stands = [fault.substitute for fault in step.faults if fault.substitute]
            assert not present & set(stands)
            assert len(set(stands)) == len(stands)
            stood += len(stands)
            masked += int(step.masked.sum())
    assert stood > 10
    assert masked > 10


def test_a_failed_read_is_tried_again_and_changes_nothing(tmp_path, monkeypatch):
    source = exact(shards(tmp_path, [10, 7]), lanes=2)
    whole = first_steps(source, 8, batch=2)
    failures = Counter()
    real = reading.read_range

    def flaky(shard: Path, offset: int, length: int, into: bytearray | None = None):
        failures[shard, offset] += 1
        if failures[shard, offset] == 1:
            raise OSError(5, "Input/output error")
        content = real(shard, offset, length, into)
        return content[:-1] if failures[shard, offset] == 2 else content

    monkeypatch.setattr(reading, "read_range", flaky)
    assert same(first_steps(source, 8, batch=2), whole)
    assert max(failures.values()) >= 3


def test_a_read_that_keeps_failing_ends_the_run_and_names_the_shard(tmp_path):
    source = exact(shards(tmp_path, [10, 7]), lanes=2)
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(ReadFailed, match=r"00001.tar: .*No such file.*3 tries"):
        first_steps(source, 9, batch=2)


@pytest.mark.dist
def test_a_read_that_fails_in_a_worker_ends_the_run_too(tmp_path):
    source = exact(shards(tmp_path, [10, 7]), lanes=2)
    content = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(content[:3000])
    with pytest.raises(ReadFailed, match="it ends at byte 3000"):
        first_steps(source, 9, batch=2, workers=2)


@pytest.mark.parametrize("change", ["header", "members", "names"])
def test_a_shard_that_changed_since_its_manifest_ends_the_run(tmp_path, change):
    source = exact(shards(tmp_path, [8]), lanes=2)
    shard = tmp_path / "00000.tar"
    size = shard.stat().st_size
    if change == "header":
        content = bytearray(shard.read_bytes())
        content[0:5] = b"other"
        shard.write_bytes(bytes(content))
    elif change == "members":
        write_shard(shard, [{"jpg": b"", "txt": b""}] * 40)
        shard.write_bytes(shard.read_bytes().ljust(size, b"\0"))
    else:
        write_shard(shard, [{"jpg": sample(n)["jpg"], "tex": b"caption 0"} for n in range(8)])
    with pytest.raises(ReadFailed, match=r"00000.tar changed since"):
        first_steps(source, 4, batch=2)


def test_a_chunk_that_is_too_large_to_hold_is_read_member_by_member(tmp_path, monkeypatch):
    source = exact(shards(tmp_path, [10, 7], bad=(4,)), lanes=2)
    whole = first_steps(source, 9, batch=2)
    monkeypatch.setattr(chunks, "WHOLE_UP_TO", 100)
    assert same(first_steps(source, 9, batch=2), whole)


def test_lanes_share_a_chunk_while_one_of_them_holds_it(tmp_path, monkeypatch):
    source = exact(shards(tmp_path, [64]), lanes=16, chunk=64)
    real, reads = Reader.read, Counter()

    def counted(self, number, buffers):
        reads[number] += 1
        return real(self, number, buffers)

    monkeypatch.setattr(Reader, "read", counted)
    first_steps(source, 8, batch=16)
    assert reads[0] == 1


def test_numbers_that_do_not_divide_are_refused(tmp_path):
    source = exact(shards(tmp_path, [10]), lanes=4)
    with pytest.raises(UserError, match="does not divide among 4 lanes"):
        first_steps(source, 1, batch=6)
    with pytest.raises(UserError, match="4 lanes do not divide among 3 ranks"):
        first_steps(source, 1, batch=12, world=3)
    few = exact(str(tmp_path), lanes=16)
    with pytest.raises(UserError, match="10 samples < 16 lanes"):
        first_steps(few, 1, batch=16)


def test_the_digest_is_that_of_the_sorted_lines():
    import hashlib

    expected = hashlib.sha256(b"00000.tar:10\n00000.tar:9\n00001.tar:0").hexdigest()
    assert digest([("00001.tar", 0), ("00000.tar", 9), ("00000.tar", 10)]) == expected


@pytest.mark.data
def test_real_shards_come_once_in_a_pass(shared_data, tmp_path):
    done = prepare(Wanted(str(shared_data / "pairs"), tmp_path, file=tmp_path / "m.npz"))
    source = Exact(Reader(done.manifest, done.shards), 15, 8)
    texts = Loading(
        15, draw, lambda captions: torch.tensor([[len(c)] for c in captions]), 0, 0, 1, 0, False
    )
    served = list(itertools.islice(steps(source, texts), 11))
    assert len({tuple(row) for step in served for row in step.ids.tolist()}) == 165
    assert not [fault for step in served for fault in step.faults]
