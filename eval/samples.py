"""Samples of evaluation shards: picture, class and boxes, with every bad one counted and named.

Shared by the entries that read shards. Not here: what is scored.
"""

import argparse
import io
import itertools
import logging
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from lazyclip.base.errors import UserError
from lazyclip.base.pictures import open_picture
from lazyclip.boxes import Box, from_inclusive
from lazyclip.shards import (
    IMAGE_SUFFIXES,
    Sample,
    ShardError,
    class_index_of,
    image_part,
    iterate_samples,
    read_json_part,
)

from .commandline import add_output_flags, check_output

log = logging.getLogger(__name__)
T = TypeVar("T")
NAMED = 5  # bad samples that are logged by name
# What Pillow raises on bytes that are no whole picture.
_UNDECODABLE = (
    OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError,
)  # fmt: skip


class BadSample(Exception):
    """A sample that cannot be scored: `reason` is counted, the text is for people."""

    def __init__(self, reason: str, text: str) -> None:
        """Make one, such as `BadSample("undecodable", "broken data stream")`."""
        super().__init__(text)
        self.reason = reason


class Tally:
    """Count bad samples by reason, name the first ones, and stop where they are too many."""

    def __init__(self, max_bad: int = 0) -> None:
        """Allow `max_bad` bad samples; one more raises `UserError`."""
        self.max_bad = max_bad
        self.skipped: Counter[str] = Counter()

    def add(self, sample: Sample, error: BadSample) -> None:
        """Count one bad sample; raises `UserError` above the limit."""
        self.skipped[error.reason] += 1
        total = self.skipped.total()
        if total > self.max_bad:
            raise UserError(
                f"{sample.label} cannot be scored: {error}; a bad evaluation sample is an error "
                f"({total} so far, --max-bad {self.max_bad}); mend the shard, or allow N of them "
                "with --max-bad N"
            )
        if total <= NAMED:
            log.warning("skipped %s: %s (%s)", sample.label, error, error.reason)


def add_sample_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name shards, how they are read, and where results go."""
    group = parser.add_argument_group("data")
    group.add_argument("--val-data", help='shards, such as "val/{00000..00009}.tar" or a folder')
    group.add_argument("--batch-size", type=int, default=64, help="images at a time (default 64)")
    group.add_argument("--workers", type=int, default=2, help="threads that decode (default 2)")
    group.add_argument("--limit", type=int, help="read this many samples only")
    group.add_argument(
        "--max-bad", type=int, default=0, help="bad samples to skip before it is an error"
    )
    add_output_flags(group, "none")


def check_sample_flags(args: argparse.Namespace) -> None:
    """Check the numbers and the output folder before anything long starts."""
    for flag, low in (("batch_size", 1), ("workers", 1), ("limit", 1), ("max_bad", 0)):
        value = getattr(args, flag)
        if value is not None and value < low:
            raise UserError(f"--{flag.replace('_', '-')} {value} is below {low}")
    check_output(args.output, args.overwrite)


def read_shards(shards: Sequence[Path], limit: int | None = None) -> Iterator[Sample]:
    """Yield the samples of all shards in order, at most `limit`."""
    whole = itertools.chain.from_iterable(iterate_samples(shard) for shard in shards)
    return itertools.islice(whole, limit)


def survey(
    shards: Sequence[Path], limit: int | None, fits: Callable[[Sample], bool], need: str
) -> int:
    """Read the shards once without decoding, so that damage shows before the scoring.

    Args:
        shards: files.
        limit: read this many samples only.
        fits: whether a sample has what is needed.
        need: what that is, for the message.

    Returns:
        The number of samples.

    Raises:
        UserError: no sample fits, with the suffixes and json keys seen; or a damaged shard.
    """
    suffixes: Counter[str] = Counter()
    keys: list[str] = []
    count = fitting = 0
    for sample in read_shards(shards, limit):
        count += 1
        suffixes.update(list(sample.parts))
        fitting += fits(sample)
        if not keys and "json" in sample.parts:
            keys = _json_keys(sample)
    if not fitting:
        seen = ", ".join(f"{name} {number}" for name, number in suffixes.most_common(12))
        inside = f"; keys of the first json: {', '.join(keys)}" if keys else ""
        raise UserError(
            f"--val-data: 0 of {count} samples fit, each needs {need}; suffixes seen: "
            f"{seen or 'none'}{inside}"
        )
    return count


def _json_keys(sample: Sample) -> list[str]:
    try:
        return sorted(read_json_part(sample))[:20]
    except ShardError:
        return []


def prepare_all(
    samples: Iterable[Sample],
    prepare: Callable[[Sample], T],
    tally: Tally,
    workers: int = 1,
    chunk: int = 64,
) -> Iterator[T]:
    """Prepare samples in order, in threads; those that raise `BadSample` go to the tally.

    Args:
        samples: from `read_shards`.
        prepare: sample -> what is scored; decoding belongs here.
        tally: counts, and stops where there are too many.
        workers: threads.
        chunk: samples in flight.
    """

    def attempt(sample: Sample) -> T | BadSample:
        try:
            return prepare(sample)
        except BadSample as error:
            return error

    stream = iter(samples)
    with ThreadPoolExecutor(workers) as pool:
        while block := list(itertools.islice(stream, chunk)):
            for sample, done in zip(block, pool.map(attempt, block), strict=True):
                if isinstance(done, BadSample):
                    tally.add(sample, done)
                else:
                    yield done


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cut a stream into lists of `size`; the last may be shorter."""
    stream = iter(items)
    while block := list(itertools.islice(stream, size)):
        yield block


def picture_of(sample: Sample) -> Image.Image:
    """Decode the sample's picture to RGB; raises `BadSample`."""
    content = image_part(sample)
    if content is None:
        raise BadSample(
            "no_picture",
            f"no picture ({', '.join(IMAGE_SUFFIXES)}) among {', '.join(sorted(sample.parts))}",
        )
    try:
        with open_picture(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        # Pillow's own text names the stream by its address in memory.
        raise BadSample(
            "undecodable", "its picture does not decode (cannot identify image file)"
        ) from None
    except _UNDECODABLE as error:
        raise BadSample("undecodable", f"its picture does not decode ({error})") from None


def class_of(sample: Sample, classes: int) -> int:
    """Return the sample's class, 0..classes-1; raises `BadSample`."""
    try:
        index = class_index_of(sample)
    except ShardError as error:
        raise BadSample("bad_class", str(error).removeprefix(f"{sample.label}: ")) from None
    if index is None:
        raise BadSample("no_class", "no class_index in its json and no cls member")
    if index >= classes:
        raise BadSample(
            "class_out_of_range",
            f"class {index} is outside 0..{classes - 1}, the {classes} classes of --classes; give "
            "the list that the shards were numbered by",
        )
    return index


def boxes_of(sample: Sample) -> tuple[Box, ...]:
    """Return the boxes of the sample's json, half open: `boxes` (a list), else `box`.

    Raises:
        BadSample: an unreadable json, or corners that are no box.
    """
    try:
        about = read_json_part(sample)
    except ShardError as error:
        raise BadSample("bad_box", str(error).removeprefix(f"{sample.label}: ")) from None
    given = about.get("boxes")
    if given is None:
        given = [] if about.get("box") is None else [about["box"]]
    if not isinstance(given, list) or not all(isinstance(box, list) for box in given):
        raise BadSample("bad_box", "its json's boxes are no list of [x0, y0, x1, y1]")
    try:
        return tuple(from_inclusive(box) for box in given)
    except ValueError as error:
        raise BadSample("bad_box", str(error)) from None


def has_class(sample: Sample) -> bool:
    """Tell whether a sample has a picture and names a class."""
    try:
        return image_part(sample) is not None and class_index_of(sample) is not None
    except ShardError:
        return False


def has_boxes(sample: Sample) -> bool:
    """Tell whether a sample has a picture and a box."""
    try:
        return image_part(sample) is not None and bool(boxes_of(sample))
    except BadSample:
        return False
