"""eval.models: a run's folder as a model; eval.samples: bytes that are no picture."""

import argparse
from pathlib import Path

import pytest

from eval.models import add_model_flags, load_from_flags
from eval.samples import BadSample, picture_of
from lazyclip.base.errors import UserError
from lazyclip.export import save_model
from lazyclip.factory import build
from lazyclip.shards import Sample


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    return parser.parse_args([*words, "--device", "cpu"])


def test_a_runs_folder_means_the_model_it_left(tmp_path):
    built = build("LaSt-ViT-nano", last={"k": 7}, random_weights_seed=3)
    save_model(built.model, built.info, tmp_path / "run" / "model")
    args = flags("--model", str(tmp_path / "run"))
    found = load_from_flags(args)
    assert args.model == str(tmp_path / "run" / "model")
    assert found.info.pooling["k"] == 7
    assert found.info.weights_sha256 is not None


def test_a_misspelt_name_is_answered_before_weights_are_asked_for():
    with pytest.raises(UserError, match="unknown model 'LaSt-ViT-nan'; nearest: LaSt-ViT-nano"):
        load_from_flags(flags("--model", "LaSt-ViT-nan"))
    with pytest.raises(UserError, match="LaSt-ViT-nano has no weights"):
        load_from_flags(flags("--model", "LaSt-ViT-nano"))


def test_bytes_that_are_no_picture_are_told_without_an_address_in_memory():
    with pytest.raises(BadSample) as caught:
        picture_of(Sample("k0", {"jpg": b"not a picture"}, Path("a.tar"), 0))
    assert str(caught.value) == "its picture does not decode (cannot identify image file)"
