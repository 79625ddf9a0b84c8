"""Which shards there are, how many samples they hold, and in which order they are read.

Not here: what a sample must hold (`samples`).
"""

import dataclasses
import itertools
import json
import logging
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from lazyclip.base.errors import UserError
from lazyclip.shards import (
    IMAGE_SUFFIXES,
    Sample,
    ShardError,
    expand,
    iterate_samples,
    split_sources,
)

from .pipes import PREFIX, output

log = logging.getLogger(__name__)
# Counting means reading: above this the user is asked for the number.
COUNT_LIMIT = 2 << 30
# So many samples of the first shard must hold one that fits, or the run does not start.
LOOK_AT = 200


def fits(parts: set[str]) -> bool:
    """Tell whether a sample's suffixes hold a picture and a caption."""
    return "txt" in parts and any(suffix in parts for suffix in IMAGE_SUFFIXES)


def suffix_table(counts: dict[str, int], looked: int) -> str:
    """Phrase the suffixes seen, most frequent first: `jpg in 200, json in 200 of 200 samples`."""
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{suffix} in {n}" for suffix, n in rows[:12]) + f" of {looked} samples"


def stream_samples(shard: Path, command: str | None) -> Iterator[Sample]:
    """Yield a shard's samples, from its file or from what a command writes."""
    if command is None:
        yield from iterate_samples(shard)
        return
    with output(command) as stream:
        yield from iterate_samples(shard, stream)


def require_captions(
    shards: list[Path], flag: str = "--train-data", commands: Mapping[Path, str] | None = None
) -> None:
    """Check that the first shards hold a sample with a picture and a caption.

    Raises:
        UserError: none of the first samples fits; lists the suffixes they have.
        ShardError: the first shard cannot be read at all.
    """
    counts: dict[str, int] = {}
    looked = 0
    for shard in shards:
        for sample in stream_samples(shard, (commands or {}).get(shard)):
            if fits(set(sample.parts)):
                return
            looked += 1
            for suffix in sample.parts:
                counts[suffix] = counts.get(suffix, 0) + 1
            if looked >= LOOK_AT:
                break
        if looked >= LOOK_AT:
            break
    seen = suffix_table(counts, looked) if looked else "no samples at all"
    raise UserError(
        f"{flag} {shards[0]}: no sample has a picture ({', '.join(IMAGE_SUFFIXES)}) and a caption "
        f"(txt); seen: {seen}; a sample is KEY.jpg and KEY.txt side by side in a tar"
    )


def count_samples(shards: list[Path], flag: str = "--train-num-samples") -> int:
    """Count samples: from `NNNNN_stats.json` beside each shard, else by reading the shards.

    Raises:
        UserError: too much to read; names the flag to give instead.
    """
    total, unknown = 0, []
    for shard in shards:
        stats = _stats_count(shard)
        if stats is None:
            unknown.append(shard)
        else:
            total += stats
    size = sum(shard.stat().st_size for shard in unknown)
    if size > COUNT_LIMIT:
        raise UserError(
            f"{len(unknown)} of {len(shards)} shards ({size / 2**30:.0f} GiB) have no _stats.json "
            f"to tell their samples; pass {flag} N (samples in an epoch)"
        )
    counts: dict[Path, int] = {}
    for shard in unknown:
        if shard not in counts:
            counts[shard] = _count_fitting(shard)
        total += counts[shard]
    if total == 0:
        raise UserError(f"the {len(shards)} shards hold no usable sample")
    return total


def _count_fitting(shard: Path) -> int:
    count = 0
    try:
        for sample in iterate_samples(shard):
            count += fits(set(sample.parts))
    except ShardError as error:
        log.warning("%s", error)
    return count


def _stats_count(shard: Path) -> int | None:
    stem = shard.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
    file = shard.with_name(f"{stem}_stats.json")
    if not file.is_file():
        return None
    try:
        successes = json.loads(file.read_text(encoding="utf-8"))["successes"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        log.warning("%s has no readable 'successes' (%r); the shard is read instead", file, error)
        return None
    return successes if isinstance(successes, int) and successes >= 0 else None


class Turn(NamedTuple):
    """A shard's turn in a lane.

    Fields: number, the pass it belongs to, or the draw where shards are drawn; slot, its place in
    the pattern's order; shard. Number and slot together never come twice in a run.
    """

    number: int
    slot: int
    shard: Path


@dataclasses.dataclass(frozen=True)
class Source:
    """The shards of a run.

    Fields: shards, in the order of the pattern; samples, in one epoch; resampled, whether shards
    are drawn with replacement; weights of the draw, one for each shard, empty: all alike;
    commands, what the shell runs for those shards that are no files, by the shard's name.
    """

    shards: tuple[Path, ...]
    samples: int
    resampled: bool
    weights: tuple[float, ...] = ()
    commands: Mapping[Path, str] = dataclasses.field(default_factory=dict)

    def lane(self, seed: int, lane: int, lanes: int) -> Iterator[Turn]:
        """Give a lane (one loader process of one rank) its shards, without end.

        Each pass hands every shard to exactly one lane, in an order of its own; resampled, a lane
        draws by itself, as often as the same shard may come.

        Args:
            seed: of the order.
            lane: 0..lanes - 1.
            lanes: ranks times loader processes.

        Returns:
            The turns of its shards.
        """
        slots = list(range(len(self.shards)))
        if self.resampled:
            draw = random.Random(f"{seed} resampled {lane} of {lanes}")
            for number in itertools.count(lane, lanes):
                slot = draw.choices(slots, self.weights)[0] if self.weights else draw.choice(slots)
                yield Turn(number, slot, self.shards[slot])
        for number in itertools.count():
            order = slots.copy()
            random.Random(f"{seed} pass {number}").shuffle(order)
            yield from (Turn(number, slot, self.shards[slot]) for slot in order[lane::lanes])


def _piped(source: str, allowed: bool) -> dict[Path, str]:
    """Return the commands of a `pipe:` source, braces expanded, by name; refused unless allowed."""
    if not allowed:
        raise UserError(
            f"--train-data {source} is a shell command, which --allow-pipe would run; or copy the "
            "shards and name the files"
        )
    return {Path(name): name.removeprefix(PREFIX) for name in braceexpand(source)}


def _expanded(source: str, allow_pipe: bool, commands: dict[Path, str]) -> list[Path]:
    """Expand one source; the commands of a pipe are added to `commands`."""
    if not source.startswith(PREFIX):
        return expand(source, "--train-data")
    piped = _piped(source, allow_pipe)
    commands.update(piped)
    return list(piped)


def _weighed(
    pattern: str, factors: str, allow_pipe: bool, commands: dict[Path, str]
) -> tuple[list[Path], list[float]]:
    """Expand each source and give its shards its factor.

    Raises:
        UserError: another number of factors than sources, or one that is no number above zero.
    """
    flag = f"--train-data-upsampling-factors {factors}"
    sources, words = split_sources(pattern), factors.split("::")
    if len(words) != len(sources):
        raise UserError(
            f"{flag}: {len(words)} factors for {len(sources)} sources; give one for each"
        )
    shards: list[Path] = []
    weights: list[float] = []
    for source, word in zip(sources, words, strict=True):
        try:
            factor = float(word)
        except ValueError:
            factor = 0.0
        if not 0 < factor < math.inf:
            raise UserError(f"{flag}: '{word}' is no number above 0")
        found = _expanded(source, allow_pipe, commands)
        shards += found
        weights += [factor] * len(found)
    return shards, weights


def open_source(
    pattern: str, samples: int | None, resampled: bool, lanes: int, workers: int,
    factors: str | None = None, allow_pipe: bool = False,
) -> Source:  # fmt: skip
    """Find and check the shards of a run.

    Args:
        pattern: see `lazyclip.shards.expand`.
        samples: in an epoch; None counts them.
        resampled: draw shards with replacement.
        lanes: ranks times loader processes.
        workers: loader processes per rank, for the message.
        factors: such as `2::0.5`, one for each source: resampled, weights of the draw; else how
            often its shards come in a pass, whole numbers.
        allow_pipe: run the shell commands of `pipe:` sources.

    Raises:
        UserError: no shards, fewer shards than lanes, no sample with picture and caption.
    """
    weights: list[float] = []
    commands: dict[Path, str] = {}
    if factors is None:
        sources = split_sources(pattern) or [pattern]
        shards = [path for one in sources for path in _expanded(one, allow_pipe, commands)]
    else:
        shards, weights = _weighed(pattern, factors, allow_pipe, commands)
        if not resampled:
            if any(weight != int(weight) for weight in weights):
                raise UserError(
                    f"--train-data-upsampling-factors {factors}: fractions need "
                    "--dataset-resampled; use whole numbers"
                )
            shards = [s for s, n in zip(shards, weights, strict=True) for _ in range(int(n))]
            weights = []
    if len(shards) < lanes and not resampled:
        ranks = lanes // max(workers, 1)
        remedy = (
            f"use --workers {len(shards) // ranks}"
            if len(shards) >= ranks
            else "make more, smaller shards"
        )
        raise UserError(
            f"{len(shards)} shards < {ranks} ranks x {max(workers, 1)} workers; {remedy}, or "
            "--dataset-resampled"
        )
    if commands and samples is None:
        raise UserError(
            "what pipe: commands write cannot be counted beforehand; pass --train-num-samples N "
            "(samples in an epoch)"
        )
    require_captions(shards, commands=commands)
    return Source(
        tuple(shards), samples or count_samples(shards), resampled, tuple(weights), commands
    )
