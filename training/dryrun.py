"""`--dry-run`: the plan of a run in words, what it costs, and both as JSON.

With `--gpus N` it plans for machines that are not here: one process, no weights, no GPU, and data
only where they are named. Not here: how the figures come about (`costs`).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lazyclip.base.config import write_json
from lazyclip.base.errors import UserError
from lazyclip.factory import Built

from .costs import GPU_MEMORY, MFU, Costs, estimate
from .distributed import Place, find_place
from .params import TrainArgs
from .preflight import Data, Plan

GIB = 2**30


def check_dry_run(args: TrainArgs) -> None:
    """Check the flags of `--dry-run` among each other.

    Raises:
        UserError: one of them without it, a file that is not JSON, or a share that is none.
    """
    for flag in ("gpus", "gpu", "mfu"):
        if getattr(args, flag) is not None and args.dry_run is None:
            raise UserError(f"--{flag} only plans: add --dry-run, or leave it out")
    if args.dry_run not in (None, "print") and not args.dry_run.endswith(".json"):
        raise UserError(
            f"--dry-run {args.dry_run} names no JSON file; use --dry-run "
            f"{Path(args.dry_run).with_suffix('.json')}, or --dry-run alone to print only"
        )
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu:g} is no share above 0; use 0.3 for 30 % of the peak")
    if args.gpus is not None and args.resume is not None:
        raise UserError("--gpus plans a run from its start; leave --resume out")


def place_of(args: TrainArgs) -> Place:
    """Return this process's place, or the first of `--gpus` that are only planned for."""
    check_dry_run(args)
    if args.gpus is None:
        return find_place(args.device)
    if find_place("cpu").world > 1:
        raise UserError("--gpus plans in one process; leave torchrun or srun out")
    return Place(0, args.gpus, 0, torch.device("meta"), planned=True)


def costs_of(
    args: TrainArgs, plan: Plan, built: Built, data: Data, place: Place, precision: str
) -> Costs:
    """Estimate what a run costs; see `costs.estimate`."""
    size = None
    if data.exact is not None:
        manifest = data.exact.reader.manifest
        size = float(manifest.sizes.sum()) / max(int(manifest.records.sum()), 1)
    return estimate(
        built.model, built.info, args, plan, gpus=place.world, gpu=args.gpu or "a100",
        mfu=args.mfu or MFU, precision=precision, bytes_per_sample=size,
    )  # fmt: skip


def _times(number: float) -> str:
    return f"{number:.2g}" if number < 100 else f"{number:,.0f}"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB"


def _hours(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def describe_costs(costs: Costs) -> list[str]:
    """Phrase the costs for the banner, one line for each resource."""
    forward = costs.forward
    once = forward["image"] + forward["text"]
    again = f" + {costs.again / 1e9:.4g} computed again" if costs.again else ""
    memory, parts = costs.memory, dataclasses.asdict(costs.memory)
    told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    room = GPU_MEMORY[costs.gpu]
    size = "counted in the shards" if costs.measured else "as LAION's shards of that size have"
    lines = [
        f"cost: work: {once / 1e9:.4g} GFLOP a sample forward (image {forward['image'] / 1e9:.4g}, "
        f"text {forward['text'] / 1e9:.3g}; pooling {100 * forward['pooling'] / once:.2f} % more), "
        f"{costs.training / 1e9:.4g} in training{again}; the run {costs.flop:.3g} FLOP",
        f"cost: time: {_hours(costs.gpu_hours)} GPU hours of {costs.gpu} at {100 * costs.mfu:g} % "
        f"of {costs.peak / 1e12:g} TFLOP/s; on {costs.gpus} GPU{'s' if costs.gpus > 1 else ''} "
        f"{_hours(costs.hours)} hours, "
        f"{_times(costs.samples_per_s)} samples/s",
        f"cost: memory: {memory.total / GIB:.1f} GiB on each GPU ({told}); with CUDA's own and "
        f"fragmentation (1 GiB and a tenth) {memory.needed / GIB:.1f} GiB",
        f"cost: reading: {_bytes(costs.read_per_s)}/s ({_bytes(costs.bytes_per_sample)} a sample, "
        f"{size}); {_times(costs.decode_cores)} cores decode at {costs.samples_per_core:g} "
        "samples/s each",
        f"cost: disk: {_bytes(costs.checkpoint_bytes)} a checkpoint; at most "
        f"{costs.checkpoints} of them and the model at the end {_bytes(costs.kept_bytes)}",
    ]
    if memory.needed > room:
        lines.append(
            f"warning: more than the {room / GIB:.0f} GiB that {costs.gpu} cards of 80 GB have; "
            "use --grad-checkpointing, a larger --accum-freq, or more GPUs"
        )
    return lines


def cost_lines(
    args: TrainArgs, plan: Plan, built: Built, data: Data, place: Place, precision: str
) -> tuple[list[str], Costs | None]:
    """Return the lines of the costs and the costs; of an unknown tower one line that says so."""
    try:
        costs = costs_of(args, plan, built, data, place, precision)
    except UserError as error:
        return [f"cost: not estimated: {error}"], None
    return describe_costs(costs), costs


def tell(
    args: TrainArgs,
    banner: Sequence[str],
    plan: Plan,
    built: Built,
    data: Data,
    place: Place,
    precision: str,
) -> list[str]:
    """Return the plan and the costs in lines, and write them where `--dry-run FILE.json` says."""
    lines, costs = cost_lines(args, plan, built, data, place, precision)
    lines = [*banner, *lines]
    if args.dry_run in (None, "print"):
        return lines
    passes = None
    if data.exact is not None:
        passes = plan.samples / data.exact.reader.manifest.samples
    about: dict[str, Any] = {
        "args": dataclasses.asdict(args), "model": built.info.to_dict(),
        "plan": {**dataclasses.asdict(plan), "samples": plan.samples, "passes": passes},
        "precision": precision, "costs": costs.to_dict() if costs else None,
    }  # fmt: skip
    try:
        write_json(Path(str(args.dry_run)), about)
    except OSError as error:
        raise UserError(
            f"--dry-run {args.dry_run} cannot be written ({error.strerror}); give a file in a "
            "folder that you can write to"
        ) from None
    return lines
