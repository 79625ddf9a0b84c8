"""Pictures to uint8 tensors: decoded, cropped and resized fast, almost Pillow's pixels.

JPEGs go through torchvision's decoder (libjpeg-turbo) and its uint8 resize; whatever else, or what
it may take otherwise than Pillow (CMYK, a file cut short), goes through Pillow. The pixels differ
from Pillow's with torchvision's float transform by one grey level at most in `test_pixels.py`, by
two (0.01 on average) in the textured pictures of `results/2026-11-27-loader-and-training`, which
also says what it gains. Normalising is left to the device that trains. Not here: captions, and what
becomes of a picture that cannot be decoded (`samples`).
"""

import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional

from lazyclip.base.pictures import open_picture

MOST_PIXELS = 25_000_000
"""A picture above this is refused by its header: a bomb more likely than a photograph."""

_END = b"\xff\xd9"


def check_size(width: int, height: int, most: int = MOST_PIXELS) -> None:
    """Refuse a picture by its header's size.

    Raises:
        ValueError: more pixels than allowed.
    """
    if width * height > most:
        raise ValueError(f"{width}x{height} pixels are more than {most / 1e6:g} million")


def _plain_jpeg(opened: Image.Image, content: bytes) -> bool:
    """Tell whether both decoders take a file alike: a whole JPEG, grey or RGB."""
    return (
        opened.format == "JPEG"
        and opened.mode in ("L", "RGB")
        and content[-64:].rstrip(b"\0").endswith(_END)
    )


def decode_pixels(content: bytes) -> Tensor:
    """Decode a picture; its EXIF orientation is left alone, as open_clip does.

    Returns:
        3 x H x W uint8, RGB.

    Raises:
        ValueError: it cannot be decoded, or is too large; with the reason.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's remarks on metadata would come once for each picture, millions of times.
            warnings.simplefilter("ignore")
            with open_picture(io.BytesIO(content)) as opened:
                check_size(*opened.size)
                if _plain_jpeg(opened, content):
                    raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                    return decode_jpeg(raw, mode=ImageReadMode.RGB)
                return functional.pil_to_tensor(opened.convert("RGB"))
    except Exception as error:
        # A decoder may raise anything on damaged bytes; one picture must not end a run. The caller
        # counts and names it.
        # Pillow names the stream it read from by its address, which says nothing.
        reason = re.sub(r" ?<_io\.BytesIO object at \w+>", "", str(error))
        raise ValueError(f"{type(error).__name__}: {reason}") from None


@dataclasses.dataclass(frozen=True)
class FastCrop:
    """A random crop resized to `size` (height, width), uint8 in and out.

    Draws as torchvision's RandomResizedCrop does: the same seed gives the same crop.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: InterpolationMode

    def __call__(self, picture: Tensor | Image.Image) -> Tensor:
        """Crop and resize 3 x H x W uint8, or an image."""
        if isinstance(picture, Image.Image):
            picture = functional.pil_to_tensor(picture)
        top, left, height, width = RandomResizedCrop.get_params(
            picture, list(self.scale), list(self.ratio)
        )
        return functional.resized_crop(
            picture, top, left, height, width, list(self.size), self.interpolation, antialias=True
        )


def fast_of(transform: Callable[..., Tensor]) -> FastCrop | None:
    """Return the fast form of open_clip's training transform; None for any other transform."""
    steps = getattr(transform, "transforms", [])
    names = [type(step).__name__ for step in steps]
    known = {"RandomResizedCrop", "MaybeConvertMode", "MaybeToTensor", "ToTensor", "Normalize"}
    if not steps or type(steps[0]) is not RandomResizedCrop or set(names) - known:
        return None
    crop = steps[0]
    size, scale, ratio = tuple(crop.size), tuple(crop.scale), tuple(crop.ratio)
    return FastCrop(
        (int(size[0]), int(size[1])),
        (float(scale[0]), float(scale[1])),
        (float(ratio[0]), float(ratio[1])),
        crop.interpolation,
    )


def to_float(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise uint8 images B x 3 x H x W to float32 on their device; floats are left as they are.

    Args:
        images: uint8 0..255, or floats that are normalised already.
        mean: of each channel, 0..1.
        std: of each channel, 0..1.
    """
    if images.dtype != torch.uint8:
        return images
    centre = torch.tensor(mean, device=images.device).view(3, 1, 1) * 255
    spread = torch.tensor(std, device=images.device).view(3, 1, 1) * 255
    return (images.float() - centre) / spread
