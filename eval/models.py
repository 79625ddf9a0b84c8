"""The model of an evaluation: its flags, and the model they name.

Shared by every entry here. Not here: what is scored.
"""

import argparse
import logging
from pathlib import Path

import torch

from lazyclip.base.errors import UserError
from lazyclip.factory import Built, build, known_name
from lazyclip.poolflags import POOL_FLAGS, pool_overrides
from lazyclip.weights import CONFIG_FILE

log = logging.getLogger(__name__)
PRECISIONS = ("fp32", "amp_bf16")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a model, its weights, its pooling, and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="LaSt-ViT-B-16",
        help="a model name, or a saved model's or a run's folder",
    )
    group.add_argument("--pretrained", help="a tag, a weight file, or a saved model's folder")
    group.add_argument(
        "--random-weights", action="store_true", help="run without weights (scores mean nothing)"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    group.add_argument("--force-image-size", type=int, help="another input size in pixels")
    group.add_argument("--force-quick-gelu", action="store_true", help="ask for QuickGELU")
    add_run_flags(group)


def add_run_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say how a model pools and where it runs."""
    for row in POOL_FLAGS:
        group.add_argument(row.flag, help=row.help)
    group.add_argument("--device", help="default: cuda where there is one, else cpu")
    group.add_argument(
        "--precision", choices=PRECISIONS, help="default: amp_bf16 on cuda, fp32 on cpu"
    )
    group.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


def settle_machine(args: argparse.Namespace) -> None:
    """Set the CPU threads, and `args.device` and `args.precision` to what is used.

    Raises:
        UserError: too few threads, or a device that is not known or not there.
    """
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads} is too small; use 1 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(args.device)
    except RuntimeError:
        raise UserError(f"--device {args.device} is not known; use cuda, cuda:0 or cpu") from None
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: no CUDA device is visible; use --device cpu")
    args.precision = args.precision or ("amp_bf16" if args.device.startswith("cuda") else "fp32")


def load_from_flags(args: argparse.Namespace) -> Built:
    """Build the model that the flags name, in eval mode on its device.

    Sets `args.device`, `args.precision` and `args.model` (a run's folder means the model it left)
    to what is used.

    Raises:
        UserError: no weights and no `--random-weights`, or what `factory.build` refuses.
    """
    if (Path(args.model) / "model" / CONFIG_FILE).is_file():
        args.model = str(Path(args.model) / "model")  # a run's folder means the model it left
    known_name(args.model)
    saved = (Path(args.model) / CONFIG_FILE).is_file() or ":" in args.model
    if args.random_weights and (args.pretrained or saved):
        raise UserError("--random-weights and given weights exclude each other; leave one out")
    if not (args.pretrained or args.random_weights or saved):
        raise UserError(
            f"--model {args.model} has no weights: pass --pretrained TAG, a weight file or a saved "
            "folder (such as --pretrained logs/NAME/model), or --random-weights"
        )
    settle_machine(args)
    last = pool_overrides({row.field: getattr(args, f"last_{row.field}") for row in POOL_FLAGS})
    built = build(
        args.model,
        args.pretrained,
        device=args.device,
        image_size=args.force_image_size,
        last=last or None,
        random_weights_seed=args.seed,
        force_quick_gelu=args.force_quick_gelu,
    )
    info = built.info
    log.info(
        "model %s, weights %s, pooling %s, activation %s, %d x %d px, %d parameters",
        info.name, args.pretrained or ("random" if args.random_weights else "its own"),
        info.pooling if info.pooling["pooling"] == "last" else info.pooling["pooling"],
        info.activation, *info.image_size, info.parameters,
    )  # fmt: skip
    return built
