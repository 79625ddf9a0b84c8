"""Text features on disk: the same as fresh ones, and never those of another model or wording."""

import logging

import pytest
import torch

from eval import textcache
from lazyclip.factory import build
from lazyclip.zeroshot import templates, text_features

WORDS = ("cat", "chest of drawers", "sofa")


@pytest.fixture(scope="module")
def built():
    return build("ViT-nano", random_weights_seed=3)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAZYCLIP_CACHE", str(tmp_path))
    return tmp_path / "text"


def encode(built, words=WORDS, prompts="plain", **more):
    return textcache.encode_queries(built, words, templates(prompts), **more)


def test_features_are_those_of_the_tower_and_come_back_from_disk(built, cache, monkeypatch):
    fresh = encode(built)
    expected = text_features(built.model, built.tokenizer, WORDS, templates("plain"))
    torch.testing.assert_close(fresh, expected)
    assert len(list(cache.iterdir())) == 1

    def never(*args):
        raise AssertionError("the tower ran again")

    monkeypatch.setattr(textcache, "text_features", never)
    assert torch.equal(encode(built), fresh)
    with pytest.raises(AssertionError, match="ran again"):
        encode(built, use_cache=False)


def test_other_words_templates_or_weights_are_encoded_anew(built, cache):
    encode(built)
    encode(built, words=("cat", "sofa", "chest of drawers"))
    encode(built, prompts="simple")
    other = build("ViT-nano", random_weights_seed=4)
    assert not torch.allclose(encode(other), encode(built))
    assert len(list(cache.iterdir())) == 4


def test_the_image_tower_does_not_matter(built, cache):
    encode(built)
    other = build("ViT-nano", random_weights_seed=3)
    with torch.no_grad():
        for parameter in other.model.visual.parameters():
            parameter.add_(1.0)
    encode(other)
    assert len(list(cache.iterdir())) == 1


def test_a_broken_file_is_said_and_replaced(built, cache, caplog):
    fresh = encode(built)
    (file,) = cache.iterdir()
    file.write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(encode(built), fresh)
    assert "encoded again" in caplog.text
    assert file.stat().st_size > 100


def test_a_cache_that_cannot_be_written_is_said_and_does_not_stop_the_run(
    built, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAZYCLIP_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert encode(built).shape == (3, 128)
    assert "are not kept" in caplog.text
