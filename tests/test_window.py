"""The window: what memory allows, what it does to the order, and that a run keeps its own."""

import dataclasses
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyclip.base.errors import UserError
from tests.toy_faults import flags, kill_in_step, run
from tests.toy_run import TINY, Ran, train, world
from training.audit import read_audit
from training.data.chunks import Reader
from training.data.exact import Exact
from training.data.prepare import Wanted, prepare
from training.data.survey import How
from training.distributed import Place
from training.indexed import _capped
from training.params import TrainArgs
from training.resume import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
FLAGS = {"train_data": world, "model": TINY, "audit": "ids", "lanes": 2, "save_every": 2}


def index(tmp_path: Path) -> Path:
    """An index of the toy world with chunks of two samples, so that a window's size shows."""
    file = tmp_path / "small.npz"
    prepare(Wanted(world(), tmp_path, file=file, how=How(chunk=2)))
    return file


def go(tmp_path: Path, name: str = "a", **changes) -> Ran:
    words = {k: v() if callable(v) else v for k, v in {**FLAGS, **changes}.items()}
    return train(tmp_path, name, manifest=index(tmp_path), **words)


def batches(ran: Ran) -> list[list[str]]:
    assert ran.code == 0, ran.err
    return [line["ids"] for _, line in sorted(read_audit(ran.folder).items())]


def recorded(folder: Path) -> int:
    return read_checkpoint(sorted((folder / "checkpoints").iterdir())[0]).state["window"]


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Exact:
    folder = tmp_path_factory.mktemp("window")
    done = prepare(Wanted(world(), folder, file=folder / "m.npz", how=How(chunk=2)))
    return Exact(Reader(done.manifest, done.shards), lanes=1)


@settings(max_examples=200)
@given(st.integers(1, 40), st.sampled_from([1, 2, 3, 6]), st.integers(1, 12), st.floats(0.0, 2e6))
def test_a_lowered_window_is_the_largest_that_fits(exact, lanes, world_size, window, most):
    full = dataclasses.replace(exact, lanes=6 * lanes, window=window)
    fits = full.within(most, world_size)
    if fits is None:
        assert dataclasses.replace(full, window=1).window_bytes(world_size) > most
        return
    assert fits.window_bytes(world_size) <= most
    assert (fits.lanes, fits.decode) == (full.lanes, full.decode)
    if fits.window < window:
        larger = dataclasses.replace(fits, window=fits.window + 1)
        assert larger.window_bytes(world_size) > most
    else:
        assert fits is full


def test_the_window_changes_the_order_and_equal_ones_give_equal_batches(tmp_path):
    wide = batches(go(tmp_path, "wide", window=8))
    assert batches(go(tmp_path, "default")) == wide
    narrow = batches(go(tmp_path, "narrow", window=1))
    assert narrow != wide
    assert sorted(chain(*narrow)) == sorted(chain(*wide))


def gib(exact: Exact, lanes: int, window: int) -> float:
    return dataclasses.replace(exact, lanes=lanes, window=window).window_bytes(1) / 2**30


def test_too_little_memory_lowers_the_window_before_the_first_step(tmp_path, exact):
    room = gib(exact, 2, 3) * 1.01
    ran = go(tmp_path, window_memory=room)
    assert batches(ran) == batches(go(tmp_path, "b", window=3))
    said = [line for line in ran.err.splitlines() if "lowered" in line]
    assert len(said) == 1
    assert "windows of 8 chunks in 2 lanes take 0.00 GiB on the one rank" in said[0]
    assert "the window is lowered to 3; give --window 3 to runs on another number" in said[0]
    assert recorded(ran.folder) == 3


def test_too_little_memory_for_one_chunk_a_lane_takes_fewer_lanes_while_both_are_free(
    tmp_path, exact
):
    """Eight lanes by default for the batch of eight; two of one chunk fit, four do not."""
    room = (gib(exact, 2, 1) + gib(exact, 4, 1)) / 2
    ran = go(tmp_path, lanes=None, window_memory=room, epochs=2)
    fits = dataclasses.replace(exact, lanes=2, window=8).within(room * 2**30, 1)
    said = [line for line in ran.err.splitlines() if "lowered" in line]
    assert len(said) == 1
    how = f"{fits.window} chunk" + ("s" if fits.window > 1 else "")
    assert "windows of 8 chunks in 8 lanes take 0.00 GiB" in said[0]
    assert f"lowered to 2 lanes and windows of {how}; give --lanes 2 --window" in said[0]
    assert batches(ran) == batches(go(tmp_path, "b", lanes=2, window=fits.window, epochs=2))
    older = read_checkpoint(ran.folder / "checkpoints" / "step_00000004")
    assert (older.state["lanes"], older.state["window"]) == (2, fits.window)
    before = batches(ran)
    again = go(tmp_path, resume=older.folder, name=None, lanes=None, epochs=2, window_memory=8)
    assert batches(again) == before
    for fixed in ({"lanes": 8}, {"window": 1}):
        refused = go(tmp_path, "c", **{"lanes": None, "window_memory": room, **fixed})
        assert refused.code == 2
        assert "windows of 1 chunk in 8 lanes take" in refused.err
        assert "fewer --lanes" in refused.err


def test_a_run_that_goes_on_keeps_its_window_whatever_memory_it_has_now(tmp_path, exact):
    straight = batches(go(tmp_path, "straight", window=3, epochs=2))
    first = go(tmp_path, window_memory=gib(exact, 2, 3) * 1.01, epochs=2)
    assert batches(first) == straight
    older = first.folder / "checkpoints" / "step_00000004"
    assert older.is_dir()
    again = go(tmp_path, resume=older, name=None, epochs=2, window_memory=8)
    assert batches(again) == straight
    assert "lowered" not in again.err
    assert recorded(first.folder) == 3


def test_a_window_that_is_fixed_and_does_not_fit_is_refused(tmp_path, exact):
    first = go(tmp_path)
    too_little = gib(exact, 2, 8) / 2
    ran = go(tmp_path, window_memory=too_little, resume="latest")
    assert ran.code == 2
    assert "use --window-memory 0.01 or more ranks\n" in ran.err
    fresh = go(tmp_path, "b", window=8, window_memory=too_little)
    assert fresh.code == 2
    fits = dataclasses.replace(exact, lanes=2, window=8).within(too_little * 2**30, 1)
    assert f"or --window {fits.window}\n" in fresh.err
    assert "use --window-memory 0.01, more ranks, fewer --lanes" in fresh.err
    assert not fresh.folder.exists()
    none = go(tmp_path, "b", window_memory=0)
    assert none.code == 2
    assert "windows of 1 chunk in 2 lanes take" in none.err
    assert "or fewer --lanes\n" in none.err
    other = go(tmp_path, window=4, resume="latest")
    assert other.code == 2
    assert "--window 4 differs from the 8 that step_" in other.err
    assert go(tmp_path, window=8, lanes=2, resume="latest").code == 0
    assert first.code == 0


@pytest.mark.parametrize("share", [0.8, 0.7])
def test_a_run_that_has_begun_may_exceed_the_memory_by_a_third(exact, share):
    place = Place(0, 1, 0, torch.device("cpu"))
    exact = dataclasses.replace(exact, lanes=2, window=8)
    most = share * exact.window_bytes(1) / 2**30
    args = TrainArgs(window=8, lanes=2, window_memory=most, resume="latest")
    if share > 0.75:
        kept, (line,) = _capped(exact, args, place, 4, begun=True)
        assert kept == exact
        assert "use --window-memory 0.01, more ranks or" in line
    else:
        with pytest.raises(UserError, match="more ranks or fewer"):
            _capped(exact, args, place, 4, begun=True)
    with pytest.raises(UserError, match="more ranks or fewer"):
        _capped(exact, args, place, 4, begun=False)


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_on_another_number_of_ranks_keeps_the_window(tmp_path):
    """Begun on two ranks with windows of two chunks, killed, gone on with on one."""
    file = index(tmp_path)
    words = flags(tmp_path, 2, manifest=file, lanes=2, window=2)
    run(2, words, tmp_path / "log", kill_in_step(5))
    words = flags(tmp_path, 1, manifest=file, lanes=2, resume="latest", batch_size=None)
    assert run(1, words, tmp_path / "log") == [0], (tmp_path / "log").read_text()[-3000:]
    whole = flags(tmp_path, 1, manifest=file, lanes=2, window=2, name="whole")
    assert run(1, whole, tmp_path / "log") == [0]
    assert read_audit(tmp_path / "a") == read_audit(tmp_path / "whole")
    assert recorded(tmp_path / "a") == 2


def test_without_the_exact_loader_there_is_no_window(tmp_path):
    ran = train(tmp_path, train_data=world(), loader="sequential", window=2)
    assert ran.code == 2
    assert "--window needs the exact loader" in ran.err
