"""Write data sets in the `wds` form that clip_benchmark reads, from shards; nothing is downloaded.

    ROOT/test/0.tar ... nshards.txt     pictures with cls (classification) or txt (retrieval)
    ROOT/dataset_type.txt               `retrieval` or `classification`
    ROOT/classnames.txt, zeroshot_classification_templates.txt

Not here: scoring them (`clip_bench`).
"""

import argparse
import dataclasses
import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lazyclip.base.config import write_json
from lazyclip.base.errors import UserError
from lazyclip.base.logs import Progress
from lazyclip.shards import IMAGE_SUFFIXES, Sample, ShardError, expand, image_part, read_json_part
from lazyclip.zeroshot import TEMPLATE_NAMES, ClassList, read_classes, templates

from .samples import BadSample, Tally, class_of, has_class, picture_of, read_shards, survey

log = logging.getLogger(__name__)
Parts = Mapping[str, bytes]


@dataclasses.dataclass(frozen=True)
class Form:
    """What is written besides pictures: the data set's type, its files by name, and the parts."""

    kind: str
    texts: Mapping[str, str]
    label: Callable[[Sample], tuple[str, bytes]]


def add_shard_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name shards, classes and the folder to write."""
    parser.add_argument("--from-shards", metavar="SHARDS", help="shards, such as a quoted pattern")
    parser.add_argument(
        "--classes",
        help="the shards' classes in the order of their index, a file or a list: classification; "
        "without it the captions are written, for retrieval",
    )
    parser.add_argument(
        "--templates",
        default="openai",
        help=f"prompts: {', '.join(TEMPLATE_NAMES)}, or a file with one {{}} a line (openai)",
    )
    parser.add_argument("--split", default="test", help="name of the split to write (test)")
    parser.add_argument("--limit", type=int, help="take the first N samples only")
    parser.add_argument("--max-bad", type=int, default=0, help="samples that may be left out (0)")
    parser.add_argument("--output", type=Path, metavar="ROOT", help="folder of the data set")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set there")


def captions_of(sample: Sample) -> list[str]:
    """Return all captions: `captions` of the json, else the txt; blanks and breaks made one.

    Raises:
        BadSample: none, or one that is no text.
    """
    try:
        given = read_json_part(sample).get("captions")
    except ShardError as error:
        raise BadSample("bad_json", str(error)) from None
    if given is None:
        given = [sample.parts.get("txt", b"").decode("utf-8", "replace")]
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise BadSample("bad_captions", "its json's captions are no list of texts")
    lines = [" ".join(text.split()) for text in given]
    kept = [line for line in lines if line]
    if not kept:
        raise BadSample("no_caption", "no caption (txt, or captions in json)")
    return kept


def _has_caption(sample: Sample) -> bool:
    try:
        return image_part(sample) is not None and bool(captions_of(sample))
    except BadSample:
        return False


def _classification(classes: ClassList, prompts: Sequence[Callable[[str], str]]) -> Form:
    if len(classes.queries) > len(classes):
        log.warning(
            "%d synonyms are left out: clip_benchmark knows one name for each class",
            len(classes.queries) - len(classes),
        )
    # Braces of a template are text to us and fields to clip_benchmark.
    texts = [prompt("\0").replace("{", "{{").replace("}", "}}") for prompt in prompts]
    return Form(
        "classification",
        {
            "classnames.txt": "\n".join(classes.names),
            "zeroshot_classification_templates.txt": "\n".join(
                text.replace("\0", "{c}") for text in texts
            ),
        },
        lambda sample: ("cls", str(class_of(sample, len(classes))).encode()),
    )


def _retrieval() -> Form:
    return Form("retrieval", {}, lambda sample: ("txt", "\n".join(captions_of(sample)).encode()))


def _picture(sample: Sample) -> tuple[str, bytes]:
    picture_of(sample)  # undecodable ones are named here, not in the middle of a score
    suffix = next(name for name in IMAGE_SUFFIXES if name in sample.parts)
    return suffix, sample.parts[suffix]


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _samples(
    shards: Sequence[Path], limit: int | None, form: Form, tally: Tally
) -> Iterator[tuple[Path, Parts]]:
    """Yield (shard, parts to write) of each good sample; bad ones go to the tally."""
    for sample in read_shards(shards, limit):
        try:
            yield sample.shard, dict([_picture(sample), form.label(sample)])
        except BadSample as error:
            tally.add(sample, error)


def _check(args: argparse.Namespace) -> None:
    for flag, value, low in (("--limit", args.limit, 1), ("--max-bad", args.max_bad, 0)):
        if value is not None and value < low:
            raise UserError(f"{flag} {value} is too small; use {low} or more")
    root: Path = args.output
    if root.exists() and not root.is_dir():
        raise UserError(f"--output {root} is a file; give a folder")
    if root.is_dir() and any(root.iterdir()):
        if not args.overwrite:
            raise UserError(f"--output {root} is not empty; give another, or --overwrite")
        if not (root / "dataset_type.txt").is_file():
            raise UserError(f"--output {root} holds something else than a data set of this form")
    place = root
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise UserError(f"--output {root}: {place} cannot be written to")


def write_wds(args: argparse.Namespace, record: Mapping[str, Any]) -> str:
    """Write the data set that the flags name; returns the command that scores it.

    The number of shards is written last: a data set that was cut short cannot be read.

    Raises:
        UserError: shards, classes or folder that do not fit, or a sample too many that is broken.
    """
    _check(args)
    shards = expand(args.from_shards, "--from-shards")
    if args.classes:
        form = _classification(read_classes(args.classes), templates(args.templates))
        need = "a picture and a class (class_index in json, or cls)"
        total = survey(shards, args.limit, has_class, need)
    else:
        form = _retrieval()
        total = survey(
            shards, args.limit, _has_caption, "a picture and a caption; for classes add --classes"
        )
    root, folder = args.output, args.output / args.split
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in {**form.texts, "dataset_type.txt": form.kind}.items():
        (root / name).write_text(text + "\n", encoding="utf-8")
    tally = Tally(args.max_bad)
    progress = Progress(total, "samples")
    written, number, labels = 0, -1, 0
    shard, tar = None, None
    try:
        for source, parts in _samples(shards, args.limit, form, tally):
            if tar is None or source != shard:
                if tar is not None:
                    tar.close()
                shard, number = source, number + 1
                tar = tarfile.open(folder / f"{number}.tar", "w")  # noqa: SIM115
            for suffix, content in parts.items():
                _add(tar, f"s{written:09d}.{suffix}", content)
            labels += parts["txt"].count(b"\n") + 1 if "txt" in parts else 1
            written += 1
            progress.update(1)
    finally:
        if tar is not None:
            tar.close()
    if not written:
        raise UserError(f"no sample is left to write; skipped {dict(tally.skipped)}")
    about = {"samples": written, "labels": labels, "skipped": dict(tally.skipped)}
    write_json(root / "record.json", {**about, "record": dict(record)})
    (folder / "nshards.txt").write_text(f"{number + 1}\n", encoding="utf-8")
    said = f"; left out {json.dumps(dict(tally.skipped))}" if tally.skipped else ""
    split = f" --split {args.split}" if args.split != "test" else ""
    return (
        f"{written} pictures, {labels} {'captions' if form.kind == 'retrieval' else 'labels'} in "
        f"{root} ({form.kind}{said}); score them with:\npython -m eval.clip_bench eval --dataset "
        f"wds/{root.name} --dataset_root {root}{split} --model NAME --pretrained TAG"
    )
