"""Broken and odd samples and shards in a run: it goes on and says so, or ends and says why."""

import contextlib
import errno
import io
import json
import os
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

from lazyclip.base.checkpoint import newest_whole
from tests.toy import caption_sample, caption_shards, jpeg, write_shard
from tests.toy_run import CLASSES, TINY, Ran, metrics, train
from training import loop, state
from training.audit import read_audit


def encoded(image: Image.Image, form: str, **how) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **how)
    return stream.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> Image.Image:
    draw = np.random.default_rng(3)
    return Image.fromarray(draw.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(
        mode
    )


def exif_turned() -> bytes:
    about = Image.Exif()
    about[0x0112] = 6
    return encoded(noise(size=(64, 32)), "JPEG", exif=about)


def animated() -> bytes:
    frames = [noise().rotate(90 * n) for n in range(3)]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def bomb() -> bytes:
    """A PNG of a few kilobytes that says it has 400 megapixels."""

    def part(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")


TAKEN = {
    "cmyk": ("jpg", lambda: encoded(noise("CMYK"), "JPEG")),
    "palette": ("png", lambda: encoded(noise("P"), "PNG")),
    "palette-transparent": ("png", lambda: encoded(noise("P"), "PNG", transparency=3)),
    "sixteen-bit": ("png", lambda: encoded(
        Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16), "PNG")),
    "grey": ("jpg", lambda: encoded(noise("L"), "JPEG")),
    "alpha": ("png", lambda: encoded(noise("RGBA"), "PNG")),
    "animated": ("webp", animated),
    "turned-by-exif": ("jpg", exif_turned),
    "one-pixel": ("png", lambda: encoded(noise(size=(1, 1)), "PNG")),
    "long": ("png", lambda: encoded(noise(size=(400, 2)), "PNG")),
}  # fmt: skip
REFUSED = {
    "empty": lambda: b"",
    "text": lambda: b"not a picture",
    "cut": lambda: jpeg(1)[:300],
    "bomb": bomb,
}


def with_sample(folder: Path, sample: dict[str, bytes]) -> Path:
    """A shard of seven good samples and, as the fifth, an odd one."""
    samples = [caption_sample(i, CLASSES) for i in range(8)]
    samples[4] = sample
    return write_shard(folder / "0.tar", samples)


def ledger(ran: Ran) -> list[dict]:
    file = ran.folder / "ledger-rank0.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("kind", TAKEN)
def test_odd_pictures_are_trained_on(tmp_path, kind):
    suffix, make = TAKEN[kind]
    shard = with_sample(tmp_path, {suffix: make(), "txt": b"odd"})
    ran = train(tmp_path, train_data=shard, model=TINY, audit=True)
    assert ran.code == 0, ran.err
    assert ledger(ran) == []
    assert metrics(ran.folder)[-1]["dropped"] == 0


@pytest.mark.parametrize("kind", REFUSED)
def test_pictures_that_do_not_decode_are_told_and_another_stands_in_or_none(tmp_path, kind):
    shard = with_sample(tmp_path, {"jpg": REFUSED[kind](), "txt": b"odd"})
    how = {"train_data": shard, "model": TINY, "audit": "ids"}
    # All eight stand in one batch: a stand-in would be a second copy, so the slot is masked.
    ran = train(tmp_path, "whole", **how)
    assert ran.code == 0, ran.err
    (line,) = ledger(ran)
    assert (line["step"], line["shard"], line["ordinal"]) == (1, "0.tar", 4)
    assert line["reason"]
    assert line["substitute"] is None
    assert read_audit(ran.folder)[1]["ids"] == [f"0.tar:{i}" for i in range(8)]
    small = train(tmp_path, "small", **how, batch_size=2, lanes=1)
    (line,) = ledger(small)
    assert (line["shard"], line["ordinal"]) == ("0.tar", 4)
    assert line["substitute"] in {f"0.tar:{i}" for i in range(8)} - {"0.tar:4"}
    assert "WARNING | dropped 0.tar:4: " in small.err


CAPTIONS = {
    "empty": (b" \n", 1), "not-text": (b"\xff\xfe\x00", 1), "huge": (b"word " * 40_000, 1),
    "long": (b"word " * 5_000, 0), "of-zeros": (b"a\0b", 0), "emoji": ("\N{SNOWMAN}".encode(), 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", CAPTIONS)
def test_odd_captions_are_read_or_told(tmp_path, kind):
    text, bad = CAPTIONS[kind]
    shard = with_sample(tmp_path, {"jpg": jpeg(2), "txt": text})
    ran = train(tmp_path, train_data=shard, model=TINY)
    assert ran.code == 0, ran.err
    assert [line["ordinal"] for line in ledger(ran)] == [4] * bad
    assert metrics(ran.folder)[-1]["dropped"] == bad


@pytest.fixture(scope="module")
def plain_samples() -> list[dict[str, bytes]]:
    return [{"jpg": jpeg(i, (32, 32)), "txt": f"number {i}".encode()} for i in range(1200)]


@pytest.mark.slow
@pytest.mark.parametrize(("bad", "code"), [(6, 0), (24, 2)])
def test_half_a_per_cent_of_bad_samples_is_borne_and_two_are_not(
    tmp_path, plain_samples, bad, code
):
    samples = list(plain_samples)
    places = range(7, 1200, 1200 // bad)
    for place in places:
        samples[place] = {**samples[place], "jpg": b"broken"}
    shard = write_shard(tmp_path / "0.tar", samples)
    ran = train(tmp_path, train_data=shard, model=TINY, batch_size=120, lanes=8)
    assert ran.code == code, ran.err
    told = Counter((line["shard"], line["ordinal"]) for line in ledger(ran))
    status = json.loads((ran.folder / "status.json").read_text())
    if code == 0:
        assert told == {("0.tar", place): 1 for place in places}
        assert metrics(ran.folder)[-1]["dropped"] == bad
        return
    assert set(told) <= {("0.tar", place) for place in places}
    assert (status["state"], status["retryable"]) == ("failed", False)
    read = 120 * status["step"]
    assert read >= 1000
    assert f"{len(told)} of {read} samples were unusable ({len(told)} bad picture)" in ran.err
    assert "more than --max-bad-fraction 0.01; mend the shards or raise" in ran.err
    assert "first ['0.tar:" in ran.err


# --- shards ---------------------------------------------------------------------------------------


def test_broken_shards_are_told_before_the_first_step(tmp_path):
    data = tmp_path / "data"
    caption_shards(data, shards=5, per_shard=8, classes=CLASSES)
    whole = (data / "00001.tar").read_bytes()
    (data / "00001.tar").write_bytes(whole[: len(whole) // 2])
    (data / "00002.tar").write_bytes(b"")
    (data / "00003.tar").unlink()
    ran = train(tmp_path, train_data=f"{data}/{{00000..00004}}.tar", model=TINY, audit="ids")
    assert ran.code == 0, ran.err
    said = ran.err[: ran.err.index("Train Epoch")]
    for words in ("truncated: 00001.tar (", "empty file: 00002.tar", "missing: ", "00003.tar"):
        assert words in said
    seen = {i.split(":")[0] for line in read_audit(ran.folder).values() for i in line["ids"]}
    assert seen == {"00000.tar", "00001.tar", "00004.tar"}


def test_a_shard_that_changed_after_it_was_indexed_is_refused(tmp_path):
    data = tmp_path / "data"
    pattern = caption_shards(data, shards=2, per_shard=8, classes=CLASSES)
    assert train(tmp_path, train_data=pattern, model=TINY).code == 0
    whole = (data / "00001.tar").read_bytes()
    (data / "00001.tar").write_bytes(whole[: len(whole) // 2])
    ran = train(tmp_path, "b", train_data=pattern, model=TINY)
    assert ran.code == 2
    assert "00001.tar" in ran.err.splitlines()[-1]
    assert "build it again: python -m training.index" in ran.err
    assert not (tmp_path / "b").exists()


def test_shards_that_are_deleted_during_the_run_end_it_by_name(tmp_path, monkeypatch):
    data = tmp_path / "data"
    pattern = caption_shards(data, shards=24, per_shard=2, classes=CLASSES)
    plain = loop.Loop._advance

    def advance(self, fed):
        if self.step == 1 and data.exists():
            data.rename(tmp_path / "moved")
        return plain(self, fed)

    # With one lane eight shards make a window: most are not read yet at the second step.
    how = {"train_data": pattern, "model": TINY, "lanes": 1, "save_every": 1, "audit": "ids"}
    straight = train(tmp_path, "straight", **how)
    with monkeypatch.context() as patch:
        patch.setattr("training.data.reading.time.sleep", lambda seconds: None)
        patch.setattr(loop.Loop, "_advance", advance)
        with pytest.raises(RuntimeError, match=r"shard .*000..\.tar: .* cannot be read"):
            train(tmp_path, **how)
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert (status["state"], status["retryable"]) == ("failed", True)
    assert "restore the file, then resume" in status["reason"]
    assert 0 < status["step"] < 6
    (tmp_path / "moved").rename(data)
    ran = train(tmp_path, **how, resume="latest")
    assert ran.code == 0, ran.err
    assert read_audit(ran.folder) == read_audit(straight.folder)


# --- a full disk ----------------------------------------------------------------------------------


def test_a_save_for_which_there_is_no_room_ends_no_run(tmp_path, monkeypatch):
    pattern = caption_shards(tmp_path / "data", shards=2, per_shard=8, classes=CLASSES)
    plain = state.save_model
    calls = []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*args, **kwargs)

    monkeypatch.setattr(state, "save_model", full)
    ran = train(tmp_path, train_data=pattern, model=TINY, epochs=2, save_every=1)
    assert ran.code == 0, ran.err
    assert ran.err.count("; make room, the run goes on") == 2
    names = sorted(p.name for p in (ran.folder / "checkpoints").iterdir())
    assert names == ["step_00000001", "step_00000004"]
    assert json.loads((ran.folder / "status.json").read_text())["state"] == "finished"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 60 MB, which takes two checkpoints of the small model and not three."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(place)], capture_output=True
    )
    if not done or done.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield place
    subprocess.run([str(shutil.which("umount")), str(place)], check=True)


def test_a_disk_that_fills_up_ends_no_run_and_leaves_whole_checkpoints(tmp_path, small_disk):
    pattern = caption_shards(tmp_path / "data", shards=2, per_shard=8, classes=CLASSES)
    how = {"train_data": pattern, "model": TINY, "epochs": 4, "save_every": 1, "keep": 0}
    with contextlib.suppress(OSError, SafetensorError):
        train(small_disk, **how)  # the model at the very end may find no room
    folder = small_disk / "a"
    said = (folder / "out.log").read_text()
    assert said.count("; make room, the run goes on") >= 1
    assert [line["step"] for line in metrics(folder)] == list(range(1, 9))
    newest = newest_whole(folder / "checkpoints")
    assert newest is not None
    assert not list((folder / "checkpoints").glob("*.part"))
    shutil.rmtree(folder / "checkpoints" / "step_00000001")
    ran = train(small_disk, **{**how, "keep": 1}, resume="latest")
    assert ran.code == 0, ran.err
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
