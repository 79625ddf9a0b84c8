"""A shard's record to a picture and a caption; what fails is named, never passed over.

Not here: which records come (`sources`), transforms and batches (`batches`).
"""

import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from torch import Tensor

from lazyclip.base.pictures import open_picture
from lazyclip.shards import Sample, ShardError, image_part

from .pixels import check_size
from .sources import Turn, stream_samples


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A record that gave no sample.

    Fields: label, shard and place; reason, one of a few words to count by; detail, for the log.
    """

    label: str
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A decoded picture with its caption, and what names it: the turn, the place in it.

    The picture is an RGB image, or 3 x H x W uint8 where the decoder makes tensors.
    """

    picture: Image.Image | Tensor
    caption: str
    identity: str


def read_shard(shard: Path, command: str | None = None) -> Iterator[Sample | Dropped]:
    """Read a shard's samples; a damaged rest becomes one `Dropped` with reason `rest of shard`.

    Args:
        shard: a file, or the name of what a command writes.
        command: of the shell, see `Source.commands`.
    """
    try:
        yield from stream_samples(shard, command)
    except ShardError as error:
        yield Dropped(shard.name, "rest of shard", str(error))


def decode_picture(content: bytes) -> Image.Image:
    """Decode a picture to RGB.

    Raises:
        ValueError: it cannot be decoded, or is of no format of `FORMATS`; with Pillow's reason.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's remarks on metadata would come once for each picture, millions of times.
            warnings.simplefilter("ignore")
            with open_picture(io.BytesIO(content)) as opened:
                check_size(*opened.size)
                return opened.convert("RGB")
    except Exception as error:
        # A decoder may raise anything on damaged bytes; one picture must not end a run. The caller
        # counts and names it.
        # Pillow names the stream it read from by its address, which says nothing.
        reason = re.sub(r" ?<_io\.BytesIO object at \w+>", "", str(error))
        raise ValueError(f"{type(error).__name__}: {reason}") from None


def decode(
    sample: Sample,
    turn: Turn,
    decoder: Callable[[bytes], Image.Image | Tensor] = decode_picture,
) -> Pair | Dropped:
    """Decode a record's picture and caption.

    Args:
        sample: of a shard.
        turn: of its shard; part of its identity.
        decoder: content -> picture, a `ValueError` where it cannot (`pixels.decode_pixels`).

    Returns:
        The pair, or why there is none: `no picture`, `no caption`, `empty caption`, `caption not
        text`, `bad picture`.
    """
    content, text = image_part(sample), sample.parts.get("txt")
    if content is None:
        return Dropped(sample.label, "no picture", f"has {', '.join(sorted(sample.parts))}")
    if text is None:
        return Dropped(sample.label, "no caption", f"has {', '.join(sorted(sample.parts))}")
    try:
        caption = text.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return Dropped(sample.label, "caption not text", str(error))
    if not caption:
        return Dropped(sample.label, "empty caption")
    try:
        picture = decoder(content)
    except ValueError as error:
        return Dropped(sample.label, "bad picture", str(error))
    return Pair(picture, caption, f"{turn.number} {turn.slot} {sample.ordinal}")
