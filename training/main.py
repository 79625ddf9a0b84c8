"""Train a CLIP model from shards: `torchrun -m training.main --model LaSt-ViT-B-16 ...`.

Order: flags, checks, model, plan; only then is a folder made. Not here: any of these steps.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lazyclip.base.config import write_json
from lazyclip.base.errors import UserError, cli
from lazyclip.base.logs import setup
from lazyclip.base.record import make_record, utc_now
from lazyclip.export import save_model
from lazyclip.factory import Built

from .assemble import Job, build_model, make_loop
from .batchsize import share_batch
from .data.reading import ReadFailed
from .distributed import Place, first_alone, from_first, process_group
from .dryrun import place_of, tell
from .ledger import cut_back_all
from .loop import Loop
from .optim import describe_rates, rates_of
from .params import Parsed, TrainArgs, parse
from .preflight import (
    check_data,
    check_name,
    check_report,
    check_size,
    check_unused,
    check_val,
    default_name,
    describe,
    level_of,
    make_plan,
)
from .resume import (
    check_manifest,
    find_checkpoint,
    read_checkpoint,
    run_folder,
    set_aside,
    settings,
)
from .runlock import Hold, RunLock, claim, run_lock, share
from .sharded import describe_shares, in_one_piece
from .signals import Preempted, end_with_launcher, listening
from .state import write_refused, write_status
from .watchdog import Watchdog

log = logging.getLogger(__name__)
# Saved, and to be started again with --resume latest.
PREEMPTED = 75


def make_folder(folder: Path, resume: bool, lock: RunLock) -> None:
    """Make the run's folder, which must be new unless the run goes on, and lock it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}); give another --name or --logs"
        ) from None
    lock.take(folder)
    if not resume:
        # Another run may have begun and ended here while this one looked at its data.
        check_unused(folder, locked=True)


def open_run(job: Job, lock: RunLock) -> tuple[Path, dict[str, Any], Hold]:
    """Make the run's folder or take it up again; returns it, the run's record and the hold."""
    args, place = job.args, job.place
    name = from_first(args.name or default_name(args), place)
    folder = Path(args.logs) / name

    def make() -> None:
        make_folder(folder, args.resume is not None, lock)
        setup(place.rank, folder / "out.log")
        if job.resumed is not None:
            set_aside(folder, job.resumed.step)
        cut_back_all(folder, job.resumed.step if job.resumed else -1)

    first_alone(make, place)
    hold = share(folder, place, lock)
    for line in job.banner:
        log.log(level_of(line, place), "%s", line)
    if job.resumed is not None:
        log.info("resumed from %s", job.resumed.folder.name)
    elif args.resume is not None:
        log.info("--resume latest: no checkpoint in %s yet; starts at step 0", folder)
    more = {"resumed": job.resumed.folder.name} if job.resumed else {}
    record = make_record(
        "training.main", job.argv, dataclasses.asdict(args), device=str(place.device),
        ranks=place.world, precision=job.precision, model=job.built.info.to_dict(),
        plan=dataclasses.asdict(job.plan), **more,
    )  # fmt: skip
    if place.first:
        write_json(folder / "params.json", record)
        write_status(folder, "running", job.resumed.step if job.resumed else 0, hold=hold)
    return folder, record, hold


def can_be_tried_again(error: BaseException) -> bool:
    """Tell whether a failure is one of the machine: reading, writing, another rank's end."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, OSError | ReadFailed | dist.DistError):
        return True
    text = str(error).lower()
    words = (
        "gloo",
        "nccl",
        "connection closed",
        "connection reset",
        "killed by signal",
        "exited unexpectedly",
    )
    full = "os error 28" in text or "no space left" in text
    return full or (isinstance(error, RuntimeError) and any(word in text for word in words))


def train(job: Job, lock: RunLock, last: contextlib.ExitStack) -> None:
    """Make the run's folder, train, and leave the model in it.

    Args:
        job: what is trained.
        lock: of the folder.
        last: takes what is to be done behind the end of the process group.
    """
    folder, record, hold = open_run(job, lock)
    args, place = job.args, job.place
    # What a model draws while training (dropped patches, say) differs from rank to rank.
    torch.manual_seed(args.seed + place.rank)
    watchdog = Watchdog(folder, place.rank, args.watchdog_minutes, hold=hold)
    last.callback(watchdog.stop)
    loop: Loop | None = None
    try:
        with listening() as asked:
            end_with_launcher()
            loop = make_loop(job, record, folder, asked, watchdog, hold)
            watchdog.start()
            loop.run()
            with (
                watchdog.paused(),
                in_one_piece(
                    loop.run_.sharded, job.built.model, torch.device("cpu"), place.first
                ) as model,
            ):
                if place.first:
                    hold.keep()
                    finish(folder, loop, dataclasses.replace(job.built, model=model), record)
                from_first(None, place)
            watchdog.leave(0)
    except Preempted as saved:
        code = PREEMPTED if args.loader == "exact" else 1
        watchdog.leave(code)
        if loop is not None and place.first:
            end_early(folder, args, loop.step, f"{asked.by or 'signal'}: {saved}", hold)
        raise SystemExit(code) from None
    except BaseException as error:
        watchdog.leave(2 if isinstance(error, UserError) else 1)
        reason = f"{type(error).__name__}: {error}"
        step, again = (loop.step if loop else 0), can_be_tried_again(error)
        # Of what all ranks met alike rank 0 speaks; what the machine did to one it says itself.
        if place.first or again:
            write_status(folder, "failed", step, reason, again, hold)
        raise
    finally:
        if loop is not None:
            loop.close()


def end_early(folder: Path, args: TrainArgs, step: int, reason: str, hold: Hold) -> None:
    """Say that a run was asked to end: it can go on, unless its data were a stream."""
    if args.loader == "exact":
        write_status(folder, "preempted", step, reason, True, hold)
        log.info("ended at step %d (%s); go on with --resume latest", step, reason)
        return
    said = f"{reason}; --loader sequential cannot go on"
    write_status(folder, "failed", step, said, False, hold)
    log.info("ended at step %d (%s); a run of --loader sequential cannot go on", step, reason)


def finish(folder: Path, loop: Loop, built: Built, record: dict[str, Any]) -> None:
    """Write the model and the run's last words."""
    top1 = [{"step": step, "top1": value} for step, value in loop.top1]
    start = loop.alarm.start if loop.alarm is not None else None
    if loop.alarm is not None:
        loop.alarm.say_end()
    ended = {
        **record, "end": utc_now(), "probe": top1, "probe_start": start,
        "dropped": dict(loop.dropped), "skipped": loop.skips.total,
    }  # fmt: skip
    save_model(built.model, built.info, folder / "model", ended)
    write_json(folder / "params.json", ended)
    write_status(folder, "finished", loop.step)
    log.info("done: %s holds the model", folder / "model")


def usual_precision(device: torch.device) -> str:
    """Return the precision of a run that names none."""
    return "fp32" if device.type == "cpu" else "amp_bf16"


def prepare_job(parsed: Parsed, argv: Sequence[str] | None, place: Place) -> Job:
    """Do every check there is, and build the model; leaves no folder."""
    found = first_alone(lambda: _text(find_checkpoint(parsed.args)), place)
    resumed = read_checkpoint(Path(found)) if found else None
    args = (
        settings(parsed, resumed, place.world)
        if resumed
        else (share_batch(parsed.args, parsed.given, place.world))
    )
    check_name(args)
    check_report(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    val = check_val(args)
    data = check_data(args, place, resumed is not None and "window_memory" not in parsed.given)
    if resumed is not None and data.exact is not None:
        check_manifest(resumed, data.exact.reader.manifest.sha256)
    plan = make_plan(args, data.samples, place)
    usual = usual_precision(place.device)
    precision = args.precision or usual
    # What a run resolves it keeps, on whatever device it goes on.
    args = dataclasses.replace(args, precision=precision)
    built = build_model(args, place, resumed)
    check_size(args, built.info)
    trainable = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    banner = describe(
        args, parsed.overrode, data, plan, built.info, place, precision, trainable
    )  # fmt: skip
    if resumed is not None and precision != usual and "precision" not in parsed.given:
        banner.append(f"precision: {precision} as before, where {place.device.type} begins {usual}")
    banner += describe_rates(built.model, rates_of(args))
    if args.fsdp:
        banner.append(describe_shares(built.model, place))
    return Job(
        args, argv, place, precision, data, val, plan, built, resumed, tuple(banner)
    )  # fmt: skip


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def run(argv: Sequence[str] | None = None) -> None:
    """Train a CLIP model from shards."""
    parsed = parse(argv)
    place = place_of(parsed.args)
    setup(place.rank)
    with contextlib.ExitStack() as last:
        lock = last.enter_context(run_lock())
        with process_group(place):
            claimed = None if parsed.args.dry_run else claim(run_folder(parsed), place, lock)
            try:
                job = prepare_job(parsed, argv, place)
            except UserError as error:
                if claimed is not None:
                    write_refused(claimed, f"UserError: {error}")
                raise
            if job.args.dry_run:
                if place.first:
                    lines = tell(
                        job.args, job.banner, job.plan, job.built, job.data, place, job.precision
                    )
                    print("\n".join(lines))
                return
            train(job, lock, last)


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
