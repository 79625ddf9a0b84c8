"""Ranks take the index over from rank 0: one of each machine looks, none of them twice."""

import json
import os
from pathlib import Path

import pytest
import torch

from lazyclip.base.errors import UserError
from tests.toy import caption_shards, write_shard
from training.data.prepare import Wanted, prepare, take_over, told
from training.data.survey import How
from training.distributed import Place
from training.indexed import _prepared

PAIR = {"jpg": b"picture", "txt": b"caption"}


def test_another_rank_takes_over_what_the_first_found_and_opens_no_shard(tmp_path, monkeypatch):
    caption_shards(tmp_path / "s", shards=2, per_shard=5)
    write_shard(tmp_path / "s" / "00002.tar.gz", [PAIR] * 5)
    wanted = Wanted(str(tmp_path / "s"), tmp_path, "3", how=How(chunk=4))
    first = prepare(wanted)
    found = json.loads(json.dumps(told(first)))
    monkeypatch.setattr("training.data.locate.is_gzip", None)  # it would be called
    monkeypatch.setattr("training.data.prepare.find", None)
    for leads in (False, True):
        taken = take_over(wanted, found, first=leads)
        assert taken.shards == first.shards
        assert taken.manifest.sha256 == first.manifest.sha256
        assert taken.file == first.file
    first.shards[0].path.write_bytes(b"")
    take_over(wanted, found, first=False)
    with pytest.raises(UserError, match="1 shards are not what the manifest says"):
        take_over(wanted, found, first=True)
    with pytest.raises(UserError, match=r"is another one on .* than on rank 0's machine"):
        take_over(wanted, {**found, "sha256": "0" * 64}, first=False)


def test_a_machine_with_a_disk_of_its_own_indexes_its_own_shards(tmp_path):
    caption_shards(tmp_path / "s", shards=2, per_shard=5)
    wanted = Wanted(str(tmp_path / "s"), tmp_path)
    found = told(prepare(wanted))
    Path(found["file"]).unlink()
    assert take_over(wanted, found, first=True).manifest.sha256 == found["sha256"]
    assert Path(found["file"]).exists()


def late(monkeypatch, file: Path, looks: int) -> list[Path]:
    """Hide a file from `exists` until its folder was listed so many times; returns the folders."""
    listed: list[Path] = []
    exists, listdir = Path.exists, os.listdir
    monkeypatch.setattr(
        Path, "exists", lambda path: exists(path) and (path != file or len(listed) >= looks)
    )
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(Path(path)) or listdir(path))
    monkeypatch.setattr("training.data.prepare.APPEARS", (0.0,) * 4)
    return listed


def test_a_manifest_that_a_network_disk_shows_late_is_waited_for(tmp_path, monkeypatch):
    caption_shards(tmp_path / "s", shards=2, per_shard=5)
    wanted = Wanted(str(tmp_path / "s"), tmp_path)
    found = told(prepare(wanted))
    listed = late(monkeypatch, Path(found["file"]), looks=4)
    monkeypatch.setattr("training.data.prepare.prepare", None)  # it would be called
    assert take_over(wanted, found, first=True).manifest.sha256 == found["sha256"]
    assert set(listed) == {tmp_path / "s"}


def test_a_rank_that_is_not_the_first_of_its_machine_indexes_nothing(tmp_path, monkeypatch):
    caption_shards(tmp_path / "s", shards=2, per_shard=5)
    wanted = Wanted(str(tmp_path / "s"), tmp_path)
    found = {**told(prepare(wanted)), "file": str(tmp_path / "gone" / "away" / "m.npz")}
    listed = late(monkeypatch, Path(found["file"]), looks=0)
    monkeypatch.setattr("training.data.prepare.prepare", None)
    with pytest.raises(UserError, match=r"gone/away/m\.npz is not to be seen on .* --manifest"):
        take_over(wanted, found, first=False)
    assert listed == [tmp_path / "gone" / "away", tmp_path / "gone", tmp_path] * 5


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_one_rank_of_a_machine_with_its_own_disk_indexes_for_all(tmp_path, monkeypatch, rank):
    """Ranks 0 and 1 on a machine that has the index, 2 and 3 on one that keeps another file."""
    caption_shards(tmp_path / "s", shards=2, per_shard=5)
    wanted = Wanted(str(tmp_path / "s"), tmp_path)
    there = told(prepare(wanted))
    found = there if rank == 1 else {**there, "file": str(tmp_path / "elsewhere.npz")}
    calls: list[str] = []

    def others(mine, _):
        first = ("a", None, None)
        if rank < 2:
            return [first, mine]
        return [first, first, *([mine] if rank == 2 else [("b", there, None), mine])]

    monkeypatch.setattr("training.data.prepare.APPEARS", ())
    monkeypatch.setattr("training.indexed.platform.node", lambda: "ab"[rank // 2])
    monkeypatch.setattr("training.indexed.first_alone", lambda work, place: found)
    monkeypatch.setattr("training.indexed.gathered", others)
    monkeypatch.setattr(
        "training.data.prepare.prepare", lambda wanted: calls.append("whole") or prepare(wanted)
    )
    place = Place(rank, 4, rank % 2, torch.device("cpu"))
    taken = _prepared(wanted, place)
    assert (taken.manifest.sha256, str(taken.file)) == (there["sha256"], there["file"])
    assert calls == (["whole"] if rank == 2 else [])


def test_what_the_first_of_a_machine_meets_ends_all_ranks(tmp_path, monkeypatch):
    caption_shards(tmp_path / "s", shards=2, per_shard=5)
    wanted = Wanted(str(tmp_path / "s"), tmp_path)
    found = {**told(prepare(wanted)), "sha256": "0" * 64}
    monkeypatch.setattr("training.indexed.first_alone", lambda work, place: found)
    sent = []
    monkeypatch.setattr("training.indexed.gathered", lambda mine, _: sent.append(mine) or sent)
    for local in (0, 1):
        with pytest.raises(UserError, match="is another one on"):
            _prepared(wanted, Place(local + 2, 4, local, torch.device("cpu")))
    assert [mistake is None for _, _, mistake in sent] == [False, True]


def test_other_shards_on_another_machines_disk_end_all_ranks(tmp_path, monkeypatch):
    """Each machine finds shards of its own where the flags point, and one lacks a shard."""
    caption_shards(tmp_path / "a", shards=3, per_shard=5)
    caption_shards(tmp_path / "b", shards=2, per_shard=5)
    there = tmp_path / "s"
    there.symlink_to(tmp_path / "a")
    wanted = Wanted(str(there), tmp_path)
    found = told(prepare(wanted))
    there.unlink()
    there.symlink_to(tmp_path / "b")
    monkeypatch.setattr("training.data.prepare.APPEARS", ())
    monkeypatch.setattr("training.indexed.first_alone", lambda work, place: found)
    sent = []
    monkeypatch.setattr("training.indexed.gathered", lambda mine, _: sent.append(mine) or sent)
    for local in (0, 1):
        with pytest.raises(UserError, match=r"the shards on .* differ .* \(10 samples\)"):
            _prepared(wanted, Place(local + 2, 4, local, torch.device("cpu")))
