"""The digests of a run's samples: what they are of, and comparing two runs by them."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from tests.toy_run import TINY, train, world
from training.audit import FILE, compare, digest_of, main, read_audit
from training.feed import labels


def write(folder: Path, steps: dict[int, list[str]], ids: bool = True) -> Path:
    folder.mkdir()
    lines = []
    for step, named in steps.items():
        line = {"step": step, "n": len(named), "digest": digest_of(named)}
        lines.append(json.dumps({**line, "ids": sorted(named)} if ids else line) + "\n")
    (folder / FILE).write_text("".join(lines))
    return folder


def test_a_digest_is_the_sha256_of_the_sorted_lines():
    by_hand = hashlib.sha256(b"a.tar:10\na.tar:2\nb.tar:0").hexdigest()
    assert digest_of(["b.tar:0", "a.tar:2", "a.tar:10"]) == by_hand
    assert digest_of(["a.tar:2", "a.tar:10", "b.tar:0"]) == by_hand


def test_samples_are_named_by_shard_and_place():
    assert labels(torch.tensor([[1, 7], [0, 2]]), ["x/a.tar", "b.tar"]) == ["b.tar:7", "x/a.tar:2"]


@pytest.mark.parametrize("how", [True, "ids"])
def test_a_run_writes_a_line_for_every_step(tmp_path, how):
    ran = train(tmp_path, train_data=world(), model=TINY, audit=how, log_every_n_steps=3)
    found = read_audit(ran.folder)
    assert sorted(found) == [1, 2, 3, 4]
    assert all(line["n"] == 8 for line in found.values())
    assert len({line["digest"] for line in found.values()}) == 4
    keys = {"step", "n", "digest"} | ({"ids"} if how == "ids" else set())
    assert all(set(line) == keys for line in found.values())


def test_runs_of_the_same_samples_agree_on_the_steps_in_common(tmp_path, capsys):
    steps = {1: ["a:0", "a:1"], 2: ["a:2", "a:3"], 3: ["b:0", "b:1"]}
    one = write(tmp_path / "one", steps)
    two = write(tmp_path / "two", {1: ["a:1", "a:0"], 2: steps[2]}, ids=False)
    assert main([str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert "A: 3 steps, 1 to 3" in out
    assert "the same 4 samples in all 2 steps in common" in out


def test_the_first_step_that_differs_is_told_with_its_samples(tmp_path, capsys):
    one = write(tmp_path / "one", {1: ["a:0"], 2: ["a:2", "a:3"], 3: ["b:0"]})
    two = write(tmp_path / "two", {1: ["a:0"], 2: ["a:2", "a:4"], 3: ["b:1"]})
    with pytest.raises(SystemExit) as ended:
        main([str(one), str(two)])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "2 of 3 steps differ, first step 2" in out
    assert "step 2: only in A ['a:3'], only in B ['a:4']" in out


def test_runs_without_a_step_in_common_are_not_the_same(tmp_path):
    one = write(tmp_path / "one", {1: ["a:0"]})
    two = write(tmp_path / "two", {2: ["a:0"]})
    lines, same = compare(one, two)
    assert not same
    assert lines[-1] == "no step in common"


def test_files_that_prove_nothing_are_refused(tmp_path, capsys):
    good = write(tmp_path / "good", {1: ["a:0"]})
    assert main([str(good), str(tmp_path)]) == 2
    assert "does not exist; train with --audit" in capsys.readouterr().err
    assert main([str(good), str(tmp_path / "nosuch")]) == 2
    assert f"there is no run {tmp_path / 'nosuch'}; " in capsys.readouterr().err
    twice = write(tmp_path / "twice", {1: ["a:0"]})
    (twice / FILE).write_text((twice / FILE).read_text() * 2)
    assert main([str(good), str(twice)]) == 2
    assert "step 1 stands twice" in capsys.readouterr().err
    forged = write(tmp_path / "forged", {1: ["a:0"]})
    (forged / FILE).write_text((forged / FILE).read_text().replace("a:0", "a:1"))
    assert main([str(good), str(forged)]) == 2
    assert "its ids do not fit its digest" in capsys.readouterr().err
    (twice / FILE).write_text("")
    assert main([str(good), str(twice)]) == 2
    assert "holds no step" in capsys.readouterr().err
