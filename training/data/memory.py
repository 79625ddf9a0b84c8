"""How much memory windows take: an upper bound that follows from the index alone.

A process holds two windows of each of its lanes, one in use and one read ahead; lanes of a process
share a chunk, processes do not. Not here: what is done where it is too much (`within` of `exact`).
"""

import dataclasses
import functools
import math

import numpy as np
from numpy.typing import NDArray

from .chunks import SLACK, WHOLE_UP_TO
from .manifest import Manifest

# What Python keeps beside the bytes of chunks: of a sample of a chunk, of a slot of a window, of a
# lane.
RECORD, SLOT, LANE = 1024, 160, 4096
# The largest chunks whose sizes are looked at one by one; from there on they count as equal.
LARGEST = 1 << 16
# Chunks drawn at random take more than the bound with a probability below exp(-LIKELY) at a time.
LIKELY = 30


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Of the chunks of a pass.

    Fields: largest, sums of bytes of the n largest, n = 0..; mean, variance and maximum in bytes of
    a chunk that is drawn; all, bytes of all of them; samples of a pass; having, how many chunks
    have so many samples, from 0 on.
    """

    largest: NDArray[np.float64]
    mean: float
    variance: float
    maximum: float
    all: float
    samples: int
    having: NDArray[np.int64]


@functools.lru_cache(maxsize=1)
def _sizes(manifest: Manifest) -> _Sizes:
    there = np.flatnonzero(manifest.counts)
    counts, times = manifest.counts[there], manifest.chunk_factors[there]
    lengths = manifest.lengths[there]
    held = np.where(lengths <= WHOLE_UP_TO, lengths * SLACK, 0.0) + RECORD * manifest.chunk
    mean = float(np.average(held, weights=times))
    return _Sizes(
        np.concatenate([[0.0], np.cumsum(np.sort(held)[::-1][:LARGEST])]),
        mean,
        float(np.average((held - mean) ** 2, weights=times)),
        float(held.max()),
        float(held.sum()),
        int((counts * times).sum()),
        np.bincount(counts, weights=times).astype(np.int64),
    )


def _pieces(sizes: _Sizes, samples: int) -> int:
    """Return the most chunks that so many samples of a pass in a row touch: the smallest ones."""
    # Two at the ends may lie there with one sample each.
    left, pieces = samples - 2, 2
    for samples, chunks in enumerate(sizes.having.tolist()):
        if samples and left > 0:
            fit = min(chunks, left // samples)
            pieces, left = pieces + fit, left - fit * samples
    return pieces


def _of_chunks(sizes: _Sizes, n: int) -> float:
    """Return the most bytes that n different chunks take, drawn from one pass or two."""
    last = len(sizes.largest) - 1
    beyond = max(n - last, 0) * (sizes.largest[last] - sizes.largest[last - 1])
    worst = min(float(sizes.largest[min(n, last)] + beyond), sizes.all)
    # Bernstein's inequality; it holds for draws without putting back too.
    spread = math.sqrt(2 * n * sizes.variance * LIKELY)
    drawn = n * sizes.mean + spread + LIKELY / 3 * (sizes.maximum - sizes.mean)
    return min(worst, drawn)


def most_bytes(manifest: Manifest, lanes: int, window: int, own: int, processes: int) -> int:
    """Return the bytes that the windows of a rank take at most, with what lies beside them.

    Args:
        manifest: of the run.
        lanes: of all ranks.
        window: chunks of a window.
        own: lanes of the rank.
        processes: that share its lanes, 1 at least.
    """
    sizes = _sizes(manifest)
    length = -(-sizes.samples // lanes)
    each = min(window, _pieces(sizes, length))
    few, more = divmod(own, processes)
    held = 0.0
    for part, times in ((few, processes - more), (few + 1, more)):
        # Lanes next to each other share chunks; a process's are every `lanes // own`-th.
        most = min(part * each, _pieces(sizes, part * (lanes // own) * length))
        held += times * _of_chunks(sizes, 2 * most)
    slots = 2 * min(window * manifest.chunk, length)
    return math.ceil(held) + own * (LANE + slots * SLOT)
