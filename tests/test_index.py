"""The command that indexes shards: what it prints, and what it refuses."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import pytest

from lazyclip import cli
from tests.toy import caption_sample, caption_shards, write_shard
from tests.toy_run import CLASSES, TINY, _logging_put_back, train
from training.index import main


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def index(*words: object) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with _logging_put_back(), streams[0], streams[1]:
        code = main([str(word) for word in words])
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture
def data(tmp_path) -> Path:
    caption_shards(tmp_path / "d", shards=3, per_shard=8, classes=CLASSES)
    return tmp_path / "d"


def test_it_says_what_the_shards_hold_and_training_takes_it_up(tmp_path, data):
    done = index(data, "--processes", 1)
    assert done.code == 0, done.err
    first, members, file, command = done.out.splitlines()
    assert first.startswith("3 shards, 0.00 GiB, 24 samples in a pass, 3 chunks of 64, manifest ")
    assert members == "members: jpg in 24, txt in 24, json in 24 of 24 records"
    (kept,) = data.glob("manifest-*.npz")
    assert file.startswith(f"{kept}: {kept.stat().st_size:,} bytes, ")
    assert command == f"train with: --train-data '{data}'"
    before = kept.stat().st_mtime_ns
    ran = train(tmp_path, train_data=data, model=TINY)
    assert ran.code == 0
    assert "surveyed" not in ran.err
    assert first in ran.err
    assert kept.stat().st_mtime_ns == before


def test_findings_come_one_line_a_kind_with_the_remedy(data):
    (data / "00001.tar").write_bytes((data / "00001.tar").read_bytes()[:9000])
    (data / "00002.tar").write_bytes(b"")
    caption = {"txt": b"no picture"}
    write_shard(data / "00004.tar", [caption, caption_sample(1, CLASSES), caption])
    done = index(f"{data}/{{00000..00005}}.tar")
    assert done.code == 0, done.err
    found = {line.split(":")[0]: line for line in done.out.splitlines()[2:-2]}
    assert set(found) == {"missing", "truncated", "empty file", "incomplete samples", "gap"}
    assert all("; " in line for line in found.values())
    assert "2 of 3" in found["incomplete samples"]
    assert "fetch the shard again" in found["truncated"]


def test_strictly_a_shard_that_is_not_whole_is_refused(data):
    (data / "00002.tar").write_bytes(b"")
    done = index(data, "--strict")
    assert done.code == 2
    assert "1 shards are not whole, first 00002.tar (empty file" in done.err.splitlines()[-1]


@pytest.mark.parametrize("named", [False, True])
def test_strictly_an_index_that_is_there_is_refused_too(tmp_path, data, named):
    (data / "00002.tar").write_bytes(b"")
    words = [data, *(["--manifest", tmp_path / "m.npz"] if named else [])]
    assert index(*words).code == 0
    done = index(*words, "--strict")
    assert done.code == 2
    assert done.out == ""
    assert "1 shards are not whole, first 00002.tar (empty file);" in done.err.splitlines()[-1]


def test_strictly_a_missing_shard_is_refused_by_the_pattern_as_it_stands(data):
    short, long = f"{data}/{{00000..00002}}.tar", f"{data}/{{00000..00003}}.tar"
    assert index(short).code == 0
    done = index(long, "--strict")
    assert done.code == 2
    assert f"first {data}/00003.tar (missing); fetch the shard" in done.err.splitlines()[-1]
    assert index(long, "--rebuild").code == 0
    assert index(short, "--strict").code == 0


def test_the_file_may_be_named_and_filters_make_one_of_their_own(tmp_path, data):
    file = tmp_path / "elsewhere" / "m.npz"
    done = index(data, "--manifest", file, "--filter", "class_index>=1")
    assert done.code == 0, done.err
    assert " 16 samples in a pass" in done.out
    assert "filtered: " in done.out
    assert f"--manifest '{file}'" in done.out
    assert len(list(file.parent.glob("m*.npz"))) == 2
    ran = train(tmp_path, train_data=data, model=TINY, manifest=file, filter="class_index>=1",
                audit="ids")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "data: 16 samples in an epoch" in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none/{0..3}.tar"], "none"),
        (["--processes", "0"], "--processes 0 is too small; use 1 or more"),
        (["--chunk", "0"], "--chunk 0 is too small"),
        (["--filter", "similarity"], "similarity"),
        (["--train-data-upsampling-factors", "1::2"], "2 factors for 1 sources"),
    ],
)
def test_mistakes_are_one_line(data, words, said):
    done = index(*(words if words[0].startswith("none") else [data, *words]))
    assert done.code == 2
    assert done.out == ""
    assert said in done.err.splitlines()[-1]


def test_the_library_command_knows_both(data, capsys):
    with pytest.raises(SystemExit) as ended, _logging_put_back():
        cli.main(["index", str(data)])
    assert ended.value.code == 0
    assert "24 samples in a pass" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", str(data), str(data)])
    assert ended.value.code == 2
