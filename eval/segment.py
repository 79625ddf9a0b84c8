"""Segment anyone's pictures into classes given by words: masks, coloured masks, overlays.

    python -m eval.segment photos --classes "cat, sofa, wall" --model LaSt-ViT-B-16 \
        --pretrained logs/NAME/model --output masks

Not here: scores; there are no labels (`zeroshot_seg`).
"""

import argparse
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lazyclip.base.config import write_json
from lazyclip.base.errors import UserError, cli
from lazyclip.base.logs import Progress, setup
from lazyclip.base.record import make_record, shorten, utc_now
from lazyclip.dense import METHODS, refuse_method
from lazyclip.factory import Built
from lazyclip.zeroshot import ClassList, read_classes

from .commandline import RESULTS, Parser, add_output_flags, check_output
from .models import add_model_flags, load_from_flags
from .segflags import (
    add_engine_flags,
    add_protocol_flags,
    check_numbers,
    protocol_overrides,
    resolve_workers,
)
from .segmentation.engine import cosine_maps, predict
from .segmentation.loading import Broken, Item, Pictures, stream
from .segmentation.overlays import (
    Legend,
    generated_colours,
    overlay_alone,
    paint_ids,
    save_ids,
)
from .segmentation.protocol import Protocol, read_task, refuse_doubles
from .segmentation.readers.files import read_image
from .segmentation.separable import MAX_CLASSES
from .textcache import encode_queries

log = logging.getLogger(__name__)
MODULE = "eval.segment"
EXAMPLE = (
    f'python -m {MODULE} photos --classes "cat, sofa, wall" --model LaSt-ViT-B-16 '
    "--pretrained logs/NAME/model --output masks"
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
BASE = "voc20"  # whose protocols say how pictures are resized, cut and decided
MASKS, COLOURED, OVERLAYS = "masks", "coloured", "overlays"


@dataclasses.dataclass(frozen=True)
class Folder:
    """Pictures of a folder, or one picture, by id."""

    files: dict[str, Path]

    def read(self, name: str) -> tuple[npt.NDArray[np.uint8], None]:
        """Read a picture H x W x 3; it has no label."""
        return read_image(self.files[name])[0], None

    def image_file(self, name: str) -> Path:
        """Return the picture's file."""
        return self.files[name]


def make_parser() -> Parser:
    """Make the parser of this command."""
    parser = Parser(EXAMPLE, "Segment pictures into classes given by words.")
    parser.add_argument("pictures", nargs="?", type=Path, help="a picture, or a folder of them")
    parser.add_argument(
        "--classes",
        help="the classes: words such as 'cat, sofa, wall', a file (one class a line, synonyms by "
        "', '), or a shipped list such as ade20k; with --threshold the first is the background",
    )
    parser.add_argument("--max-bad", type=int, default=0, help="pictures that may fail (0)")
    add_output_flags(parser, "needed")
    add_protocol_flags(parser)
    add_engine_flags(parser)
    add_model_flags(parser)
    return parser


def find_pictures(place: Path) -> Folder:
    """Find the picture, or all pictures below a folder.

    An id is the path below the folder without its suffix; with it where two would be the same.

    Raises:
        UserError: nothing there, or no picture in it.
    """
    if place.is_file():
        return Folder({place.stem: place})
    if not place.is_dir():
        raise UserError(f"{place} does not exist; name a picture, or a folder of pictures")
    files = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"{place} holds no picture ({', '.join(SUFFIXES)}); name another folder")
    short = [str(p.relative_to(place).with_suffix("")) for p in files]
    twice = (
        {name for name in short if short.count(name) > 1} if len(set(short)) < len(short) else ()
    )
    names = [
        str(p.relative_to(place)) if name in twice else name
        for name, p in zip(short, files, strict=True)
    ]
    return Folder(dict(zip(names, files, strict=True)))


def make_protocol(args: argparse.Namespace, classes: ClassList) -> tuple[Protocol, list[Any]]:
    """Take a protocol of voc20 and put these classes in; returns it with its templates.

    Raises:
        UserError: too many classes for a mask, or a value out of range.
    """
    C = len(classes.names)
    if C > MAX_CLASSES:
        raise UserError(f"--classes gives {C} classes, a mask holds {MAX_CLASSES}; give fewer")
    overrides = protocol_overrides(args)
    # These two need a background, which the data set lent here has not.
    rules = {key: overrides.pop(key, 0.0) for key in ("threshold", "area")}
    for key, value in rules.items():
        if not 0 <= value <= 1:
            raise UserError(f"--{key} {value:g} is outside 0..1")
    if any(rules.values()) and C < 2:
        raise UserError("--threshold and --area need a background: name it as the first class")
    refuse_doubles(classes, "--classes")
    task = read_task(BASE, args.protocol, None, overrides or None)
    protocol = dataclasses.replace(
        task.protocol,
        dataset="pictures",
        split="",
        labels="none",
        background=any(rules.values()),
        classes=C,
        classes_sha256=classes.sha256,
        **rules,
    )
    return protocol, task.templates


def _write(item: Item, found: npt.NDArray[np.int64], legend: Legend, output: Path) -> None:
    save_ids(found, output / MASKS / f"{item.name}.png")
    coloured = output / COLOURED / f"{item.name}.png"
    sheet = output / OVERLAYS / f"{item.name}.png"
    for file in (coloured, sheet):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(paint_ids(found, legend.colours)).save(coloured)
    overlay_alone(item.image, found, legend).save(sheet)


def segment_all(
    folder: Folder,
    built: Built,
    protocol: Protocol,
    classes: ClassList,
    templates: list[Any],
    args: argparse.Namespace,
) -> tuple[dict[str, dict[str, float]], list[Broken]]:
    """Segment all pictures and write their files.

    Returns:
        Of each picture the share of its pixels by class, and the pictures that failed.
    """
    queries = encode_queries(built, classes.queries, templates, use_cache=not args.no_text_cache)
    maps = cosine_maps(
        built.model, queries, method=args.method, positions=protocol.positions,
        device=args.device, precision=args.precision,
    )  # fmt: skip
    legend = Legend(classes.names, generated_colours(len(classes.names)))
    pictures = Pictures(list(folder.files), folder, protocol, built.info.patch_size)
    progress = Progress(len(folder.files), "pictures")
    shares: dict[str, dict[str, float]] = {}
    broken: list[Broken] = []

    def readable() -> Iterator[Item]:
        for item in stream(pictures, resolve_workers(args, 1)):
            if isinstance(item, Broken):
                broken.append(item)
                log.warning("not segmented: %s", item.reason)
                progress.update(1)
            else:
                yield item

    for item, labels in predict(readable(), maps, protocol, classes.query_class, args.batch_size):
        found = labels.cpu().numpy().astype(np.int64)
        _write(item, found, legend, args.output)
        counts = np.bincount(found.ravel(), minlength=len(classes.names))
        shares[item.name] = {
            name: round(int(n) / found.size, 6)
            for name, n in zip(classes.names, counts, strict=True)
            if n
        }
        progress.update(1)
    return {name: shares[name] for name in folder.files if name in shares}, broken


def _check_output(output: Path, folder: Folder, overwrite: bool) -> None:
    check_output(output, overwrite)
    inside = [p for p in folder.files.values() if output.resolve() in p.resolve().parents]
    if inside:
        raise UserError(
            f"--output {output} holds the pictures themselves, such as {inside[0]}; give another "
            "folder"
        )


def run(argv: Sequence[str] | None = None) -> None:
    """Segment pictures into classes given by words."""
    args = make_parser().read(argv, "--classes", "--output")
    setup()
    if args.pictures is None:
        raise UserError(f"no picture is named; an example: {EXAMPLE}")
    check_numbers(args, max_bad=0)
    METHODS[args.method]  # an unknown name raises
    folder = find_pictures(args.pictures)
    classes = read_classes(args.classes)
    protocol, templates = make_protocol(args, classes)
    _check_output(args.output, folder, args.overwrite)
    built = load_from_flags(args)
    refuse_method(built.model, args.method)
    if args.random_weights:
        log.warning("random weights: the masks mean nothing")
    record = make_record(MODULE, argv, vars(args), device=args.device, protocol_hash=protocol.hash)
    shares, broken = segment_all(folder, built, protocol, classes, templates, args)
    record["end"] = utc_now()
    results = {
        "images": len(shares),
        "bad": [{"id": one.name, "reason": str(shorten(one.reason))} for one in broken],
        "classes": list(classes.names),
        "shares": shares,
        "protocol": protocol.to_dict(),
        "method": args.method,
        "model": {**built.info.to_dict(), "random_weights": args.random_weights},
        "record": record,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / RESULTS, results)
    print(f"{len(shares)} pictures segmented into {args.output}: {MASKS}, {COLOURED}, {OVERLAYS}")
    if len(broken) > args.max_bad:
        listed = "; ".join(one.reason for one in broken[:10])
        raise UserError(
            f"{len(broken)} of {len(folder.files)} pictures could not be segmented (--max-bad "
            f"{args.max_bad}): {listed}; {RESULTS} lists all"
        )


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
