"""Shell commands as sources: run where a flag asks for it, refused everywhere else."""

import itertools
from pathlib import Path

import pytest

from lazyclip.base.errors import UserError
from lazyclip.shards import ShardError, iterate_samples
from tests.toy import caption_sample, write_shard
from tests.toy_run import CLASSES, TINY, losses, train, world
from training.data.locate import find
from training.data.pipes import output
from training.data.samples import Dropped, read_shard
from training.data.sources import open_source


def piped(folder: Path, ending: str = "tar") -> str:
    """Two shards of eight samples, as commands; each run of one is noted in `ran`."""
    for shard in range(2):
        samples = [caption_sample(8 * shard + i, CLASSES) for i in range(8)]
        write_shard(folder / f"0000{shard}.{ending}", samples)
    return f"pipe:echo x >> {folder}/ran; cat {folder}//{{00000..00001}}.{ending}"


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_run_streams_what_commands_write(tmp_path, ending):
    pattern = piped(tmp_path / "d", ending)
    how = {"loader": "sequential", "model": TINY, "train_num_samples": 16}
    ran = train(tmp_path, train_data=pattern, allow_pipe=True, **how)
    assert ran.code == 0, ran.err
    assert "2 shards" in ran.err
    files = train(tmp_path, "files", train_data=tmp_path / "d", **how)
    assert losses(ran.folder) == losses(files.folder)
    assert len((tmp_path / "d" / "ran").read_text().split()) >= 2


def test_commands_and_files_may_stand_side_by_side(tmp_path):
    pattern = f"{piped(tmp_path)}::{world()}"
    source = open_source(pattern, 48, False, 1, 0, "2::1", allow_pipe=True)
    assert len(source.shards) == 2 * 2 + 4
    assert sorted(source.commands.values()) == [
        f"echo x >> {tmp_path}/ran; cat {tmp_path}//0000{n}.tar" for n in (0, 1)
    ]
    records = [
        record
        for turn in itertools.islice(source.lane(0, 0, 1), 8)
        for record in read_shard(turn.shard, source.commands.get(turn.shard))
    ]
    assert len(records) == 2 * 16 + 32
    assert {record.label.split(":")[0] for record in records} == {f"0000{n}.tar" for n in range(4)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "goes back and forth in them; copy the shards, or stream them by --loader sequential"),
        ({"allow_pipe": True}, "--allow-pipe streams; add --loader sequential"),
        ({"loader": "sequential"}, "is a shell command, which --allow-pipe would run"),
        ({"loader": "sequential", "allow_pipe": True}, "pass --train-num-samples N"),
        ({"loader": "sequential", "allow_pipe": True, "train_num_samples": 8, "workers": 3},
         "2 shards < 1 ranks x 3 workers"),
    ],
)  # fmt: skip
def test_where_no_command_may_run_none_runs(tmp_path, changes, said):
    ran = train(tmp_path, train_data=piped(tmp_path / "d"), **changes)
    assert ran.code == 2
    assert said in ran.err
    assert not (tmp_path / "d" / "ran").exists()


def test_a_list_of_shards_smuggles_no_command_in(tmp_path):
    listed = tmp_path / "shards.txt"
    listed.write_text(piped(tmp_path) + "\n")
    with pytest.raises(UserError):
        find(str(listed))
    with pytest.raises(UserError):
        open_source(str(listed), 8, False, 1, 0, allow_pipe=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("command", "samples", "said"),
    [
        ("cat {tar}; exit 3", 8, "ended with code 3"),
        ("head -c 20000 {tar}; exit 4", None, "its command ended with code 4"),
        ("no-such-command", 0, "its command ended with code 127"),
        ("head -c 20000 {tar}", None, "is truncated or damaged after"),
    ],
)
def test_a_command_that_fails_is_told_behind_its_samples(tmp_path, command, samples, said):
    tar = write_shard(tmp_path / "0.tar", [caption_sample(i, CLASSES) for i in range(8)])
    *before, last = read_shard(Path("pipe:x"), command.format(tar=tar))
    assert isinstance(last, Dropped)
    assert said in last.detail
    assert len(before) == samples if samples is not None else len(before) < 8


def test_a_command_of_which_the_rest_is_not_wanted_is_ended(tmp_path):
    tar = write_shard(tmp_path / "0.tar", [caption_sample(i, CLASSES) for i in range(8)])
    command = f"cat {tar} {tar}; exec sleep 600"
    with output(command) as stream:
        assert next(iterate_samples(Path("x"), stream)).key == "000000000"
    with pytest.raises(ShardError, match="mend it"), output("exit 5") as stream:
        assert stream.read() == b""
