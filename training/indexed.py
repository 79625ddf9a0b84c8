"""What a run reads by the exact loader: one index for all ranks, lanes and window within memory.

Nothing here writes into the run's folder. Not here: flags of other loaders, and the plan
(`preflight`).
"""

import dataclasses
import math
import os
import platform
from pathlib import Path
from typing import Any

from lazyclip.base.errors import UserError

from .data.chunks import Reader
from .data.exact import Exact
from .data.manifest import report
from .data.order import WINDOW, check_lanes, fewer_lanes, lanes_for
from .data.prepare import Prepared, Wanted, prepare, take_over, told
from .data.survey import How
from .distributed import Place, first_alone, gathered
from .params import TrainArgs


def exact_data(
    args: TrainArgs, place: Place, total: int, begun: bool = False
) -> tuple[Exact, int, list[str]]:
    """Find, index and check the shards.

    Args:
        args: of the run.
        place: of this rank.
        total: the global batch.
        begun: the order is that of a checkpoint, and so is the cap on its windows.

    Returns:
        How they are read, the samples of a pass, and lines about it for the banner.
    """
    lanes = args.lanes or lanes_for(total, place.world)
    check_lanes(total, lanes, place.world)
    wanted = Wanted(
        str(args.train_data), Path(args.logs) / (args.name or "manifests"),
        args.train_data_upsampling_factors, args.filter,
        Path(args.manifest) if args.manifest else None,
        How(processes=min(8, os.cpu_count() or 1)),
    )  # fmt: skip
    prepared = _prepared(wanted, place)
    manifest = prepared.manifest
    exact = Exact(
        Reader(manifest, prepared.shards), lanes, args.window or WINDOW, workers=args.workers
    )
    exact, lowered = _capped(exact, args, place, total, begun)
    order = exact.order(args.seed)
    if total > order.samples:
        raise UserError(
            f"the global batch of {total} is larger than a pass of {order.samples} samples: some "
            "would stand in it twice; lower --batch-size"
        )
    first, *others = report(manifest)
    room = exact.window_bytes(place.world) / 2**20
    lines = [
        f"exact loader, {first}",
        f"order: {exact.lanes} lanes, windows of at most {room:,.0f} MiB per rank ({exact.window} "
        "chunks a lane)",
        *lowered,
        *others,
    ]
    return exact, order.samples, lines


def _prepared(wanted: Wanted, place: Place) -> Prepared:
    """Let rank 0 look at the shards and index them; the others take what it found.

    On each machine one rank looks first: where the disk is the machine's own it indexes for all.
    """
    mine: list[Prepared] = []

    def look() -> dict[str, Any]:
        mine.append(prepare(wanted))
        return told(mine[0])

    found = first_alone(look, place)
    if place.world == 1 or place.planned:
        return mine[0]
    own = mistake = None
    here = platform.node()
    if place.local_rank == 0 and not mine:
        try:
            mine.append(take_over(wanted, found, first=True))
            own = told(mine[0]) if str(mine[0].file) != found["file"] else None
            if mine[0].manifest.sha256 != found["sha256"]:
                mistake = (
                    f"the shards on {here} differ from those on rank 0's machine "
                    f"({mine[0].manifest.samples:,} samples); copy them again, and remove "
                    f"{mine[0].file}"
                )
        except UserError as error:
            mistake = str(error)
    known = gathered((here, own, mistake), place)
    for _, _, wrong in known:
        if wrong is not None:
            raise UserError(wrong)
    if mine:
        return mine[0]
    own = next((there for machine, there, _ in known if machine == here and there), None)
    return take_over(wanted, own or found, first=False)


def _capped(
    exact: Exact, args: TrainArgs, place: Place, total: int, begun: bool
) -> tuple[Exact, list[str]]:
    """Keep the windows within `--window-memory`, by smaller or fewer ones where that is still free.

    A run that has begun may exceed it by a third, which is said: more loader processes, say, are no
    reason not to go on.

    Raises:
        UserError: the order is fixed, by `--lanes` or `--window` or by what the run began with, or
            windows of one chunk in the fewest lanes are too large.
    """
    most = args.window_memory * 2**30
    if exact.window_bytes(place.world) <= most:
        return exact, []
    fits = exact.within(most, place.world)
    free = args.window is None
    if free and args.lanes is None:
        fits = fits or _in_fewer_lanes(exact, most, place, total)
    if fits is not None and free:
        flags = f"--window {fits.window}"
        how = f"the window is lowered to {fits.window}"
        if fits.lanes != exact.lanes:
            flags = f"--lanes {fits.lanes} {flags}"
            how = f"lowered to {fits.lanes} lanes and windows of {_chunks(fits.window)}"
        return fits, [
            f"order: {_windows(exact, args, place)}: {how}; give {flags} to runs on another number "
            "of ranks that shall see this order"
        ]
    least = dataclasses.replace(exact, window=1) if free else exact
    more = math.ceil(100 * least.window_bytes(place.world) / 2**30) / 100
    ways = [f"use --window-memory {more:g}", "more ranks"]
    if args.resume is None:
        fewer = fewer_lanes(total, place.world, exact.lanes)
        ways += [
            *(["fewer --lanes"] if fewer else []),
            *([f"--window {fits.window}"] if fits else []),
        ]
    if args.workers > 1:
        ways.append("fewer --workers")
    text = f"{_windows(least, args, place)}; {' or '.join([', '.join(ways[:-1]), ways[-1]])}"
    if begun and exact.window_bytes(place.world) <= most * 4 / 3:
        return exact, [f"order: {text}"]
    raise UserError(text)


def _in_fewer_lanes(exact: Exact, most: float, place: Place, total: int) -> Exact | None:
    """Take the next smaller number of lanes that fits, with the largest window that does."""
    for lanes in fewer_lanes(total, place.world, exact.lanes):
        fits = dataclasses.replace(exact, lanes=lanes).within(most, place.world)
        if fits is not None:
            return fits
    return None


def _chunks(number: int) -> str:
    return f"{number} chunk" + ("s" if number > 1 else "")


def _windows(exact: Exact, args: TrainArgs, place: Place) -> str:
    need = exact.window_bytes(place.world) / 2**30
    each = f"each of {place.world} ranks" if place.world > 1 else "the one rank"
    return (
        f"windows of {_chunks(exact.window)} in {exact.lanes} lanes take {need:.2f} GiB on {each}, "
        f"and --window-memory allows {args.window_memory:g}"
    )
