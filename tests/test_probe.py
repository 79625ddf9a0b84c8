"""The zero-shot score while training: each rank's share, and pictures that cannot be scored."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyclip.base.errors import UserError
from lazyclip.factory import build
from lazyclip.shards import expand
from lazyclip.zeroshot import class_list
from tests.toy import caption_sample, write_shard
from tests.toy_run import CLASSES, PER_SHARD, TINY, world
from training.distributed import Place
from training.preflight import ValData
from training.probe import Probe


@pytest.fixture(scope="module")
def built():
    return build(TINY)


def probe(built, pattern, rank: int = 0, ranks: int = 1, limit: int | None = None) -> Probe:
    val = ValData(tuple(expand(str(pattern))), class_list(CLASSES), "plain")
    place = Place(rank, ranks, rank, torch.device("cpu"))
    return Probe(val, built.preprocess_val, built.tokenizer, place, 5, limit)


@given(ranks=st.integers(1, 5), limit=st.none() | st.integers(1, 40))
def test_the_ranks_share_the_first_pictures_among_them(built, ranks, limit):
    shares = [
        [sample.label for sample in probe(built, world(), rank, ranks, limit)._samples()]
        for rank in range(ranks)
    ]
    together = [label for share in shares for label in share]
    everything = [s.label for s in probe(built, world())._samples()]
    assert len(everything) == 4 * PER_SHARD
    assert sorted(together) == sorted(everything[:limit])
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_score_leaves_the_model_in_its_mode_and_without_gradients(built):
    model = built.model.train()
    scored = probe(built, world()).top1(model)
    assert 0 <= scored <= 1
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    assert probe(built, world()).top1(model) == scored
    assert not model.training


def test_pictures_that_cannot_be_scored_are_counted_and_left_out(built, tmp_path, caplog):
    good = [caption_sample(i, CLASSES) for i in range(12)]
    spoiled = [{**good[0], "jpg": b"x"}, {"json": good[1]["json"]}, {"jpg": good[2]["jpg"]}]
    clean = write_shard(tmp_path / "clean.tar", good)
    mixed = write_shard(tmp_path / "mixed.tar", good[:4] + spoiled + good[4:])
    assert probe(built, mixed).top1(built.model) == probe(built, clean).top1(built.model)
    assert "mixed.tar:4 (key 000000004): UnidentifiedImageError" in caplog.text
    assert "3 images were not scored" in caplog.text
    for reason in ("no picture", "no class", "bad picture"):
        assert f"'{reason}': 1" in caplog.text


def test_shards_without_one_picture_to_score_are_an_error(built, tmp_path):
    shard = write_shard(tmp_path / "v.tar", [{**caption_sample(0, CLASSES), "jpg": b"x"}])
    with pytest.raises(UserError, match="holds no image with a class"):
        probe(built, shard).top1(built.model)


def test_chance_is_one_class_of_all(built):
    assert probe(built, world()).chance == 1 / len(CLASSES)
