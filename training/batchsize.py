"""The batch of a rank, from the batch of all: a recipe states what the optimiser sees.

Not here: a run that goes on, whose global batch its checkpoint says (`resume`).
"""

import dataclasses
from collections.abc import Mapping

from lazyclip.base.errors import UserError

from .params import TrainArgs


def share_batch(args: TrainArgs, given: Mapping[str, object], world: int) -> TrainArgs:
    """Return the settings with the batch of a rank that `--global-batch` leaves it.

    Args:
        args: settings; without `--global-batch` they come back as they are.
        given: what flags and recipe said, by field.
        world: ranks.

    Raises:
        UserError: the ranks cannot share the batch, or `--batch-size` says otherwise.
    """
    total = args.global_batch
    if total is None:
        return args
    parts = world * args.accum_freq
    ranks = f"{world} rank" + ("s" if world > 1 else "")
    pieces = f" x {args.accum_freq} pieces" if args.accum_freq > 1 else ""
    per_rank, rest = divmod(total, parts)
    if rest or not per_rank:
        near = " or ".join(f"{n}" for n in (total - rest, total - rest + parts) if n)
        raise UserError(
            f"--global-batch {total} cannot be shared by {ranks}{pieces}; use "
            f"{near_ranks(total, world, args.accum_freq, ', or ')}--global-batch {near}"
        )
    asked = given.get("batch_size")
    if isinstance(asked, int) and asked != per_rank:
        more = total // (asked * world)
        ways = [f"leave it out ({per_rank} per rank)"]
        if more * asked * world == total and more != args.accum_freq:
            ways.append(f"add --accum-freq {more}")
        raise UserError(
            f"--batch-size {asked} on {ranks}{pieces} makes {asked * parts}, and --global-batch "
            f"is {total}; {', '.join(ways)}, or give --global-batch {asked * parts}"
        )
    return dataclasses.replace(args, batch_size=per_rank)


def near_ranks(total: int, world: int, accum: int, end: str = "") -> str:
    """Phrase the numbers of ranks nearest to `world` that share the batch; empty without any."""
    near = _nearest(total, accum, world)
    ranks = "rank" if near == ["1"] else "ranks"
    return f"{' or '.join(near)} {ranks}{end}" if near else ""


def near_pieces(total: int, world: int, accum: int) -> str:
    """Phrase the `--accum-freq` nearest to `accum` that cut the batch; empty without any."""
    near = _nearest(total, world, accum)
    return f"--accum-freq {' or '.join(near)}" if near else ""


def _nearest(total: int, fixed: int, wanted: int) -> list[str]:
    """Name the divisors of `total / fixed` on both sides of a number that is none."""
    if total % fixed:
        return []
    fit = [n for n in range(1, total // fixed + 1) if (total // fixed) % n == 0]
    return [
        str(n) for n in (*[n for n in fit if n < wanted][-1:], *[n for n in fit if n > wanted][:1])
    ]
