"""From a pattern to a manifest: what is found, counted, said, kept and refused."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lazyclip.base.errors import UserError
from tests.toy import caption_shards, write_shard
from training.data import locate
from training.data import manifest as manifests
from training.data.locate import find, read_factors
from training.data.manifest import load, report, save, verify
from training.data.prepare import Wanted, prepare
from training.data.records import group
from training.data.survey import How, survey_all
from training.data.tar import members_in, memory
from training.distributed import Place
from training.params import TrainArgs
from training.preflight import check_data

PAIR = {"jpg": b"picture", "txt": b"caption"}


def prepared(pattern, tmp_path, chunk=4, **more):
    how = How(chunk=chunk, window=2048, processes=more.pop("processes", 1))
    return prepare(Wanted(str(pattern), tmp_path / "fallback", how=how, **more))


def kinds(manifest) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in manifest.findings:
        found.setdefault(finding.kind, []).append(finding.shard)
    return found


def ordinals(done) -> list[tuple[str, int, str]]:
    """Read every chunk by its span and list shard, ordinal and key of the records that count."""
    found = []
    for chunk in range(len(done.manifest.starts)):
        span = done.manifest.span(chunk)
        content = done.shards[span.shard].path.read_bytes()
        part = content[span.offset : span.offset + span.length]
        records = list(
            group(members_in(memory(part), len(part), memoryview(part)), first=span.ordinal)
        )
        assert len(records) == span.records
        for place in done.manifest.kept(chunk):
            record = records[place]
            found.append((done.manifest.names[span.shard], record.ordinal, record.key))
    return found


def test_chunks_hold_every_record_once_and_their_bytes_stand_alone(tmp_path):
    done = prepared(caption_shards(tmp_path / "s", shards=3, per_shard=10), tmp_path)
    expected = [(f"{s:05d}.tar", i, f"{s:05d}{i:04d}") for s in range(3) for i in range(10)]
    assert ordinals(done) == expected
    assert done.manifest.counts.tolist() == [4, 4, 2] * 3
    assert done.manifest.samples == 30
    assert done.file.parent == tmp_path / "s"
    assert done.manifest.findings == ()


def test_incomplete_records_keep_their_ordinal_and_do_not_count(tmp_path):
    samples = [PAIR, {"txt": b"a"}, PAIR, {"jpg": b"b"}, PAIR, PAIR]
    write_shard(tmp_path / "s" / "0.tar", samples)
    done = prepared(tmp_path / "s", tmp_path)
    assert [ordinal for _, ordinal, _ in ordinals(done)] == [0, 2, 4, 5]
    assert done.manifest.counts.tolist() == [2, 2]
    assert kinds(done.manifest) == {"incomplete samples": ["0.tar"]}
    assert "2 of 6" in "\n".join(report(done.manifest))


def test_keys_may_repeat_across_and_within_shards(tmp_path):
    write_shard(tmp_path / "s" / "0.tar", [PAIR] * 3, ["1", "1", "2"])
    write_shard(tmp_path / "s" / "1.tar", [PAIR] * 2, ["2", "1"])
    done = prepared(tmp_path / "s", tmp_path)
    assert [key for _, _, key in ordinals(done)] == ["1", "1", "2", "2", "1"]
    assert kinds(done.manifest) == {"repeated keys": ["0.tar"]}


def test_a_truncated_shard_gives_its_whole_samples_or_is_refused(tmp_path):
    pattern = caption_shards(tmp_path / "s", shards=2, per_shard=10)
    shard = tmp_path / "s" / "00001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(UserError, match=r"1 shards are not whole, first 00001.tar \(truncated"):
        prepared(pattern, tmp_path, strict=True)
    done = prepared(pattern, tmp_path)
    whole = done.manifest.samples - 10
    assert 4 <= whole <= 7
    assert len(ordinals(done)) == 10 + whole
    assert f"{whole} whole samples before it" in "\n".join(report(done.manifest))


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 700, 1024, 1400])
def test_a_cut_anywhere_still_gives_chunks_that_can_be_read(tmp_path, cut):
    shard = write_shard(tmp_path / "s" / "0.tar", [PAIR] * 6)
    content = shard.read_bytes()
    shard.write_bytes(content[: 4 * 2048 + cut])
    done = prepared(tmp_path / "s", tmp_path)
    assert [ordinal for _, ordinal, _ in ordinals(done)] == [0, 1, 2, 3]
    assert kinds(done.manifest) == {"truncated": ["0.tar"]}


def test_a_cut_in_the_last_members_padding_loses_nothing(tmp_path):
    shard = write_shard(tmp_path / "s" / "0.tar", [PAIR] * 5)
    shard.write_bytes(shard.read_bytes()[: 5 * 2048 - 100])
    done = prepared(tmp_path / "s", tmp_path)
    assert len(ordinals(done)) == 5
    assert int(done.manifest.ends[0]) == 5 * 2048 - 100


def test_everything_odd_is_said_with_its_remedy(tmp_path):
    folder = tmp_path / "s"
    write_shard(folder / "00000.tar", [PAIR] * 3)
    (folder / "00001.tar").write_bytes(b"")
    (folder / "00002.tar").write_bytes(b"no tar at all, " * 100)
    parts = [{"jpg": b"a"}] * 3 + [{"txt": b"b"}] * 3
    write_shard(folder / "00004.tar", parts, ["1", "2", "3"] * 2)
    write_shard(folder / "00005.tar", [{"jpg": b"a", "json": b"{}"}] * 2)
    write_shard(folder / "00006.tar", [{"txt": b"a"}] * 2)
    whole = write_shard(folder / "00007.tar", [PAIR] * 2)
    whole.write_bytes(whole.read_bytes() + whole.read_bytes())
    write_shard(folder / "00008.tar", [])
    done = prepared(folder / "{00000..00009}.tar", tmp_path)
    assert kinds(done.manifest) == {
        "missing": [str(folder / "00003.tar"), str(folder / "00009.tar")],
        "empty file": ["00001.tar"],
        "damaged": ["00002.tar"],
        "no samples": ["00002.tar", "00008.tar"],
        "interleaved keys": ["00004.tar"],
        "no captions": ["00005.tar"],
        "no pictures": ["00006.tar"],
        "goes on after its end": ["00007.tar"],
        "gap": ["s"],
    }
    assert done.manifest.samples == 5
    lines = report(done.manifest)
    assert "jpg in 10, txt in 10, json in 2 of 15 records" in lines[1]
    for kind in kinds(done.manifest):
        line = next(line for line in lines if line.startswith(f"{kind}: "))
        assert manifests.REMEDIES[kind] in line
        assert "\n" not in line


def test_sidecars_are_compared(tmp_path):
    folder = tmp_path / "s"
    for number, successes in enumerate((3, 4, None)):
        write_shard(folder / f"0000{number}.tar", [PAIR] * 3)
        if successes:
            text = json.dumps({"count": 9, "successes": successes})
            (folder / f"0000{number}_stats.json").write_text(text)
    write_shard(folder / "00003.tar", [PAIR])
    (folder / "00003_stats.json").write_text("{")
    found = kinds(prepared(folder, tmp_path).manifest)
    assert found["statistics differ"] == ["00001.tar", "00003.tar"]
    assert found["unfinished download"] == ["00002.tar"]


def test_parquet_files_are_compared_or_it_is_said_that_they_are_not(tmp_path, monkeypatch):
    import pandas

    write_shard(tmp_path / "s" / "00000.tar", [PAIR] * 3)
    (tmp_path / "s" / "00000.parquet").write_bytes(b"any")
    rows = pandas.DataFrame({"status": ["success"] * 4 + ["failed"]})
    monkeypatch.setattr(pandas, "read_parquet", lambda *args, **kwargs: rows)
    found = prepared(tmp_path / "s", tmp_path).manifest.findings
    assert [(f.kind, f.detail) for f in found] == [
        ("parquet differs", "3 samples, 00000.parquet says 4")
    ]

    def no_engine(*args, **kwargs):
        raise ImportError("no engine")

    monkeypatch.setattr(pandas, "read_parquet", no_engine)
    found = prepared(tmp_path / "s", tmp_path, rebuild=True).manifest.findings
    assert [f.kind for f in found] == ["parquet not checked"]


def test_no_sample_at_all_is_refused_with_the_members_seen(tmp_path):
    write_shard(tmp_path / "s" / "0.tar", [{"jpg": b"a", "json": b"{}"}] * 2)
    with pytest.raises(UserError, match=r"no captions.*jpg in 2, json in 2 of 2 records"):
        prepared(tmp_path / "s", tmp_path)
    assert sorted(p.name for p in (tmp_path / "s").iterdir() if p.suffix == ".npz") == []


def test_a_kept_manifest_is_taken_and_its_hash_holds(tmp_path, monkeypatch):
    pattern = caption_shards(tmp_path / "s", shards=2, per_shard=5)
    first = prepared(pattern, tmp_path)
    monkeypatch.setattr("training.data.prepare.build", None)  # it would be called
    again = prepared(pattern, tmp_path)
    assert again.file == first.file
    assert again.manifest.sha256 == first.manifest.sha256
    assert ordinals(again) == ordinals(first)
    assert not [p for p in (tmp_path / "s").iterdir() if "part" in p.name]


def test_the_hash_does_not_depend_on_the_folder_and_does_on_the_content(tmp_path):
    pattern = caption_shards(tmp_path / "s", shards=2, per_shard=5)
    plain = prepared(pattern, tmp_path).manifest.sha256
    shutil.copytree(tmp_path / "s", tmp_path / "moved", ignore=shutil.ignore_patterns("*.npz"))
    assert prepared(pattern.replace("/s/", "/moved/"), tmp_path).manifest.sha256 == plain
    assert prepared(pattern, tmp_path, chunk=5, file=tmp_path / "a.npz").manifest.sha256 != plain
    assert prepared(pattern, tmp_path, factors="2").manifest.sha256 != plain
    write_shard(tmp_path / "moved" / "00001.tar", [PAIR] * 5)
    moved = prepared(pattern.replace("/s/", "/moved/"), tmp_path, rebuild=True).manifest.sha256
    assert moved != plain


def test_a_manifest_that_does_not_fit_the_disk_is_refused(tmp_path):
    pattern = caption_shards(tmp_path / "s", shards=2, per_shard=5)
    done = prepared(pattern, tmp_path)
    verify(done.manifest, done.shards)
    shard = done.shards[1].path
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    with pytest.raises(UserError, match=r"1 shards are not what.*00001.tar: \d+ bytes, was"):
        prepared(pattern, tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"00001.tar: missing"):
        verify(done.manifest, done.shards)
    with pytest.raises(UserError, match=r"2 shards, the pattern names 1; first difference: 00001"):
        verify(done.manifest, done.shards[:1])


def test_a_manifest_of_other_factors_is_refused(tmp_path):
    pattern = caption_shards(tmp_path / "s", shards=2, per_shard=5)
    prepared(pattern, tmp_path, file=tmp_path / "m.npz")
    with pytest.raises(UserError, match="other upsampling factors"):
        prepared(pattern, tmp_path, file=tmp_path / "m.npz", factors="2")


def test_a_damaged_manifest_is_refused(tmp_path):
    done = prepared(caption_shards(tmp_path / "s", shards=2, per_shard=5), tmp_path)
    content = done.file.read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:-40])
    with pytest.raises(UserError, match="is damaged or none"):
        load(tmp_path / "cut.npz")
    (tmp_path / "text.npz").write_text("none")
    with pytest.raises(UserError, match="is damaged or none"):
        load(tmp_path / "text.npz")
    about = dict(np.load(done.file))
    about["starts"] = about["starts"] + 1
    np.savez(tmp_path / "other.npz", **about)
    with pytest.raises(UserError, match="does not fit its own hash"):
        load(tmp_path / "other.npz")
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nothing.npz")


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    done = prepared(caption_shards(tmp_path / "s", shards=2, per_shard=5), tmp_path)
    before = done.file.read_bytes()

    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        save(done.manifest, done.file)
    assert done.file.read_bytes() == before
    assert not list(done.file.parent.glob("*.part"))


def test_an_interrupted_survey_goes_on(tmp_path, monkeypatch):
    shards, _ = find(caption_shards(tmp_path / "s", shards=4, per_shard=3))
    how = How(chunk=2)
    expected = survey_all(shards[:3], how, tmp_path / "parts")
    walked = []
    from training.data import survey

    real = survey.walk
    monkeypatch.setattr(
        survey, "walk", lambda shard, how: walked.append(shard.name) or real(shard, how)
    )
    assert survey_all(shards, how, tmp_path / "parts")[:3] == expected
    assert walked == ["00003.tar"]
    half = next((tmp_path / "parts").glob("00000-*"))
    half.write_text(half.read_text()[:50])
    write_shard(shards[1].path, [PAIR] * 7)
    assert [s.records for s in survey_all(shards, how, tmp_path / "parts")] == [3, 7, 3, 3]
    assert walked == ["00003.tar", "00000.tar", "00001.tar"]


@pytest.mark.dist
def test_processes_give_what_one_process_gives(tmp_path):
    pattern = caption_shards(tmp_path / "s", shards=9, per_shard=3)
    filters = ("class_index==1",)
    one = prepared(pattern, tmp_path, filters=filters)
    two = prepared(pattern, tmp_path, filters=filters, processes=2, file=tmp_path / "two.npz")
    assert one.manifest.sha256 == two.manifest.sha256


def test_sources_lists_gaps_and_factors(tmp_path):
    for name in ("a/00000.tar", "a/00002.tar", "b/00000.tar", "b/00001.tar"):
        write_shard(tmp_path / name, [PAIR])
    shards, missing = find(f"{tmp_path}/a/{{00000..00003}}.tar::{tmp_path}/b", "3::2")
    assert [(s.name, s.factor) for s in shards] == [
        ("a/00000.tar", 3), ("a/00002.tar", 3), ("b/00000.tar", 2), ("b/00001.tar", 2),
    ]  # fmt: skip
    assert [path.name for path in missing] == ["00001.tar", "00003.tar"]
    listed = tmp_path / "shards.txt"
    listed.write_text(f"# mine\na/00000.tar\n\nb/{{00000..00002}}.tar\n{tmp_path}/a/00002.tar\n")
    shards, missing = find(str(listed))
    assert [s.name for s in shards] == ["a/00000.tar", "b/00000.tar", "b/00001.tar", "a/00002.tar"]
    assert [path.name for path in missing] == ["00002.tar"]
    twice, _ = find(f"{tmp_path}/a::{tmp_path}/a/*.tar::{tmp_path}/b/00001.tar")
    assert [(s.name, s.factor) for s in twice] == [
        ("00000.tar", 2),
        ("00002.tar", 2),
        ("00001.tar", 1),
    ]


def test_a_factor_counts_in_the_samples_of_a_pass(tmp_path):
    write_shard(tmp_path / "a" / "0.tar", [PAIR] * 5)
    write_shard(tmp_path / "b" / "1.tar", [PAIR] * 3)
    done = prepared(f"{tmp_path}/a::{tmp_path}/b", tmp_path, factors="1::4")
    assert done.manifest.samples == 5 + 12
    assert done.manifest.chunk_factors.tolist() == [1, 1, 4]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda p: find(f"{p}/none.tar"), "names 0 existing shards"),
        (lambda p: find(f"{p}/{{0..3}}.tar"), "names 0 existing shards"),
        (lambda p: find(f"{p}/{{0..3.tar"), "unbalanced braces"),
        (lambda p: find("pipe:cat x.tar"), "only files are read"),
        (lambda p: find("https://host/x.tar"), "only files are read"),
        (lambda p: find(""), "is empty"),
        (lambda p: find(f"{p}/list.txt"), "none of the 2 shards it lists exists"),
        (lambda p: read_factors("1::2", 3), "2 factors for 3 sources"),
        (lambda p: read_factors("1::0.5", 2), "'0.5' is no whole number.*--loader sequential"),
        (lambda p: read_factors("0", 1), "'0' is no whole number"),
    ],
)
def test_patterns_and_factors_that_mean_nothing_are_refused(tmp_path, call, text):
    (tmp_path / "list.txt").write_text("a.tar\nb.tar\n")
    with pytest.raises(UserError, match=text):
        call(tmp_path)


def test_gzipped_shards_are_unpacked_once_and_said_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for number in range(2):
        write_shard(tmp_path / "s" / f"0000{number}.tar.gz", [PAIR] * 5)
    write_shard(tmp_path / "s" / "00002.tar", [PAIR] * 5)
    done = prepared(tmp_path / "s", tmp_path)
    assert len(ordinals(done)) == 15
    assert done.manifest.names == ("00000.tar.gz", "00001.tar.gz", "00002.tar")
    said = [r.getMessage() for r in caplog.records if "unpacking" in r.getMessage()]
    assert len(said) == 1
    assert "2 gzipped shards" in said[0]
    copies = sorted((tmp_path / "s" / "unpacked").iterdir())
    times = [copy.stat().st_mtime_ns for copy in copies]
    assert len(copies) == 2
    caplog.clear()
    assert prepared(tmp_path / "s", tmp_path).manifest.sha256 == done.manifest.sha256
    assert [copy.stat().st_mtime_ns for copy in copies] == times
    assert not [r for r in caplog.records if "unpacking" in r.getMessage()]


def test_a_gzipped_shard_that_is_cut_gives_what_could_be_unpacked(tmp_path):
    draw = np.random.default_rng(0)
    samples = [{"jpg": draw.bytes(3000), "txt": b"a"} for _ in range(8)]
    shard = write_shard(tmp_path / "s" / "0.tar.gz", samples)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    done = prepared(tmp_path / "s", tmp_path)
    assert 1 <= done.manifest.samples < 8
    assert "truncated" in kinds(done.manifest)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_read_only_folder_is_not_written(tmp_path, indexed):
    shard = write_shard(tmp_path / "s" / "0.tar.gz", [PAIR] * 3)
    if indexed:
        prepared(shard.parent, tmp_path)
        shutil.rmtree(shard.parent / "unpacked")
    before = sorted(shard.parent.iterdir())
    shard.parent.chmod(0o555)
    try:
        done = prepared(shard.parent, tmp_path)
    finally:
        shard.parent.chmod(0o755)
    assert sorted(shard.parent.iterdir()) == before
    assert done.file.parent == (shard.parent if indexed else tmp_path / "fallback")
    assert done.shards[0].path.parent == tmp_path / "fallback" / "unpacked"


def test_filters_over_an_index_in_a_read_only_folder_are_kept_elsewhere(tmp_path):
    pattern = caption_shards(tmp_path / "s", shards=1, per_shard=6)
    prepared(pattern, tmp_path)
    before = sorted((tmp_path / "s").iterdir())
    (tmp_path / "s").chmod(0o555)
    try:
        done = prepared(pattern, tmp_path, filters=("class_index>=1",))
        again = prepared(pattern, tmp_path, filters=("class_index>=1",))
    finally:
        (tmp_path / "s").chmod(0o755)
    assert sorted((tmp_path / "s").iterdir()) == before
    assert done.file.parent == tmp_path / "fallback"
    assert again.manifest.sha256 == done.manifest.sha256


def test_a_folder_that_cannot_be_written_gets_its_manifest_elsewhere(tmp_path, monkeypatch):
    pattern = caption_shards(tmp_path / "s", shards=1, per_shard=3)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "s")
    done = prepared(pattern, tmp_path)
    assert done.file.parent == tmp_path / "fallback"
    assert done.file.exists()


@pytest.mark.data
def test_real_shards_give_what_their_statistics_say(shared_data, tmp_path):
    done = prepared(shared_data / "pairs", tmp_path, chunk=16, file=tmp_path / "m.npz")
    assert done.manifest.samples == 165
    assert set(kinds(done.manifest)) <= {"parquet not checked"}
    assert len(ordinals(done)) == 165


def test_one_file_under_two_spellings_is_one_shard(tmp_path):
    folder = tmp_path / "sh"
    folder.mkdir()
    pattern = caption_shards(folder, shards=1, per_shard=4)
    (file,) = folder.glob("*.tar")
    (tmp_path / "link.tar").symlink_to(file)
    spelt = f"{file}::{folder}/../sh/{file.name}::{tmp_path}/link.tar"
    shards, _ = find(spelt)
    assert pattern
    assert [(shard.path, shard.factor) for shard in shards] == [(file, 3)]


def test_each_shard_is_looked_into_once_at_a_start(tmp_path, monkeypatch):
    pattern = caption_shards(tmp_path / "s", shards=3, per_shard=4)
    looks, real = [], locate.is_gzip
    monkeypatch.setattr(locate, "is_gzip", lambda path: looks.append(path.name) or real(path))
    args = TrainArgs(train_data=pattern, batch_size=4)
    place = Place(0, 1, 0, torch.device("cpu"))
    for _ in range(2):
        looks.clear()
        check_data(args, place)
        assert sorted(looks) == ["00000.tar", "00001.tar", "00002.tar"]
