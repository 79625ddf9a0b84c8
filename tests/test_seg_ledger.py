"""Counts on disk: what is written comes back, whatever cut the file short."""

import numpy as np
import pytest

from eval.segmentation.job import Done, merge
from eval.segmentation.ledger import Ledger, ledger_files, read_ledgers, to_cells, to_counts
from eval.segmentation.loading import Broken
from lazyclip.base.errors import UserError

TASK = {"dataset": "toy", "protocol": "abc", "method": "vanilla"}


def some_counts(seed, classes=4):
    draw = np.random.default_rng(seed)
    return draw.integers(0, 3, (classes, classes)) * draw.integers(0, 10**6, (classes, classes))


def test_cells_hold_all_counts_and_no_zero():
    counts = some_counts(0)
    cells = to_cells(counts)
    assert all(pixels > 0 for _, pixels in cells)
    assert np.array_equal(to_counts(cells, 4), counts)


def test_counts_of_several_ranks_come_back_together(tmp_path):
    for rank in range(3):
        with Ledger.open(tmp_path, rank, TASK) as ledger:
            ledger.add(f"a{rank}", to_cells(some_counts(rank)))
            ledger.add(f"town/b{rank}", ())
    found = read_ledgers(tmp_path, TASK)
    assert set(found) == {f"a{r}" for r in range(3)} | {f"town/b{r}" for r in range(3)}
    assert np.array_equal(to_counts(found["a2"], 4), some_counts(2))
    assert len(ledger_files(tmp_path)) == 3


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_short_is_scored_again_and_written_whole(tmp_path, cut):
    with Ledger.open(tmp_path, 0, TASK) as ledger:
        ledger.add("a", ((0, 7),))
        ledger.add("b", ((1, 8), (2, 9), (3, 10), (4, 11)))
    (file,) = ledger_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-cut])
    assert set(read_ledgers(tmp_path, TASK)) == {"a"}
    with Ledger.open(tmp_path, 0, TASK) as ledger:
        ledger.add("b", ((1, 8),))
    assert read_ledgers(tmp_path, TASK) == {"a": ((0, 7),), "b": ((1, 8),)}


def test_a_file_cut_before_its_first_line_is_begun_anew(tmp_path):
    with Ledger.open(tmp_path, 0, TASK):
        pass
    (file,) = ledger_files(tmp_path)
    file.write_text('{"data')
    assert read_ledgers(tmp_path, TASK) == {}
    with Ledger.open(tmp_path, 0, TASK) as ledger:
        ledger.add("a", ((0, 7),))
    assert read_ledgers(tmp_path, TASK) == {"a": ((0, 7),)}


def test_counts_of_another_evaluation_are_refused_with_the_difference(tmp_path):
    with Ledger.open(tmp_path, 0, TASK):
        pass
    with pytest.raises(UserError, match=r"method 'vanilla' there, 'sclip' now.*--overwrite"):
        read_ledgers(tmp_path, {**TASK, "method": "sclip"})


def test_a_file_that_is_no_ledger_is_named(tmp_path):
    (tmp_path / "counts").mkdir()
    (tmp_path / "counts" / "rank-0000.jsonl").write_text("{}\nnonsense\n")
    with pytest.raises(UserError, match=r"rank-0000.jsonl cannot be read as counts"):
        read_ledgers(tmp_path, TASK)


def test_merging_sums_each_picture_once_and_keeps_the_order_of_the_broken():
    parts = [
        Done({"b": ((0, 1),)}, (Broken("e", "e is broken"),)),
        Done({"c": ((0, 2), (3, 5))}, (Broken("d", "d is broken"),)),
    ]
    total, broken = merge(["a", "b", "c", "d", "e"], {"a": ((3, 4),)}, parts, 2)
    assert total.tolist() == [[3, 0], [0, 9]]
    assert [one.name for one in broken] == ["d", "e"]


@pytest.mark.parametrize(
    ("names", "earlier"),
    [(["a", "b", "c"], {}), (["a", "b"], {"a": ()}), (["a"], {}), (["a", "x"], {})],
)
def test_a_picture_missed_or_met_twice_is_a_fault(names, earlier):
    parts = [Done({"a": ((0, 1),)}, ()), Done({"b": ((0, 1),)}, ())]
    with pytest.raises(RuntimeError, match="pictures"):
        merge(names, earlier, parts, 2)
