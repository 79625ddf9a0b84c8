"""Which members make a record, which records count, and what of them is read."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyclip.shards import iterate_samples
from tests.toy import write_shard
from training.data.records import SUFFIXES, Caps, group, read_parts
from training.data.tar import Damage, members, memory


def records(content: bytes, passed: list[str] | None = None):
    return list(group(members(memory(content), len(content)), passed=passed))


NAMES = st.lists(
    st.sampled_from(
        ["1.jpg", "1.txt", "1.seg.png", "2.jpg", "2.txt", "2.JSON", "a/2.jpg", ".hidden", "plain",
         "3.", "../4.jpg", "../4.txt"]
    ),
    max_size=12,
)  # fmt: skip


@given(NAMES)
def test_records_are_those_of_the_plain_reader(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("s") / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for index, name in enumerate(names):
            content = b"x" * (index * 100)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = path.read_bytes()
    expected = list(iterate_samples(path))
    found = records(content)
    assert [(r.key, r.ordinal) for r in found] == [(s.key, s.ordinal) for s in expected]
    for record, sample in zip(found, expected, strict=True):
        parts = {k: content[a : a + n] for k, (a, n) in record.spans.items()}
        assert parts == sample.parts
        assert record.complete == ("txt" in parts and "jpg" in parts)


@pytest.mark.parametrize(
    ("suffixes", "complete"),
    [
        (("jpg", "txt"), True), (("png", "txt"), True), (("txt", "webp", "json"), True),
        (("jpeg", "txt"), True), (("jpg", "json"), False), (("txt", "json"), False),
        (("seg.png", "txt"), False), (("gif", "txt"), False),
    ],
)  # fmt: skip
def test_a_record_counts_with_a_picture_and_a_caption(tmp_path, suffixes, complete):
    shard = write_shard(tmp_path / "0.tar", [dict.fromkeys(suffixes, b"")])
    assert [record.complete for record in records(shard.read_bytes())] == [complete]


def test_a_record_cut_off_is_kept_if_its_members_are_there(tmp_path):
    shard = write_shard(tmp_path / "0.tar", [{"jpg": b"a", "txt": b"b"}] * 3)
    content = shard.read_bytes()
    ends = [record.end for record in records(content)]
    for length, whole in ((ends[1], 2), (ends[1] + 700, 2), (ends[1] - 512, 1), (ends[2], 3)):
        found = group(members(memory(content[:length]), length))
        assert [next(found).ordinal for _ in range(whole)] == list(range(whole))
        with pytest.raises(Damage):
            next(found)


def test_only_listed_suffixes_are_read(tmp_path):
    parts = dict.fromkeys([*SUFFIXES, "pyd", "pickle", "pkl", "npy", "seg.png"], b"x")
    content = write_shard(tmp_path / "0.tar", [parts]).read_bytes()
    (record,) = records(content)
    assert "pickle" in record.spans
    got, fault = read_parts(record, memory(content), Caps())
    assert set(got) == set(SUFFIXES)
    assert fault is None


@pytest.mark.parametrize(
    ("suffix", "caps", "fault"),
    [
        ("jpg", Caps(image=9), "picture too large"),
        ("txt", Caps(text=9), "caption too long"),
        ("json", Caps(json=9), "json too large"),
    ],
)
def test_a_member_over_its_cap_is_not_read(tmp_path, suffix, caps, fault):
    parts = {"jpg": b"", "txt": b"", "json": b"", suffix: bytes(10)}
    content = write_shard(tmp_path / "0.tar", [parts]).read_bytes()
    (record,) = records(content)
    asked = []

    def read(offset: int, length: int) -> bytes:
        asked.append(length)
        return memory(content)(offset, length)

    got, found = read_parts(record, read, caps)
    assert found == fault
    assert suffix not in got
    assert 10 not in asked
    at_the_cap = write_shard(tmp_path / "1.tar", [{**parts, suffix: bytes(9)}]).read_bytes()
    assert read_parts(records(at_the_cap)[0], memory(at_the_cap), caps)[1] is None


def test_names_never_touch_the_disk(tmp_path, monkeypatch):
    shard = write_shard(
        tmp_path / "in" / "0.tar", [{"jpg": b"a", "txt": b"b"}] * 2, ["../../up", "/tmp/absolute"]
    )
    before = sorted(tmp_path.rglob("*"))
    content = shard.read_bytes()
    found = records(content)
    assert [record.key for record in found] == ["../../up", "/tmp/absolute"]
    assert read_parts(found[0], memory(content), Caps())[0] == {"jpg": b"a", "txt": b"b"}
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/absolute.jpg").exists()
