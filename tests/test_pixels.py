"""Fast pixels are Pillow's pixels to one grey level, and odd pictures fare as with Pillow."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from lazyclip.factory import build
from training.data.pixels import FastCrop, check_size, decode_pixels, fast_of, to_float


def picture(size=(80, 60), mode="RGB", seed=0):
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def saved(image, kind="JPEG", **more):
    stream = io.BytesIO()
    image.save(stream, kind, **more)
    return stream.getvalue()


def by_pillow(content):
    with Image.open(io.BytesIO(content)) as opened:
        return np.asarray(opened.convert("RGB"), dtype=int)


@pytest.mark.parametrize(
    ("content", "most"),
    [
        (saved(picture(), quality=92), 1),
        (saved(picture(mode="L"), quality=92), 1),
        (saved(picture(), quality=60, progressive=True), 1),
        (saved(picture(mode="CMYK")), 0),
        (saved(picture(), "PNG"), 0),
        (saved(picture(mode="P"), "PNG"), 0),
        (saved(picture(mode="RGBA"), "PNG"), 0),
        (saved(picture(), "WEBP"), 0),
        (saved(picture(mode="LA"), "PNG"), 0),
        (saved(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900), "PNG"), 0),
        (saved(picture((8, 8))), 1),
        (saved(Image.new("RGB", (1, 1), (9, 99, 199))), 1),
    ],
)
def test_pixels_are_those_of_pillow(content, most):
    found = decode_pixels(content)
    assert found.dtype == torch.uint8
    apart = np.abs(found.permute(1, 2, 0).numpy().astype(int) - by_pillow(content))
    assert apart.max() <= most


def test_exif_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_pixels(saved(picture(), exif=exif)).shape == (3, 60, 80)


@pytest.mark.parametrize(
    "content",
    [b"", b"nothing", saved(picture())[:500], saved(picture(), "PNG")[:300], saved(picture())[:2]],
)
def test_what_pillow_cannot_decode_is_an_error_with_its_reason(content):
    with pytest.raises(ValueError, match=r"\w+Error: ") as caught:
        decode_pixels(content)
    assert "BytesIO" not in str(caught.value)


def test_a_jpeg_without_its_end_is_decoded_as_pillow_does_or_refused_as_it_does():
    whole = saved(picture(), quality=92)
    for cut in (1, 2, 10, len(whole) // 2):
        content = whole[:-cut]
        try:
            expected = by_pillow(content)
        except OSError:
            with pytest.raises(ValueError, match="truncated"):
                decode_pixels(content)
        else:
            found = decode_pixels(content).permute(1, 2, 0).numpy().astype(int)
            assert np.abs(found - expected).max() <= 1


def test_a_bomb_is_refused_by_its_header():
    content = saved(Image.new("1", (6000, 6000)), "PNG")
    assert len(content) < 20_000
    with pytest.raises(ValueError, match="6000x6000 pixels are more than 25 million"):
        decode_pixels(content)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        decode_pixels(saved(Image.new("1", (20_000, 20_000)), "PNG"))
    check_size(5000, 5000)


def test_the_fast_transform_gives_the_slow_one_to_a_grey_level():
    built = build("ViT-nano")
    fast = fast_of(built.preprocess_train)
    assert isinstance(fast, FastCrop)
    fast = pickle.loads(pickle.dumps(fast))
    mean, std = built.info.mean, built.info.std
    worst = 0.0
    for seed in range(8):
        content = saved(picture((96 + 8 * seed, 80), seed=seed), quality=92)
        torch.manual_seed(seed)
        slow = built.preprocess_train(Image.open(io.BytesIO(content)).convert("RGB"))
        torch.manual_seed(seed)
        pixels = fast(decode_pixels(content))
        assert pixels.dtype == torch.uint8
        found = to_float(pixels[None], mean, std)[0]
        grey = torch.tensor(std).view(3, 1, 1) * 255
        worst = max(worst, float(((found - slow) * grey).abs().max()))
    assert 0 < worst <= 1.01


def test_other_transforms_have_no_fast_form():
    built = build("ViT-nano")
    assert fast_of(built.preprocess_val) is None
    jitter = transforms.Compose([transforms.ColorJitter(0.1), transforms.ToTensor()])
    assert fast_of(jitter) is None
    assert fast_of(lambda image: image) is None


def test_floats_are_not_normalised_again():
    images = torch.randn(2, 3, 4, 4)
    assert to_float(images, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)) is images
    grey = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    assert to_float(grey, (0.5, 0.0, 1.0), (0.5, 1.0, 0.5)).flatten().tolist() == [1.0, 1.0, 0.0]
