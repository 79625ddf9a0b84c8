"""Time variants side by side: one call of each a round, in one process, threads pinned.

A machine shared with others moves the same code by a factor between two minutes; the ratio of two
variants that alternate within the same rounds moves far less. With one thread the processor time of
that thread is taken (CPU autograd runs backward in the calling thread), with more the wall clock.
Not here: what is compared.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

MIN_REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one variant over the rounds that were kept.

    Fields: median, lower and upper quartile, fastest round; then median and quartiles of
    baseline / variant, each taken within one round (1 for the baseline itself).
    """

    median: float
    lower: float
    upper: float
    fastest: float
    ratio: float
    ratio_lower: float
    ratio_upper: float


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile, interpolated between values."""
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, middle, upper


def interleave(
    variants: Mapping[str, Callable[[], object]],
    baseline: str,
    repeats: int = MIN_REPEATS,
    warmup: int = 1,
) -> dict[str, Timing]:
    """Time variants in alternating rounds.

    Args:
        variants: name -> call; each must do its whole work before it returns.
        baseline: the variant that the ratios refer to.
        repeats: rounds kept, at least 7.
        warmup: rounds before them that are dropped.

    Returns:
        name -> timing, in the order given. A ratio above 1 means faster than the baseline.

    Raises:
        ValueError: fewer than 7 repeats, or a baseline that is no variant.
    """
    if repeats < MIN_REPEATS or baseline not in variants:
        raise ValueError(f"repeats = {repeats} (at least {MIN_REPEATS}), baseline = {baseline!r}")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for turn in range(warmup + repeats):
        # Each round starts with another variant, so that none always follows the same one.
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            variants[name]()
            spent = clock() - start
            if turn >= warmup:
                seconds[name].append(spent)
    return {name: _timing(values, seconds[baseline]) for name, values in seconds.items()}


def _timing(values: list[float], base: list[float]) -> Timing:
    lower, median, upper = quartiles(values)
    low, middle, high = quartiles([b / v for b, v in zip(base, values, strict=True)])
    return Timing(median, lower, upper, min(values), middle, low, high)


def pin_threads(threads: int) -> None:
    """Fix the number of torch's CPU threads for the whole process."""
    torch.set_num_threads(threads)


def machine() -> dict[str, object]:
    """Describe what the figures were taken on: processor, its vector sets, threads, load, torch."""
    model, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        rows = [line.partition(":")[::2] for line in info.read_text().splitlines()]
        fields = {key.strip(): value.strip() for key, value in rows}
        model, flags = fields.get("model name", model), fields.get("flags", "")
    vectors = [name for name in ("avx2", "avx512f", "avx512_bf16") if name in flags.split()]
    return {
        "cpu": model,
        "vectors": vectors,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "processor time of the thread" if torch.get_num_threads() == 1 else "wall",
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }
