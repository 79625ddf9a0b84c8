"""Only known picture formats are opened, whatever a file is called; no program is started."""

import ast
import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from eval.samples import BadSample, picture_of
from eval.segmentation.readers.files import picture_size, read_image, read_labels
from lazyclip.base.errors import UserError
from lazyclip.base.pictures import FILE_FORMATS, FORMATS, open_picture
from lazyclip.shards import Sample
from training.data.pixels import decode_pixels
from training.data.samples import decode_picture

ROOT = Path(__file__).resolve().parents[1]
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n"
    b"newpath 0 0 moveto 9 9 lineto stroke\n%%EOF\n"
)


def encoded(image: Image.Image, form: str, **how) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **how)
    return stream.getvalue()


def noise(seed: int = 0, mode: str = "RGB") -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 255, (24, 32, 3), dtype=np.uint8)).convert(mode)


def several(form: str, **how) -> bytes:
    return encoded(noise(0), form, save_all=True, append_images=[noise(1), noise(2)], **how)


def sixteen() -> Image.Image:
    return Image.fromarray((np.arange(24 * 32, dtype=np.uint16) * 80).reshape(24, 32))


TAKEN = {
    "jpeg": lambda: encoded(noise(), "JPEG"),
    "cmyk": lambda: encoded(noise(mode="CMYK"), "JPEG"),
    "mpo": lambda: several("MPO"),
    "png": lambda: encoded(noise(), "PNG"),
    "png of 16 bits": lambda: encoded(sixteen(), "PNG"),
    "animated png": lambda: several("PNG"),
    "webp": lambda: encoded(noise(), "WEBP"),
    "animated webp": lambda: several("WEBP"),
    "gif": lambda: encoded(noise(), "GIF"),
    "animated gif": lambda: several("GIF"),
    "bmp": lambda: encoded(noise(), "BMP"),
}


def by_evaluation(content: bytes) -> Image.Image:
    return picture_of(Sample("a", {"jpg": content}, Path("0.tar"), 0))


READERS = (decode_pixels, decode_picture, by_evaluation)


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """A program of Ghostscript's name that leaves a file when it is started."""
    ran, program = tmp_path / "ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for once a process
    return ran


def test_the_marker_shows_what_is_to_be_kept_from_happening(marker):
    with Image.open(io.BytesIO(EPS)) as opened, contextlib.suppress(OSError):
        opened.load()
    assert marker.exists()


@pytest.mark.parametrize("reader", READERS)
def test_postscript_under_a_pictures_name_is_a_bad_picture_and_starts_nothing(marker, reader):
    with pytest.raises((ValueError, BadSample), match="cannot identify image file"):
        reader(EPS)
    assert not marker.exists()


@pytest.mark.parametrize("reader", [picture_size, read_image, read_labels])
def test_nor_does_it_in_a_folder_of_pictures(marker, tmp_path, reader):
    file = tmp_path / "a.jpg"
    file.write_bytes(EPS)
    with pytest.raises(UserError, match=r"a\.jpg: not readable as a picture"):
        reader(file)
    assert not marker.exists()


@pytest.mark.parametrize("form", ["TIFF", "PPM", "ICO", "TGA", "PDF", "JPEG2000"])
def test_formats_that_are_not_listed_are_bad_pictures(form):
    content = encoded(noise(), form)
    for reader in READERS:
        with pytest.raises((ValueError, BadSample), match="cannot identify image file"):
            reader(content)


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_web_has_is_read_as_before(name):
    content = TAKEN[name]()
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.format in (*FORMATS, "MPO")
        expected = np.asarray(opened.convert("RGB"))
    for reader in (decode_picture, by_evaluation):
        assert np.array_equal(np.asarray(reader(content)), expected)
    pixels = decode_pixels(content).permute(1, 2, 0).numpy()
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_files_of_a_benchmark_may_be_tiff_too(tmp_path):
    noise().save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif")[0], np.asarray(noise()))
    with pytest.raises(UnidentifiedImageError):
        open_picture(tmp_path / "a.tif")
    with open_picture(tmp_path / "a.tif", FILE_FORMATS) as opened:
        assert opened.format == "TIFF"


def test_no_other_place_opens_pictures():
    files = [
        file
        for top in ("src", "training", "eval", "demo", "scripts")
        for file in (ROOT / top).rglob("*.py")
        if file.name != "pictures.py"
    ]
    assert len(files) > 100
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("Image", "open"), f"{file}:{node.lineno}"
