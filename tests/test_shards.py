"""lazyclip.shards: patterns, grouping, damage, and the class of a sample."""

import gzip
import io
import json
import logging
import tarfile
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyclip.base.errors import UserError
from lazyclip.shards import (
    Sample,
    ShardError,
    class_index_of,
    expand,
    image_part,
    iterate_samples,
    read_json_part,
    split_member,
)
from tests.toy import caption_shards, write_shard

BODY = [{"jpg": bytes([i]) * 700, "txt": b"caption %d" % i, "json": b"{}"} for i in range(3)]


def contents(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    return [(sample.key, dict(sample.parts)) for sample in iterate_samples(path)]


def read_until_damage(path: Path) -> tuple[list[str], str]:
    keys: list[str] = []
    with pytest.raises(ShardError) as caught:
        keys.extend(sample.key for sample in iterate_samples(path))
    return keys, str(caught.value)


def make(folder: Path, *names: str) -> None:
    for name in names:
        write_shard(folder / name, BODY[:1])


# --- patterns ------------------------------------------------------------------------------------


def test_braces_keep_their_order_and_globs_are_sorted(tmp_path):
    make(tmp_path, "00000.tar", "00001.tar", "00002.tar")
    names = [p.name for p in expand(f"{tmp_path}/0000{{2,0}}.tar")]
    assert names == ["00002.tar", "00000.tar"]
    assert [p.name for p in expand(f"{tmp_path}/*.tar")] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [p.name for p in expand(f"{tmp_path}/0000[12].tar")] == ["00001.tar", "00002.tar"]


def test_a_folder_means_its_tars_and_nothing_else(tmp_path):
    make(tmp_path, "b.tar", "a.tar.gz", "c.tgz")
    (tmp_path / "b.parquet").write_bytes(b"")
    (tmp_path / "b_stats.json").write_text("{}")
    (tmp_path / "d.tar").mkdir()
    assert [p.name for p in expand(str(tmp_path))] == ["a.tar.gz", "b.tar", "c.tgz"]


def test_sources_join_by_double_colon_or_as_a_list_and_repeats_stay(tmp_path):
    make(tmp_path, "a.tar", "b.tar")
    joined = expand(f"{tmp_path}/b.tar::{tmp_path}/a.tar:: {tmp_path}/b.tar")
    assert [p.name for p in joined] == ["b.tar", "a.tar", "b.tar"]
    assert expand([f"{tmp_path}/b.tar", f"{tmp_path}/a.tar::{tmp_path}/b.tar"]) == joined


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", ["--val-data is empty"]),
        ("::", ["--val-data is empty"]),
        ("{dir}/{{00000..00003}}.tar", ["2 of 4 shards do not exist", "00002.tar", "shorten"]),
        ("{dir}/{{7..9}}.tar", ["0 existing shards", "first tried", "7.tar", "Quote the pattern"]),
        ("{dir}/none/{{0..1}}.tar", ["0 existing shards", "no folder", "none"]),
        ("{dir}/x*.tar", ["0 existing shards"]),
        ("{dir}/empty", ["a folder without .tar"]),
        ("{dir}/{{00000..00001.tar", ["unbalanced braces"]),
        ("pipe:cat a.tar", ["only files are read"]),
        ("s3://bucket/a.tar", ["only files are read"]),
    ],
)
def test_what_names_no_shard_is_told_with_the_flag_and_what_was_tried(tmp_path, pattern, words):
    make(tmp_path, "00000.tar", "00001.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        expand(pattern.format(dir=tmp_path), "--val-data")
    for word in ["--val-data", *words]:
        assert word in str(caught.value)


# --- grouping ------------------------------------------------------------------------------------


def test_tar_and_gzipped_tar_give_the_same_samples_whatever_their_name(tmp_path):
    plain = write_shard(tmp_path / "a.tar", BODY)
    packed = write_shard(tmp_path / "a.tar.gz", BODY)
    misnamed = tmp_path / "c.tar"
    misnamed.write_bytes(packed.read_bytes())
    assert contents(plain) == contents(packed) == contents(misnamed)
    assert contents(plain) == [(f"{i:09d}", body) for i, body in enumerate(BODY)]


def test_samples_know_their_shard_and_place(tmp_path):
    path = write_shard(tmp_path / "00003.tar", BODY)
    samples = list(iterate_samples(path))
    assert [s.ordinal for s in samples] == [0, 1, 2]
    assert samples[1].label == "00003.tar:1 (key 000000001)"
    assert samples[1].shard == path


def test_the_last_and_first_sample_of_two_shards_with_one_key_stay_two(tmp_path):
    write_shard(tmp_path / "a.tar", [{"jpg": b"1"}], ["same"])
    write_shard(tmp_path / "b.tar", [{"txt": b"2"}], ["same"])
    found = [s for path in expand(str(tmp_path)) for s in iterate_samples(path)]
    assert [dict(s.parts) for s in found] == [{"jpg": b"1"}, {"txt": b"2"}]


def test_a_suffix_that_comes_again_starts_a_new_sample(tmp_path):
    path = write_shard(tmp_path / "a.tar", [{"jpg": b"1", "txt": b"a"}, {"JPG": b"2"}], ["k", "k"])
    assert contents(path) == [("k", {"jpg": b"1", "txt": b"a"}), ("k", {"jpg": b"2"})]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("000.jpg", ("000", "jpg")),
        ("a.b/000.seg.PNG", ("a.b/000", "seg.png")),
        ("./000.json", ("./000", "json")),
        ("000", None),
        (".jpg", None),
        ("folder.d/000", None),
        ("000.", None),
    ],
)
def test_a_member_splits_at_the_first_dot_of_its_last_part(name, expected):
    assert split_member(name) == expected


def odd_shard(path: Path) -> Path:
    """Write samples with a folder, a link, a name without suffix and a hidden file between them."""
    with tarfile.open(path, "w") as tar:

        def add(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), "d/0.txt"
            tar.addfile(member, io.BytesIO(content))

        add("d", kind=tarfile.DIRTYPE)
        add("d/0.jpg", b"0")
        add("d/README", b"no suffix")
        add("d/._0.jpg", b"a Mac's")
        add("d/0.txt", b"zero")
        add("d/1.jpg", kind=tarfile.SYMTYPE)
        add("d/1.txt", b"one")
    return path


def test_what_is_no_part_of_a_sample_is_passed_over_and_counted_once(tmp_path, caplog):
    path = odd_shard(tmp_path / "a.tar")
    with caplog.at_level(logging.WARNING):
        assert contents(path) == [("d/0", {"jpg": b"0", "txt": b"zero"}), ("d/1", {"txt": b"one"})]
    assert [r.message for r in caplog.records] == [
        f"{path}: 3 members are no part of a sample, first: d/README"
    ]


def test_an_empty_archive_has_no_sample(tmp_path):
    assert contents(write_shard(tmp_path / "a.tar", [])) == []


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_healthy_shard_groups_as_webdataset_groups_it(tmp_path, ending):
    bodies = [*BODY, {"jpg": b"x", "seg.png": b"y", "__meta.json": b"{}"}, {"TXT": b"upper"}]
    keys = ["0", "1", "sub/0", "sub.dir/1", "./last"]
    path = write_shard(tmp_path / f"a{ending}", bodies, keys)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset and its dependencies warn as they like
        import webdataset

        theirs = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    expected = [
        (s["__key__"], {k: v for k, v in s.items() if k == "__meta.json" or k[:2] != "__"})
        for s in theirs
    ]
    assert contents(path) == expected


# --- damage --------------------------------------------------------------------------------------


def member_starts(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize("where", ["in the header", "in the member", "between members"])
def test_a_truncated_tar_gives_what_came_before_and_then_an_error(tmp_path, where):
    path = write_shard(tmp_path / "a.tar", BODY)
    second_json = member_starts(path)[5]
    cut = {"in the header": 200, "in the member": 513, "between members": 0}[where] + second_json
    path.write_bytes(path.read_bytes()[:cut])
    keys, message = read_until_damage(path)
    assert keys == ["000000000"]
    assert "a.tar" in message
    assert "after 1 whole samples" in message


@given(cut=st.integers(0, 10239))
def test_no_cut_loses_a_sample_in_silence(tmp_path_factory, cut):
    path = write_shard(tmp_path_factory.mktemp("cut") / "a.tar", BODY)
    whole = contents(path)
    path.write_bytes(path.read_bytes()[:cut])
    try:
        assert contents(path) == whole
    except ShardError:
        assert cut < 10240


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_damaged_header_in_the_middle_is_no_end(tmp_path, ending):
    plain = write_shard(tmp_path / "plain.tar", BODY)
    content = bytearray(plain.read_bytes())
    content[member_starts(plain)[3] + 150] ^= 0xFF  # a byte of the header's checksum
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(bytes(content)) if ending.endswith("gz") else bytes(content))
    keys, message = read_until_damage(path)
    assert keys == []  # the first sample might have gone on behind the damage
    assert "damaged header" in message


def test_a_tar_without_its_end_is_found_inside_gzip_too(tmp_path):
    plain = write_shard(tmp_path / "plain.tar", BODY)
    cut = member_starts(plain)[3]
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()[:cut]))
    assert "no end-of-archive mark" in read_until_damage(path)[1]


def test_damaged_gzip_is_told_truncated_flipped_or_wrong_in_its_sum(tmp_path):
    good = write_shard(tmp_path / "a.tar.gz", [{"jpg": bytes(range(256)) * 40}] * 4).read_bytes()
    path = tmp_path / "b.tar.gz"
    for damaged in (good[:-30], good[: len(good) // 2], good[:12], good[:-6] + b"\0\1\2\3\4\5"):
        path.write_bytes(damaged)
        assert "b.tar.gz is truncated or damaged" in read_until_damage(path)[1]
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    path.write_bytes(flipped)
    read_until_damage(path)


def test_what_is_no_tar_at_all_is_told(tmp_path):
    path = tmp_path / "a.tar"
    for content in (b"", b"url,caption\nx,y\n" * 100):
        path.write_bytes(content)
        assert "truncated or damaged after 0" in read_until_damage(path)[1]


def test_a_missing_shard_is_not_called_damaged(tmp_path):
    with pytest.raises(ShardError, match=r"cannot be opened \(No such file"):
        list(iterate_samples(tmp_path / "gone.tar"))


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_joined_archives_are_read_to_the_first_end_with_a_warning(tmp_path, caplog, ending):
    one = write_shard(tmp_path / f"one{ending}", BODY[:1], ["one"])
    two = write_shard(tmp_path / f"two{ending}", BODY[:1], ["two"])
    path = tmp_path / f"joined{ending}"
    path.write_bytes(one.read_bytes() + two.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert [key for key, _ in contents(path)] == ["one"]
    assert "goes on after its end" in caplog.text


# --- parts ---------------------------------------------------------------------------------------


def sample_of(**parts: bytes) -> Sample:
    return Sample("k7", parts, Path("x/00003.tar"), 7)


def test_json_is_an_object_or_an_error_that_names_the_sample():
    assert read_json_part(sample_of(txt=b"x")) == {}
    assert read_json_part(sample_of(json=b'{"a": 1}')) == {"a": 1}
    for bad in (b"[1]", b"{", b"\xff\xfe{}x"):
        with pytest.raises(ShardError, match=r"00003\.tar:7 \(key k7\): its json"):
            read_json_part(sample_of(json=bad))


def test_the_picture_is_found_by_its_suffix():
    assert image_part(sample_of(txt=b"t", png=b"p", jpg=b"j")) == b"j"
    assert image_part(sample_of(webp=b"w")) == b"w"
    assert image_part(Sample("k", {"seg.png": b"s"}, Path("a.tar"), 0)) is None


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"json": b'{"class_index": 12}'}, 12),
        ({"cls": b"3\n"}, 3),
        ({"cls": b"3", "json": b'{"caption": "x"}'}, 3),
        ({"cls": b"3", "json": b'{"class_index": 3}'}, 3),
        ({"json": b'{"class_index": null}'}, None),
        ({"txt": b"a cat"}, None),
    ],
)
def test_the_class_comes_from_json_or_cls(parts, expected):
    assert class_index_of(sample_of(**parts)) == expected


@pytest.mark.parametrize(
    "parts",
    [
        {"json": b'{"class_index": "12"}'},
        {"json": b'{"class_index": true}'},
        {"json": b'{"class_index": 1.5}'},
        {"json": b'{"class_index": -1}'},
        {"json": b'{"class_index": '},
        {"cls": b"cat"},
        {"cls": b"-1"},
        {"cls": b""},
        {"cls": "²".encode()},
        {"cls": b"4", "json": b'{"class_index": 3}'},
    ],
)
def test_a_class_that_cannot_be_read_names_the_sample(parts):
    with pytest.raises(ShardError, match=r"00003\.tar:7 \(key k7\)"):
        class_index_of(sample_of(**parts))


def test_made_caption_shards_carry_classes_and_boxes(tmp_path):
    paths = expand(caption_shards(tmp_path, shards=2, per_shard=4))
    samples = [s for path in paths for s in iterate_samples(path)]
    assert [class_index_of(s) for s in samples] == [0, 1] * 4
    assert all(len(read_json_part(s)["box"]) == 4 for s in samples)
    assert len({s.key for s in samples}) == 8


@pytest.mark.data
def test_real_shards_hold_what_they_say(shared_data):
    paths = expand(str(shared_data / "tiny-imagenet" / "val" / "{00000..00001}.tar.gz"))
    samples = [s for path in paths for s in iterate_samples(path)]
    assert len(samples) == 5000
    counts = [0] * 200
    for sample in samples:
        index = class_index_of(sample)
        assert index == json.loads(sample.parts["json"])["class_index"]
        counts[index] += 1
    assert counts == [25] * 200


def test_a_table_given_as_shards_is_called_one(tmp_path):
    table = tmp_path / "train.csv"
    table.write_text("filepath\ttitle\na.jpg\ta cat\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"train.csv looks like a table, and only tar shards"):
        expand(str(table))
