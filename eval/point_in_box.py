"""Patch Score and Point-in-Box on shards with boxes: `python -m eval.point_in_box --help`.

Several filters are scored in one pass. Beside the model always stand chance (mean share of patches
counted as hits), "always the middle" (on even grids the average of the four centre patches), and
the same tower with random weights (one draw; `--no-untrained` leaves it out). Not here: the
measurement (`pointing`), training probes.
"""

import argparse
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import nn

from lazyclip import tower
from lazyclip.base.config import write_json
from lazyclip.base.errors import UserError, cli, unknown
from lazyclip.base.logs import Progress, setup
from lazyclip.base.record import make_record, utc_now
from lazyclip.boxes import RULES
from lazyclip.factory import Built, build
from lazyclip.shards import expand
from lazyclip.zeroshot import TEMPLATE_NAMES, ClassList, read_classes, templates, text_features

from .commandline import RESULTS, Parser, check_output
from .models import add_model_flags, load_from_flags
from .pointing import (
    FILTERS,
    Found,
    Net,
    Row,
    Settings,
    make_prepare,
    make_row,
    measure,
    view_transform,
)
from .samples import (
    Tally,
    add_sample_flags,
    check_sample_flags,
    has_boxes,
    prepare_all,
    read_shards,
    survey,
)

log = logging.getLogger(__name__)
EXAMPLE = 'python -m eval.point_in_box --val-data "val/{00000..00001}.tar" --model logs/NAME/model'


def _parser() -> Parser:
    parser = Parser(EXAMPLE, "Score how often the best patch lies in the object's box.")
    add_sample_flags(parser)
    group = parser.add_argument_group("measure")
    add = group.add_argument
    add(
        "--q",
        choices=("own", "text"),
        default="own",
        help="what patches are compared with: the tower's own pooled vector, or the text feature "
        "of the image's class (default own)",
    )
    add("--rule", default="centre", help=f"hit rule: {', '.join(RULES)} (default centre)")
    add("--filter", default="single", help=f"images: {', '.join(FILTERS)}, or both with a comma")
    add(
        "--geometry",
        choices=("crop", "squash"),
        default="crop",
        help="resize the shorter side and crop the middle, or squash (default crop)",
    )
    add(
        "--resize",
        type=int,
        help="shorter side before the crop (default: the input size, as in open_clip's own "
        "preprocessing; the paper's released procedure is 256 for a 224 px input)",
    )
    add(
        "--space",
        choices=("pre", "post"),
        help="compare before or after the projection (default pre; --q text is always post)",
    )
    add("--classes", help="for --q text: the shards' classes in order, a file or a comma list")
    add(
        "--templates",
        default="openai",
        help=f"for --q text: {', '.join(TEMPLATE_NAMES)}, or a file with one {{}} a line",
    )
    add(
        "--untrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="score the same tower with random weights beside it",
    )
    add("--save-maps", type=Path, help="FILE.npz for each image's scores, votes, box and key")
    add_model_flags(parser)
    return parser


def read_settings(args: argparse.Namespace) -> Settings:
    """Turn flags into settings; raises `UserError` on what does not fit together."""
    names = tuple(dict.fromkeys(name.strip() for name in args.filter.split(",")))
    for name in names:
        if name not in FILTERS:
            raise unknown("--filter", name, FILTERS)
    if args.rule not in RULES:
        raise unknown("--rule", args.rule, RULES)
    if args.q == "text" and args.space == "pre":
        raise UserError("--q text lives after the projection; leave --space pre out")
    if args.q == "text" and not args.classes:
        raise UserError("--q text needs the class names: pass --classes FILE")
    if args.geometry == "squash" and args.resize is not None:
        raise UserError(f"--resize {args.resize} belongs to --geometry crop; leave one out")
    if args.save_maps is not None and args.save_maps.suffix != ".npz":
        raise UserError(f"--save-maps {args.save_maps} must end in .npz")
    space = args.space or ("post" if args.q == "text" else "pre")
    return Settings(args.rule, names, args.q, args.geometry, args.resize, space)


def fit_to_input(settings: Settings, size: tuple[int, int]) -> Settings:
    """Settle the resize of a crop for an input of (H, W); raises `UserError` where none fits."""
    if settings.geometry == "squash":
        return settings
    H, W = size
    if H != W:
        raise UserError(f"--geometry crop needs a square input, not {H} x {W}; use squash")
    resize = settings.resize if settings.resize is not None else H
    if resize < H:
        raise UserError(f"--resize {resize} is below the input's {H} px; use {H} or more")
    return dataclasses.replace(settings, resize=resize)


def untrained_twin(built: Built, seed: int) -> nn.Module:
    """Build the same tower, with the same pooling and size, with random weights from a seed."""
    info = built.info
    device = str(next(built.model.parameters()).device)
    side = info.image_size[0]
    saved = (Path(info.name) / "open_clip_config.json").is_file()
    if not saved and ":" not in info.name:
        return build(
            info.name,
            device=device,
            image_size=side,
            last=info.pooling,
            random_weights_seed=seed,
            force_quick_gelu=info.activation == "quickgelu",
        ).model
    name = f"local-dir:{info.name}" if saved else info.name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = open_clip.create_model(name, load_weights=False, force_image_size=side)
    tower.attach_spec(model, tower.pooling_of(built.model))
    return model.to(device).eval()


def make_nets(args: argparse.Namespace, built: Built, classes: ClassList | None) -> list[Net]:
    """Return the model and, unless left out, its untrained twin, with their text features."""
    models = [built.model]
    if args.untrained:
        # Another seed than the model's own random weights would have.
        models.append(untrained_twin(built, args.seed + 1))
    if classes is None:
        return [Net(model) for model in models]
    prompts = templates(args.templates)
    log.info("encoding %d texts", len(models) * len(classes.queries) * len(prompts))
    return [
        Net(
            model,
            text_features(model, built.tokenizer, classes.queries, prompts),
            classes.query_class,
        )
        for model in models
    ]


def table(rows: Sequence[Row], name: str) -> str:
    """Lay out the rows for people: per cent with one decimal, Wilson's interval at 95 %."""
    width = max(len(name), len("centre patch"))
    text = []
    for row in rows:
        left = ", ".join(f"{count} {reason}" for reason, count in row.excluded.items()) or "none"
        text.append(
            f"{row.filter}: {row.n} images (excluded: {left}; {row.no_centre} boxes hold no patch "
            "centre)"
        )
        text.append(f"{'':<{width}}  {'PiB':>5}  interval")
        for label, share, interval in (
            (name, row.pib, row.interval),
            ("untrained", row.untrained, row.untrained_interval),
            ("centre patch", row.centre, None),
            ("chance", row.chance, None),
        ):
            if share is None:
                continue
            span = "" if interval is None else f"{100 * interval[0]:.1f} .. {100 * interval[1]:.1f}"
            text.append(f"{label:<{width}}  {100 * share:>5.1f}  {span}".rstrip())
        text.append("")
    return "\n".join(text).rstrip()


def save_maps(path: Path, found: Found) -> None:
    """Write the maps of all scored pictures, whole or not at all.

    Arrays: keys B; scores B x h x w float32; votes B x h x w, empty unless the pooling is `last`;
    boxes B x 4, view pixels, half open; hit B; filters F, and taken F x B, which takes which.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    taken = np.array([found.taken[name] for name in found.taken])
    with part.open("wb") as stream:
        np.savez_compressed(
            stream,
            keys=np.array(found.keys),
            scores=torch.stack(found.scores).float().numpy(),
            votes=torch.stack(found.votes).numpy() if found.votes else np.zeros((0, 0, 0), int),
            boxes=np.array(found.boxes, dtype=np.float64),
            hit=np.array(found.hit),
            filters=np.array(list(found.taken)),
            taken=taken,
        )
    part.replace(path)
    log.info("maps of %d images written to %s", len(found.keys), path)


def write_results(
    folder: Path,
    rows: Sequence[Row],
    settings: Settings,
    grid: tuple[int, int],
    more: Mapping[str, object],
) -> None:
    """Write results.json: the first row's figures on top, all of them under `rows`."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [{**dataclasses.asdict(row), "rule": settings.rule, "q": settings.q} for row in rows]
    result = {
        **shown[0],
        "rows": shown,
        "geometry": settings.geometry,
        "resize": settings.resize,
        "space": settings.space,
        "grid": grid,
        **more,
    }
    write_json(folder / RESULTS, result)
    log.info("written to %s", folder)


def run(argv: Sequence[str] | None = None) -> None:
    """Score Point-in-Box on shards whose json carries boxes."""
    args = _parser().read(argv, "--val-data")
    setup()
    check_sample_flags(args)
    check_output(args.save_maps, args.overwrite, "--save-maps")
    settings = read_settings(args)
    classes = read_classes(args.classes) if args.q == "text" else None
    if classes is not None:
        templates(args.templates)
    shards = expand(args.val_data, "--val-data")
    built = load_from_flags(args)
    size, grid = built.info.image_size, built.info.grid
    settings = fit_to_input(settings, size)
    record = make_record(
        "eval.point_in_box", argv, {**vars(args), **dataclasses.asdict(settings)},
        device=args.device, dtype=args.precision,
        untrained_seed=args.seed + 1 if args.untrained else None,
    )  # fmt: skip
    need = "a picture and a box (box or boxes in its json)"
    total = survey(shards, args.limit, has_boxes, need)
    log.info("%d samples in %d shards, %s", total, len(shards), settings)
    tally = Tally(args.max_bad)
    prepare = make_prepare(
        settings, size, view_transform(built, settings), len(classes) if classes else None
    )
    cases = prepare_all(
        read_shards(shards, args.limit), prepare, tally, args.workers, args.batch_size
    )
    found = measure(
        cases, make_nets(args, built, classes), settings, grid=grid, batch_size=args.batch_size,
        precision=args.precision, keep_maps=args.save_maps is not None,
        progress=Progress(total, "images"),
    )  # fmt: skip
    rows = [make_row(found, name) for name in settings.filters]
    print(f"Point-in-Box, rule {settings.rule}, q {settings.q} ({settings.space} projection), "
          f"{settings.geometry}, {grid[0]} x {grid[1]} patches")  # fmt: skip
    print(table(rows, args.model))
    if tally.skipped:
        print(f"skipped: {', '.join(f'{n} {reason}' for reason, n in tally.skipped.items())}")
    if args.save_maps is not None:
        save_maps(args.save_maps, found)
    if args.output is not None:
        more = {
            "skipped": dict(tally.skipped),
            "model": built.info.to_dict(),
            "record": {**record, "end": utc_now()},
        }
        write_results(args.output, rows, settings, grid, more)


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
