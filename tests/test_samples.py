"""From a shard's record to a picture and a caption, or to a named reason why not."""

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lazyclip.shards import Sample
from tests.toy import jpeg, png, write_shard
from training.data.samples import Dropped, Pair, decode, decode_picture, read_shard
from training.data.sources import Turn

TURN = Turn(3, 7, Path("a/00002.tar"))


def sample(**parts: bytes) -> Sample:
    return Sample("000020005", parts, TURN.shard, 5)


def encoded(image: Image.Image, kind: str, **how) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **how)
    return stream.getvalue()


def test_a_sample_gives_its_picture_and_its_caption_without_blanks_around():
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    pair = decode(sample(png=png(pixels), txt="  a größe\n".encode(), json=b"{}"), TURN)
    assert isinstance(pair, Pair)
    assert pair.caption == "a größe"
    assert np.array_equal(np.asarray(pair.picture), pixels)


def test_the_identity_is_the_turn_and_the_place_not_the_path():
    good = {"jpg": jpeg(0), "txt": b"a"}
    pair = decode(sample(**good), TURN)
    moved = decode(Sample("other", good, Path("b/9.tar"), 5), TURN._replace(shard=Path("b/9.tar")))
    assert pair.identity == moved.identity
    others = [
        decode(sample(**good), TURN._replace(number=4)),
        decode(sample(**good), TURN._replace(slot=8)),
        decode(sample(**good)._replace(ordinal=6), TURN),
    ]
    assert len({pair.identity, *(other.identity for other in others)}) == 4


@pytest.mark.parametrize(
    ("parts", "reason", "detail"),
    [
        ({"txt": b"a", "json": b"{}"}, "no picture", "has json, txt"),
        ({"jpg": jpeg(0), "cls": b"1"}, "no caption", "has cls, jpg"),
        ({"jpg": jpeg(0), "txt": b" \n\t"}, "empty caption", ""),
        ({"jpg": jpeg(0), "txt": b"\xff\xfe"}, "caption not text", "utf-8"),
        ({"jpg": b"", "txt": b"a"}, "bad picture", "UnidentifiedImageError"),
        ({"jpg": b"<html>", "txt": b"a"}, "bad picture", "UnidentifiedImageError"),
        ({"jpg": jpeg(0)[:900], "txt": b"a"}, "bad picture", "OSError"),
    ],
)
def test_every_kind_of_bad_sample_is_named_with_its_reason(parts, reason, detail):
    dropped = decode(sample(**parts), TURN)
    assert isinstance(dropped, Dropped)
    assert dropped.label == "00002.tar:5 (key 000020005)"
    assert dropped.reason == reason
    assert detail in dropped.detail


def test_the_rest_of_a_truncated_shard_is_one_named_record(tmp_path):
    good = {"jpg": b"x" * 600, "txt": b"a"}
    shard = write_shard(tmp_path / "00004.tar", [good] * 5)
    shard.write_bytes(shard.read_bytes()[: 3 * 2560 + 100])
    *before, last = read_shard(shard)
    assert [s.ordinal for s in before] == [0, 1]
    assert isinstance(last, Dropped)
    assert (last.label, last.reason) == ("00004.tar", "rest of shard")
    assert "truncated or damaged after 2 whole samples" in last.detail


def test_a_shard_that_went_away_is_one_named_record(tmp_path):
    (gone,) = read_shard(tmp_path / "00009.tar")
    assert (gone.label, gone.reason) == ("00009.tar", "rest of shard")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode_come_as_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    picture = decode_picture(encoded(Image.new(mode, (6, 4)), kind))
    assert picture.mode == "RGB"
    assert picture.size == (6, 4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_damaged_picture_is_a_value_error_whatever_the_decoder_raises(kind):
    draw = random.Random(kind)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(pixels), kind)
    failed = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 3, 10))):
            content[draw.randrange(min(len(content), 400))] = draw.randrange(256)
        try:
            decode_picture(bytes(content[: draw.randrange(1, len(content) + 1)]))
        except ValueError as error:
            failed += ": " in str(error)
    assert failed > 20


def test_a_decoder_that_fails_in_its_own_way_is_a_value_error_too(monkeypatch):
    def broken(*_, **__):
        raise KeyError("tag 258")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(ValueError, match="KeyError: 'tag 258'"):
        decode_picture(jpeg(0))


def test_remarks_of_the_decoder_neither_drop_a_picture_nor_fill_the_log():
    image = Image.new("P", (4, 4))
    image.putpalette(bytes(range(256)) * 3)
    content = encoded(image, "PNG", transparency=bytes([0, 128] * 128))
    with warnings.catch_warnings(record=True) as plain:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(content)).convert("RGB")
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        assert decode_picture(content).mode == "RGB"
    assert plain  # or this test shows nothing
    assert not ours


def test_a_picture_of_absurd_size_is_dropped_by_its_header():
    with pytest.raises(ValueError, match="6000x6000 pixels are more than 25 million"):
        decode_picture(png(np.zeros((6000, 6000), np.uint8)))
