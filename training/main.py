"""Train a CLIP model from shards: `torchrun -m training.main --model LaSt-ViT-B-16 ...`.

Order: flags, checks, model, plan; only then is a folder made. Not here: any of these steps.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lazyclip.base.config import write_json
from lazyclip.base.errors import UserError, cli
from lazyclip.base.logs import MetricsWriter, setup
from lazyclip.base.record import make_record, utc_now
from lazyclip.export import save_model
from lazyclip.factory import Built, build
from lazyclip.poolflags import POOL_FLAGS, pool_overrides

from .data.batches import Loading, batches
from .data.sources import Source
from .distributed import Place, find_place, from_first, process_group
from .loop import Curves, Loop, Run
from .optim import make_optimizer
from .params import Parsed, TrainArgs, parse
from .preflight import (
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
    make_plan,
)
from .probe import Probe
from .state import write_status

log = logging.getLogger(__name__)


def build_model(args: TrainArgs, place: Place) -> Built:
    """Build the model the flags name on this rank's device, towers locked as asked."""
    last = pool_overrides({row.field: getattr(args, f"last_{row.field}") for row in POOL_FLAGS})
    built = build(
        args.model,
        args.pretrained,
        device=str(place.device),
        image_size=args.force_image_size,
        last=last or None,
        random_weights_seed=args.seed,
        force_quick_gelu=args.force_quick_gelu,
    )
    model: Any = built.model
    if args.lock_image:
        model.lock_image_tower(unlocked_groups=args.lock_image_unlocked_groups)
    if args.lock_text:
        model.lock_text_tower()
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return built


def wrap(model: nn.Module, place: Place) -> nn.Module:
    """Wrap for gradients over several ranks."""
    if place.world == 1:
        return model
    ids = [place.device.index] if place.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def open_curves(folder: Path, report_to: str) -> Curves | None:
    """Open TensorBoard's writer in LOGS/NAME/tensorboard, where it is installed and asked for."""
    if report_to == "none":
        return None
    if not has_tensorboard():
        log.info("no curves: tensorboard is not installed; metrics.jsonl has the numbers")
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


def make_folder(folder: Path) -> None:
    """Make the run's folder, which must be new."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}); give another --name or --logs"
        ) from None


def make_loop(
    args: TrainArgs, place: Place, built: Built, source: Source, val: ValData | None, plan: Plan,
    precision: str, record: dict[str, Any], folder: Path | None,
) -> Loop:  # fmt: skip
    """Put the parts of a run together; `folder` is rank 0's, else None."""
    transform = built.preprocess_train if args.augment else built.preprocess_val
    loading = Loading(
        args.batch_size, transform, built.tokenizer, args.seed, place.rank, place.world,
        args.workers, pin=place.device.type == "cuda",
    )  # fmt: skip
    probe = None
    if val is not None:
        probe = Probe(
            val, built.preprocess_val, built.tokenizer, place, args.batch_size, args.val_num_samples
        )
    return Loop(
        Run(
            args=args,
            plan=plan,
            place=place,
            precision=precision,
            model=built.model,
            wrapped=wrap(built.model, place),
            info=built.info,
            optimizer=make_optimizer(
                built.model, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps, wd=args.wd
            ),
            batches=batches(source, loading),
            probe=probe,
            record=record,
            folder=folder,
            metrics=MetricsWriter(folder / "metrics.jsonl") if folder else None,
            curves=open_curves(folder, args.report_to) if folder else None,
        )
    )


def train(
    parsed: Parsed, argv: Sequence[str] | None, place: Place, built: Built, source: Source,
    val: ValData | None, plan: Plan, precision: str, banner: Sequence[str],
) -> None:  # fmt: skip
    """Make the run's folder, train, and leave the model in it."""
    args = parsed.args
    name = from_first(args.name or default_name(args), place)
    folder = Path(args.logs) / name if place.first else None
    if folder is not None:
        make_folder(folder)
        setup(place.rank, folder / "out.log")
    for line in banner:
        log.info("%s", line)
    # What a model draws while training (dropped patches, say) differs from rank to rank.
    torch.manual_seed(args.seed + place.rank)
    record = make_record(
        "training.main", argv, dataclasses.asdict(args), device=str(place.device),
        ranks=place.world, precision=precision, model=built.info.to_dict(),
        plan=dataclasses.asdict(plan),
    )  # fmt: skip
    if folder is not None:
        write_json(folder / "params.json", record)
        write_status(folder, "running", 0)
    loop: Loop | None = None
    try:
        loop = make_loop(args, place, built, source, val, plan, precision, record, folder)
        loop.run()
        if folder is not None:
            finish(folder, loop, built, record)
    except BaseException as error:
        if folder is not None:
            reason = f"{type(error).__name__}: {error}"
            write_status(folder, "failed", loop.step if loop else 0, reason)
        raise
    finally:
        if loop is not None:
            loop.close()


def finish(folder: Path, loop: Loop, built: Built, record: dict[str, Any]) -> None:
    """Write the model and the run's last words."""
    top1 = [{"step": step, "top1": value} for step, value in loop.top1]
    ended = {**record, "end": utc_now(), "probe": top1, "dropped": dict(loop.dropped)}
    save_model(built.model, built.info, folder / "model", ended)
    write_json(folder / "params.json", ended)
    write_status(folder, "finished", loop.step)
    log.info("done: %s holds the model", folder / "model")


def run(argv: Sequence[str] | None = None) -> None:
    """Train a CLIP model from shards."""
    parsed = parse(argv)
    args = parsed.args
    place = find_place(args.device)
    setup(place.rank)
    check_name(args)
    check_report(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    source = check_data(args, place)
    val = check_val(args)
    plan = make_plan(args, source, place)
    precision = args.precision or ("amp_bf16" if place.device.type == "cuda" else "fp32")
    built = build_model(args, place)
    check_size(args, built.info)
    trainable = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    banner = describe(
        args, parsed.overrode, source, plan, built.info, place, precision, trainable
    )  # fmt: skip
    if args.dry_run:
        if place.first:
            print("\n".join(banner))
        return
    with process_group(place):
        train(parsed, argv, place, built, source, val, plan, precision, banner)


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
