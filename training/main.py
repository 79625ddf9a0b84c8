"""Train a CLIP model from shards: `torchrun -m training.main --model LaSt-ViT-B-16 ...`.

Order: flags, checks, model, plan; only then is a folder made. Not here: any of these steps.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lazyclip.base.config import write_json
from lazyclip.base.errors import UserError, cli
from lazyclip.base.logs import MetricsWriter, setup
from lazyclip.base.record import make_record, utc_now
from lazyclip.export import save_model
from lazyclip.factory import Built, build
from lazyclip.poolflags import POOL_FLAGS, pool_overrides

from .data.batches import Loading
from .data.pixels import decode_pixels, fast_of
from .data.reading import ReadFailed
from .data.samples import decode
from .distributed import Place, find_place, first_alone, from_first, process_group
from .feed import ExactFeed, Feed, SequentialFeed
from .ledger import cut_back_all, read_lines
from .loop import Loop, Run
from .optim import make_optimizer
from .params import Parsed, TrainArgs, parse
from .preflight import (
    Data,
    Plan,
    ValData,
    check_data,
    check_name,
    check_report,
    check_size,
    check_val,
    default_name,
    describe,
    has_tensorboard,
    in_use,
    make_plan,
)
from .probe import Probe
from .report import Curves
from .resume import (
    Resumed,
    check_manifest,
    find_checkpoint,
    model_info,
    read_checkpoint,
    set_aside,
    settings,
)
from .signals import Asked, Preempted, end_with_launcher, listening
from .state import weights_hash, write_status
from .watchdog import Watchdog

log = logging.getLogger(__name__)
# Pictures to bytes; whoever makes them floats does it on the device.
decode_fast = functools.partial(decode, decoder=decode_pixels)
# Saved, and to be started again with --resume latest.
PREEMPTED = 75


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that passed its preflight; the fields are what its parts say."""

    args: TrainArgs
    argv: Sequence[str] | None
    place: Place
    precision: str
    data: Data
    val: ValData | None
    plan: Plan
    built: Built
    resumed: Resumed | None
    banner: tuple[str, ...]


def build_model(args: TrainArgs, place: Place, resumed: Resumed | None = None) -> Built:
    """Build the model the flags name on this rank's device, towers locked as asked.

    Where a run goes on, its checkpoint stands for the weights it began with.
    """
    name, pretrained = args.model, args.pretrained
    if resumed is not None:
        saved = str(resumed.folder)
        name, pretrained = (saved, None) if Path(name).is_dir() else (name, saved)
    last = pool_overrides({row.field: getattr(args, f"last_{row.field}") for row in POOL_FLAGS})
    built = build(
        name,
        pretrained,
        device=str(place.device),
        image_size=args.force_image_size,
        last=last or None,
        random_weights_seed=args.seed,
        force_quick_gelu=args.force_quick_gelu,
    )
    if resumed is not None:
        built = dataclasses.replace(built, info=model_info(resumed, built))
    model: Any = built.model
    if args.lock_image:
        model.lock_image_tower(unlocked_groups=args.lock_image_unlocked_groups)
    if args.lock_text:
        model.lock_text_tower()
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.torchcompile:
        # In place, so that names of weights stay what they are.
        model.compile()
    return built


def wrap(model: nn.Module, place: Place) -> nn.Module:
    """Wrap for gradients over several ranks."""
    if place.world == 1:
        return model
    ids = [place.device.index] if place.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def open_curves(folder: Path, report_to: str, start: int = 0) -> Curves | None:
    """Open TensorBoard's writer in LOGS/NAME/tensorboard, where it is installed and asked for."""
    if report_to == "none":
        return None
    if not has_tensorboard():
        log.info("no curves: tensorboard is not installed; metrics.jsonl has the numbers")
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)


def make_folder(folder: Path, resume: bool) -> None:
    """Make the run's folder, which must be new unless the run goes on."""
    try:
        folder.mkdir(parents=True, exist_ok=resume or not in_use(folder))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}); give another --name or --logs"
        ) from None


def make_feed(job: Job) -> Feed:
    """Make what the loop is fed with."""
    args, place, built = job.args, job.place, job.built
    transform = built.preprocess_train if args.augment else built.preprocess_val
    exact = job.data.exact
    fast = fast_of(transform) if exact is not None else None
    loading = Loading(
        args.batch_size * args.accum_freq, fast or transform, built.tokenizer, args.seed,
        place.rank, place.world, args.workers, pin=place.device.type == "cuda",
    )  # fmt: skip
    if exact is not None:
        if fast is not None:
            exact = dataclasses.replace(exact, decode=decode_fast)
        return ExactFeed(exact, loading)
    if job.data.source is None:
        raise ValueError("neither loader has data")
    return SequentialFeed(job.data.source, loading)


def make_facts(job: Job) -> dict[str, Any]:
    """Collect what every checkpoint of a run repeats."""
    exact = job.data.exact
    before = job.resumed.state if job.resumed else None
    return {
        "args": dataclasses.asdict(job.args),
        "seed": job.args.seed,
        "global_batch": job.plan.global_batch,
        "lanes": exact.lanes if exact else 0,
        "window": exact.window if exact else 0,
        "manifest": exact.reader.manifest.sha256 if exact else "",
        "initial_weights": before["initial_weights"] if before else weights_hash(job.built.model),
    }


def make_loop(
    job: Job, record: dict[str, Any], folder: Path, asked: Asked, watchdog: Watchdog
) -> Loop:
    """Put the parts of a run together."""
    args, place, built, val = job.args, job.place, job.built, job.val
    probe = None
    if val is not None:
        probe = Probe(
            val, built.preprocess_val, built.tokenizer, place, args.batch_size,
            args.val_num_samples, watchdog.tick,
        )  # fmt: skip
    start = job.resumed.step if job.resumed else 0
    before = read_lines(folder / "metrics.jsonl") if place.first else []
    optimizer = make_optimizer(
        built.model, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps, wd=args.wd
    )
    return Loop(
        Run(
            args=args,
            plan=job.plan,
            place=place,
            precision=job.precision,
            model=built.model,
            wrapped=wrap(built.model, place),
            info=built.info,
            optimizer=optimizer,
            feed=make_feed(job),
            probe=probe,
            record=record,
            folder=folder,
            metrics=MetricsWriter(folder / "metrics.jsonl") if place.first else None,
            curves=open_curves(folder, args.report_to, start) if place.first else None,
            facts=make_facts(job),
            resumed=job.resumed,
            before=tuple(before),
            asked=asked,
            watchdog=watchdog,
        )
    )


def open_run(job: Job) -> tuple[Path, dict[str, Any]]:
    """Make the run's folder or take it up again; returns it and the run's record."""
    args, place = job.args, job.place
    name = from_first(args.name or default_name(args), place)
    folder = Path(args.logs) / name

    def make() -> None:
        make_folder(folder, args.resume is not None)
        setup(place.rank, folder / "out.log")
        if job.resumed is not None:
            set_aside(folder, job.resumed.step)
        cut_back_all(folder, job.resumed.step if job.resumed else -1)

    first_alone(make, place)
    for line in job.banner:
        log.info("%s", line)
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
        write_status(folder, "running", job.resumed.step if job.resumed else 0)
    return folder, record


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


def train(job: Job) -> None:
    """Make the run's folder, train, and leave the model in it."""
    folder, record = open_run(job)
    args, place = job.args, job.place
    # What a model draws while training (dropped patches, say) differs from rank to rank.
    torch.manual_seed(args.seed + place.rank)
    watchdog = Watchdog(folder, place.rank, args.watchdog_minutes)
    loop: Loop | None = None
    try:
        with listening() as asked:
            end_with_launcher()
            loop = make_loop(job, record, folder, asked, watchdog)
            watchdog.start()
            loop.run()
            with watchdog.paused():
                if place.first:
                    finish(folder, loop, job.built, record)
                from_first(None, place)
    except Preempted as saved:
        if loop is not None and place.first:
            end_early(folder, args, loop.step, f"{asked.by or 'signal'}: {saved}")
        raise SystemExit(PREEMPTED if args.loader == "exact" else 1) from None
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        step, again = (loop.step if loop else 0), can_be_tried_again(error)
        # Of what all ranks met alike rank 0 speaks; what the machine did to one it says itself.
        if place.first or again:
            write_status(folder, "failed", step, reason, again)
        raise
    finally:
        watchdog.stop()
        if loop is not None:
            loop.close()


def end_early(folder: Path, args: TrainArgs, step: int, reason: str) -> None:
    """Say that a run was asked to end: it can go on, unless its data were a stream."""
    if args.loader == "exact":
        write_status(folder, "preempted", step, reason, True)
        log.info("ended at step %d (%s); go on with --resume latest", step, reason)
        return
    write_status(folder, "failed", step, f"{reason}; --loader sequential cannot go on", False)
    log.info("ended at step %d (%s); a run of --loader sequential cannot go on", step, reason)


def finish(folder: Path, loop: Loop, built: Built, record: dict[str, Any]) -> None:
    """Write the model and the run's last words."""
    top1 = [{"step": step, "top1": value} for step, value in loop.top1]
    ended = {
        **record, "end": utc_now(), "probe": top1, "dropped": dict(loop.dropped),
        "skipped": loop.skips.total,
    }  # fmt: skip
    save_model(built.model, built.info, folder / "model", ended)
    write_json(folder / "params.json", ended)
    write_status(folder, "finished", loop.step)
    log.info("done: %s holds the model", folder / "model")


def prepare_job(parsed: Parsed, argv: Sequence[str] | None, place: Place) -> Job:
    """Do every check there is, and build the model; leaves no folder."""
    found = first_alone(lambda: _text(find_checkpoint(parsed.args)), place)
    resumed = read_checkpoint(Path(found)) if found else None
    args = settings(parsed, resumed, place.world) if resumed else parsed.args
    check_name(args)
    check_report(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    val = check_val(args)
    data = check_data(args, place)
    if resumed is not None and data.exact is not None:
        check_manifest(resumed, data.exact.reader.manifest.sha256)
    plan = make_plan(args, data.samples, place)
    precision = args.precision or ("amp_bf16" if place.device.type == "cuda" else "fp32")
    built = build_model(args, place, resumed)
    check_size(args, built.info)
    trainable = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    banner = describe(
        args, parsed.overrode, data, plan, built.info, place, precision, trainable
    )  # fmt: skip
    return Job(
        args, argv, place, precision, data, val, plan, built, resumed, tuple(banner)
    )  # fmt: skip


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def run(argv: Sequence[str] | None = None) -> None:
    """Train a CLIP model from shards."""
    parsed = parse(argv)
    place = find_place(parsed.args.device)
    setup(place.rank)
    with process_group(place):
        job = prepare_job(parsed, argv, place)
        if job.args.dry_run:
            if place.first:
                print("\n".join(job.banner))
            return
        train(job)


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
