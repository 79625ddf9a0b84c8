"""Check this code against published figures, for people who hold the weights and the data sets.

    python scripts/accept.py --data-root data --imagenet-val imagenet/val
    python scripts/accept.py --weights ViT-B-16-quickgelu:metaclip_400m=b16_400m.pt

For each tag: the file's hash, the activation, and zero-shot top-1 on ImageNet; then the acceptance
rows, each a run of `eval.zeroshot_seg` of its own. Nothing is downloaded: what is not here is
named, and not checked. The figures are `configs/published/{weights,acceptance}.csv`. Exit codes: 0
all that could be checked passed, 1 something failed, 2 nothing could be checked or bad input.
Not here: the scores themselves (`eval`).
"""

import argparse
import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before anything reads it: the hub's client must not look for what is not in its cache.
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
for _folder in (ROOT, ROOT / "src"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

import open_clip  # noqa: E402

from eval.commandline import RESULTS, Parser  # noqa: E402
from eval.published import (  # noqa: E402
    Acceptance,
    KnownWeights,
    read_acceptance,
    read_weights,
)
from eval.zeroshot_cls import score  # noqa: E402
from lazyclip.base.config import read_json, write_json  # noqa: E402
from lazyclip.base.errors import UserError, cli, unknown  # noqa: E402
from lazyclip.base.logs import Progress, setup  # noqa: E402
from lazyclip.base.pictures import FILE_FORMATS, open_picture  # noqa: E402
from lazyclip.base.record import make_record  # noqa: E402
from lazyclip.factory import Built, build  # noqa: E402
from lazyclip.weights import file_sha256, tag_activation  # noqa: E402
from lazyclip.zeroshot import ClassList, class_list, read_classes, templates  # noqa: E402
from lazyclip.zeroshot import text_features as encode  # noqa: E402
from scripts.held import Held, expected_hash, find, read_given  # noqa: E402

log = logging.getLogger("accept")
EXAMPLE = "python -m scripts.accept --data-root data --imagenet-val imagenet/val"
TOP1_TOLERANCE = 0.2  # points: other decoders and resizers move a few of 50,000 pictures
PICTURES = (".jpg", ".jpeg", ".png")
OK, FAIL, MISSING, UNKNOWN = "ok", "FAIL", "missing", "unknown"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One line of the outcome; verdict is one of ok, FAIL, missing (not here), unknown."""

    check: str
    subject: str
    expected: str
    got: str
    verdict: str
    source: str = ""


def make_parser() -> Parser:
    """Make the parser of this command."""
    parser = Parser(EXAMPLE, "Check hashes, activations, top-1 and mIoU of weights that are here.")
    parser.add_argument("--data-root", type=Path, help="folder of the segmentation data sets")
    parser.add_argument("--imagenet-val", type=Path, help="folder of 1000 class folders (wnids)")
    parser.add_argument("--val-data", help="instead: shards with class_index in ImageNet's order")
    parser.add_argument(
        "--classes", help="class names in the folders' sorted order (default: open_clip's 1000)"
    )
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="MODEL:TAG=FILE",
        help="a weight file for a tag (default: the hub's cache)",
    )
    parser.add_argument("--tags", help="comma list of MODEL:TAG to check (default: all known)")
    parser.add_argument("--datasets", help="comma list of data sets (default: all with a row)")
    parser.add_argument("--output", type=Path, default=Path("logs/accept"), help="(logs/accept)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--batch-size", type=int, default=64, help="images or windows (64)")
    parser.add_argument(
        "--tables", type=Path, help="folder with another weights.csv and acceptance.csv"
    )
    return parser


def check_hash(held: Held) -> Verdict:
    """Compare the file's hash with what is known of it."""
    expected, source = expected_hash(held)
    got = file_sha256(held.file)
    if not expected:
        return Verdict("hash", held.name, "", got[:12], UNKNOWN, "no hash of this file is known")
    verdict = OK if got.startswith(expected) else FAIL
    return Verdict("hash", held.name, expected[:12], got[:12], verdict, source)


def check_activation(held: Held, built: Built) -> Verdict:
    """Compare the activation that the model runs, and the tag's, with that of the training."""
    known = held.known
    got, expected = built.info.activation, known.activation
    if open_clip.is_pretrained_cfg(known.model, known.tag):
        tagged = tag_activation(known.model, known.tag)
        got = got if tagged == got else f"{got}, the tag says {tagged}"
    return Verdict("activation", held.name, expected, got, OK if got == expected else FAIL)


def folder_pictures(folder: Path, classes: int) -> list[tuple[Path, int]]:
    """List (picture, class) of a folder of class folders, classes numbered by sorted name.

    Raises:
        UserError: another number of class folders, or one without a picture.
    """
    if not folder.is_dir():
        raise UserError(f"--imagenet-val {folder} is no folder")
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(inside) != classes:
        raise UserError(
            f"--imagenet-val {folder} holds {len(inside)} class folders, the class list "
            f"{classes}; give the folder whose folders are the classes"
        )
    pairs = []
    for index, place in enumerate(inside):
        files = sorted(f for f in place.iterdir() if f.suffix.lower() in PICTURES)
        if not files:
            raise UserError(f"{place} holds no picture ({', '.join(PICTURES)})")
        pairs += [(file, index) for file in files]
    return pairs


def class_names(spec: str | None) -> ClassList:
    """Return the class list: the one given, or the 1000 names that CLIP was scored with."""
    return read_classes(spec) if spec else class_list(open_clip.IMAGENET_CLASSNAMES)


def top1_of_folder(held: Held, built: Built, args: argparse.Namespace) -> float:
    """Score zero-shot classification of a folder; returns top-1, a fraction."""
    classes = class_names(args.classes)
    listed = folder_pictures(args.imagenet_val, len(classes))
    progress = Progress(len(listed), "images")
    features = encode(built.model, built.tokenizer, classes.queries, templates("openai"))

    def pictures() -> Iterator[tuple[object, int]]:
        for file, index in listed:
            try:
                with open_picture(file, FILE_FORMATS) as opened:
                    image = opened.convert("RGB")
            except (OSError, ValueError, SyntaxError) as error:
                raise UserError(f"{file} is not readable as a picture ({error})") from None
            yield built.preprocess_val(image), index

    scored = score(
        built.model, pictures(), features, classes,  # type: ignore[arg-type]
        batch_size=args.batch_size, progress=progress,
    )  # fmt: skip
    return scored.share(1) or 0.0


def run_entry(module: str, *words: str) -> tuple[int, str]:
    """Run a command of this checkout; returns its exit code and the last line it said."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return done.returncode, (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")


def model_words(held: Held, args: argparse.Namespace) -> list[str]:
    """Return the flags that name the model in a command of this checkout."""
    place = str(Path(held.pretrained).resolve()) if held.pretrained != held.known.tag else ""
    words = ["--model", held.known.model, "--pretrained", place or held.known.tag]
    return [*words, *(("--device", args.device) if args.device else ())]


def top1_of_shards(held: Held, args: argparse.Namespace) -> float:
    """Run `eval.zeroshot_cls` on shards; returns top-1, a fraction."""
    output = args.output.resolve() / f"cls-{held.known.model}-{held.known.tag}"
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.classes:
        spec = str(Path(args.classes).resolve()) if Path(args.classes).exists() else args.classes
    else:
        listed = args.output.resolve() / "imagenet-classes.txt"
        listed.write_text("\n".join(open_clip.IMAGENET_CLASSNAMES) + "\n", encoding="utf-8")
        spec = str(listed)
    code, said = run_entry(
        "eval.zeroshot_cls", "--val-data", _absolute(args.val_data), "--classes", spec,
        "--batch-size", str(args.batch_size), "--output", str(output), "--overwrite",
        "--precision", "fp32", *model_words(held, args),
    )  # fmt: skip
    if code:
        raise UserError(f"eval.zeroshot_cls ended with code {code}: {said}")
    return float(read_json(output / RESULTS)["top1"])


def _absolute(pattern: str) -> str:
    """Make the places of a shard pattern independent of the folder a command starts in."""
    parts = pattern.split("::")
    return "::".join(part if Path(part).is_absolute() else str(Path.cwd() / part) for part in parts)


def check_top1(held: Held, built: Built, args: argparse.Namespace) -> Verdict:
    """Compare zero-shot top-1 with the published figure."""
    known = held.known
    if not known.top1:
        return Verdict("top-1", held.name, "", "", UNKNOWN, "no published figure is known")
    if not (args.imagenet_val or args.val_data):
        why = "pass --imagenet-val DIR or --val-data SHARDS"
        return Verdict("top-1", held.name, known.top1, "", MISSING, why)
    found = top1_of_folder(held, built, args) if args.imagenet_val else top1_of_shards(held, args)
    got = 100 * found
    verdict = OK if abs(got - float(known.top1)) <= TOP1_TOLERANCE else FAIL
    within = f"{known.top1} +- {TOP1_TOLERANCE}"
    return Verdict("top-1", held.name, within, f"{got:.2f}", verdict, known.top1_source)


def judge(row: Acceptance, result: Mapping[str, Any]) -> tuple[str, str, str]:
    """Judge a segmentation result by an acceptance row.

    Returns:
        verdict, mIoU per cent, and why there is no verdict ("" where there is one).
    """
    got = 100 * float(result["miou"])
    if not result["complete"]:
        of = result["expected_images"] or "?"
        return MISSING, f"{got:.2f}", f"{result['images']} of {of} images: not the benchmark"
    near = abs(got - float(row.miou)) <= float(row.tolerance) + 1e-9
    return OK if near else FAIL, f"{got:.2f}", ""


def check_miou(row: Acceptance, held: Held | None, args: argparse.Namespace) -> Verdict:
    """Run one acceptance row as a process of its own, and compare its mIoU."""
    place = Path(row.dataset)
    word = place.stem if place.suffix else row.dataset
    subject = f"{word} {row.method} {row.protocol}, {row.model}:{row.tag}"
    expected = f"{row.miou} +- {row.tolerance}"

    def say(verdict: str, got: str, source: str = row.source) -> Verdict:
        return Verdict("mIoU", subject, expected, got, verdict, source)

    if held is None:
        return say(MISSING, "", "its weights are not here")
    if args.data_root is None:
        return say(MISSING, "", "pass --data-root DIR")
    output = args.output.resolve() / f"{word}-{row.protocol}-{row.method}-{row.model}-{row.tag}"
    dataset = str(place.resolve()) if place.suffix else row.dataset
    code, said = run_entry(
        "eval.zeroshot_seg", "--dataset", dataset, "--data-root", str(args.data_root.resolve()),
        "--protocol", row.protocol, "--method", row.method, "--batch-size", str(args.batch_size),
        "--output", str(output), "--overwrite", "--overlays", "0", "--precision", "fp32",
        *model_words(held, args),
    )  # fmt: skip
    if code == 2:
        # Not whole data are missing; data that were there and could not be scored have failed.
        failed = "could not be scored" in said or "not finite" in said
        return say(FAIL if failed else MISSING, "", said)
    if code:
        return say(FAIL, f"exit {code}", said)
    verdict, got, why = judge(row, read_json(output / RESULTS))
    return say(verdict, got, why or row.source)


def check_weights(row: KnownWeights, held: Held | str, args: argparse.Namespace) -> list[Verdict]:
    """Check a tag's file, activation and top-1; one line where it is not here."""
    if isinstance(held, str):
        return [Verdict("weights", f"{row.model}:{row.tag}", "", "", MISSING, held)]
    log.info("checking %s (%s)", held.name, held.file)
    lines = [check_hash(held)]
    try:
        built = build(row.model, held.pretrained, device=args.device or "cpu")
    except UserError as error:
        return [*lines, Verdict("activation", held.name, row.activation, "", FAIL, str(error))]
    lines.append(check_activation(held, built))
    if lines[0].verdict == FAIL:
        return [*lines, Verdict("top-1", held.name, row.top1, "", MISSING, "the hash is wrong")]
    return [*lines, check_top1(held, built, args)]


def table(lines: Sequence[Verdict]) -> str:
    """Lay the outcome out for people."""
    heads = ("check", "subject", "expected", "got", "verdict", "source or reason")
    rows = [heads, *(dataclasses.astuple(line) for line in lines)]
    wide = [max(len(row[i] or "-") for row in rows) for i in range(len(heads))]
    return "\n".join(
        "  ".join((cell or "-").ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip()
        for row in rows
    )


def _chosen(args: argparse.Namespace) -> tuple[list[KnownWeights], list[Acceptance]]:
    rows, wanted = list(read_weights(args.tables)), list(read_acceptance(args.tables))
    if args.tags:
        known = [f"{row.model}:{row.tag}" for row in rows]
        asked = [word.strip() for word in args.tags.split(",") if word.strip()]
        for name in asked:
            if name not in known:
                raise unknown("weights of --tags", name, known)
        rows = [row for row in rows if f"{row.model}:{row.tag}" in asked]
        wanted = [row for row in wanted if f"{row.model}:{row.tag}" in asked]
    if args.datasets:
        known = sorted({row.dataset for row in wanted})
        asked = [word.strip() for word in args.datasets.split(",") if word.strip()]
        for name in asked:
            if name not in known:
                raise unknown("data set with an acceptance row", name, known)
        wanted = [row for row in wanted if row.dataset in asked]
    return rows, wanted


class Failed(Exception):
    """Something that was checked is not as expected."""


def run(argv: Sequence[str] | None = None) -> None:
    """Check this code against published figures."""
    args = make_parser().read(argv)
    setup()
    if args.imagenet_val and args.val_data:
        raise UserError("--imagenet-val and --val-data exclude each other; leave one out")
    if args.imagenet_val:
        folder_pictures(args.imagenet_val, len(class_names(args.classes)))
    if args.data_root and not args.data_root.is_dir():
        raise UserError(f"--data-root {args.data_root} is no folder")
    rows, wanted = _chosen(args)
    given = read_given(args.weights, rows)
    found = {(row.model, row.tag): find(row, given) for row in rows}
    lines: list[Verdict] = []
    for row in rows:
        lines += check_weights(row, found[row.model, row.tag], args)
    for one in wanted:
        held = found.get((one.model, one.tag))
        lines.append(check_miou(one, held if isinstance(held, Held) else None, args))
    print(table(lines))
    counts = {word: sum(line.verdict == word for line in lines)
              for word in (OK, FAIL, MISSING, UNKNOWN)}  # fmt: skip
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    if not counts[OK] + counts[FAIL]:
        raise UserError(
            "nothing could be checked: no weights are here; fetch a tag where there is a network, "
            "or pass --weights MODEL:TAG=FILE"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    record = make_record("scripts.accept", argv, vars(args))
    verdicts = [dataclasses.asdict(line) for line in lines]
    write_json(args.output / "accept.json", {"counts": counts, "lines": verdicts, "record": record})
    if counts[FAIL]:
        raise Failed(f"{counts[FAIL]} of {counts[OK] + counts[FAIL]} checks failed")


def main(argv: Sequence[str] | None = None) -> int:
    """Check this code against published figures; returns the exit code."""
    try:
        return int(cli(run)(argv))
    except Failed as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
