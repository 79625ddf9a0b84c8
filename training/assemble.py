"""Put the parts of a run together: model, ranks, optimiser, feed, probe, loop.

Not here: the checks that come before (`preflight`), the order of it all (`main`).
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lazyclip.base.logs import MetricsWriter
from lazyclip.factory import Built, build
from lazyclip.poolflags import POOL_FLAGS, pool_overrides

from .data.batches import Loading
from .data.pixels import decode_pixels, fast_of
from .data.samples import decode
from .distributed import Place
from .feed import ExactFeed, Feed, SequentialFeed
from .ledger import read_lines
from .loop import Loop, Run
from .optim import make_optimizer, rates_of
from .params import TrainArgs
from .preflight import Data, Plan, ValData, has_tensorboard
from .probe import Probe
from .report import Curves
from .resume import Resumed, model_info
from .runlock import Hold
from .sharded import Sharded, shard
from .signals import Asked
from .state import weights_hash
from .watchdog import Watchdog

log = logging.getLogger(__name__)
# Pictures to bytes; whoever makes them floats does it on the device.
decode_fast = functools.partial(decode, decoder=decode_pixels)


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


def make_trained(
    model: nn.Module, args: TrainArgs, place: Place
) -> tuple[Sharded | None, nn.Module, torch.optim.Optimizer]:
    """Wrap a model or spread it over the ranks, and make the optimiser of what it is then."""
    sharded = shard(model, place) if args.fsdp and place.world > 1 else None
    wrapped = wrap(model, place) if sharded is None else model
    optimizer = make_optimizer(
        model, lr=rates_of(args), betas=(args.beta1, args.beta2), eps=args.eps, wd=args.wd
    )
    return sharded, wrapped, optimizer


def open_curves(folder: Path, report_to: str, start: int = 0) -> Curves | None:
    """Open TensorBoard's writer in LOGS/NAME/tensorboard, where it is installed and asked for."""
    if report_to == "none":
        return None
    if not has_tensorboard():
        log.info("no curves: tensorboard is not installed; metrics.jsonl has the numbers")
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)


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
    job: Job,
    record: dict[str, Any],
    folder: Path,
    asked: Asked,
    watchdog: Watchdog,
    hold: Hold,
) -> Loop:
    """Put the parts of a run together."""
    args, place, built, val = job.args, job.place, job.built, job.val
    probe = None
    if val is not None:
        probe = Probe(
            val, built.preprocess_val, built.tokenizer, place, args.batch_size,
            args.val_num_samples, watchdog.tick,
        )  # fmt: skip
    facts = make_facts(job)  # the hash of the first weights, while they are whole
    sharded, wrapped, optimizer = make_trained(built.model, args, place)
    start = job.resumed.step if job.resumed else 0
    before = read_lines(folder / "metrics.jsonl") if place.first else []
    return Loop(
        Run(
            args=args,
            plan=job.plan,
            place=place,
            precision=job.precision,
            model=built.model,
            wrapped=wrapped,
            info=built.info,
            optimizer=optimizer,
            feed=make_feed(job),
            probe=probe,
            record=record,
            folder=folder,
            metrics=MetricsWriter(folder / "metrics.jsonl") if place.first else None,
            curves=open_curves(folder, args.report_to, start) if place.first else None,
            facts=facts,
            resumed=job.resumed,
            before=tuple(before),
            asked=asked,
            watchdog=watchdog,
            hold=hold,
            sharded=sharded,
        )
    )
