"""Zero-shot classification of pictures in shards: `python -m eval.zeroshot_cls --help`.

Not here: the classifier (`lazyclip.zeroshot`), how shards are read (`samples`).
"""

import argparse
import csv
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lazyclip.base.config import write_json
from lazyclip.base.errors import UserError, cli
from lazyclip.base.logs import Progress, setup
from lazyclip.base.record import make_record, shorten, utc_now
from lazyclip.factory import Built, ModelInfo
from lazyclip.shards import Sample, expand
from lazyclip.zeroshot import (
    TEMPLATE_NAMES,
    ClassList,
    class_logits,
    read_classes,
    templates,
    text_features,
    topk_correct,
)

from .commandline import RESULTS, Parser
from .models import add_model_flags, load_from_flags
from .samples import (
    Tally,
    add_sample_flags,
    batches,
    check_sample_flags,
    class_of,
    has_class,
    picture_of,
    prepare_all,
    read_shards,
    survey,
)

log = logging.getLogger(__name__)
TOP = (1, 5)
EXAMPLE = (
    'python -m eval.zeroshot_cls --val-data "val/{00000..00001}.tar" --classes classes.txt '
    "--model logs/NAME/model"
)
FOREIGN = {
    "--imagenet-val": "folders of classes are not read; give shards with --val-data and --classes"
}


@dataclasses.dataclass(frozen=True)
class Scored:
    """Counts over all images.

    Fields: n images; correct, k -> images whose class is among the k best (k <= C only);
    per_class_n and per_class_correct (top-1), each C.
    """

    n: int
    correct: dict[int, int]
    per_class_n: list[int]
    per_class_correct: list[int]

    def share(self, k: int) -> float | None:
        """Return top-k accuracy, None where there are fewer than k classes."""
        return self.correct[k] / self.n if k in self.correct else None


def _parser() -> Parser:
    parser = Parser(
        EXAMPLE, "Score zero-shot classification on shards that carry classes.", FOREIGN
    )
    add_sample_flags(parser)
    parser.add_argument(
        "--classes",
        help="the shards' classes in the order of their index: a text file (one a line, synonyms "
        "by ', '), a classes.json, a shipped list, or a comma list",
    )
    parser.add_argument(
        "--templates",
        default="openai",
        help=f"prompts: {', '.join(TEMPLATE_NAMES)}, or a file with one {{}} a line",
    )
    add_model_flags(parser)
    return parser


def score(
    model: nn.Module,
    pairs: Iterable[tuple[Tensor, int]],
    query_features: Tensor,
    classes: ClassList,
    *,
    batch_size: int = 64,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Scored:
    """Classify pictures and count.

    Args:
        model: a CLIP model in eval mode.
        pairs: (3 x H x W, class index) of each picture.
        query_features: text features, Q x E, unit length, on the model's device.
        classes: whose queries they are.
        batch_size: images in one pass.
        precision: `fp32`, or `amp_bf16` for the tower; cosines are float32 in both.
        progress: updated by the images done.

    Raises:
        UserError: features that are not finite.
    """
    C, device = len(classes), query_features.device
    correct = {k: 0 for k in TOP if k <= C}
    seen = torch.zeros(C, dtype=torch.int64)
    right = torch.zeros(C, dtype=torch.int64)
    for batch in batches(pairs, batch_size):
        images = torch.stack([image for image, _ in batch]).to(device)
        targets = torch.tensor([target for _, target in batch])
        with (
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "amp_bf16"),
        ):
            features = model.encode_image(images)  # type: ignore[operator]
        logits = class_logits(features, query_features, classes.query_class, C).cpu()
        if not bool(logits.isfinite().all()):
            raise UserError("the model's features are not finite; its weights are damaged")
        for k, count in topk_correct(logits, targets, TOP).items():
            correct[k] += count
        best = logits.topk(min(max(TOP), C), dim=1).indices[:, 0]
        seen += torch.bincount(targets, minlength=C)
        right += torch.bincount(targets[best == targets], minlength=C)
        if progress is not None:
            progress.update(len(batch), f"top-1 {100 * correct[1] / int(seen.sum()):.1f} %")
    return Scored(int(seen.sum()), correct, seen.tolist(), right.tolist())


def table(scored: Scored, name: str, classes: int) -> str:
    """Lay out the result for people, per cent with one decimal."""
    cells = [scored.share(k) for k in TOP]
    shown = [f"{100 * cell:.1f}" if cell is not None else "-" for cell in cells]
    width = max(len(name), 5)
    head = f"{'model':<{width}}  {'top-1':>6}  {'top-5':>6}  {'chance':>6}  {'images':>7}"
    row = f"{name:<{width}}  {shown[0]:>6}  {shown[1]:>6}  {100 / classes:>6.1f}  {scored.n:>7}"
    return f"{head}\n{row}"


def result_parts(
    scored: Scored, classes: ClassList, tally: Tally, info: ModelInfo, prompts: str
) -> dict[str, Any]:
    """Lay a score out for results.json, all but the record."""
    return {
        "top1": scored.share(1),
        "top5": scored.share(5),
        "n": scored.n,
        "chance": 1 / len(classes),
        "skipped": dict(tally.skipped),
        "classes": {
            "n": len(classes), "absent": scored.per_class_n.count(0), "sha256": classes.sha256,
        },
        "templates": shorten(prompts),
        "model": info.to_dict(),
    }  # fmt: skip


def _write_per_class(path: Path, scored: Scored, classes: ClassList) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(["index", "name", "n", "correct", "top1"])
        counts = zip(classes.names, scored.per_class_n, scored.per_class_correct, strict=True)
        for index, (name, n, correct) in enumerate(counts):
            rows.writerow([index, name, n, correct, f"{correct / n:.6f}" if n else ""])


def classify(
    args: argparse.Namespace, built: Built, shards: list[Path], classes: ClassList, tally: Tally
) -> Scored:
    """Score a model on shards.

    Args:
        args: limit, templates, workers, batch_size, precision.
        built: the model.
        shards: files.
        classes: of the shards, by index.
        tally: counts bad samples.

    Raises:
        UserError: shards without classes, too many bad samples, or no image left.
    """
    C = len(classes)
    total = survey(
        shards, args.limit, has_class, "a picture and a class (class_index in json, or cls)"
    )
    log.info("%d samples in %d shards, %d classes", total, len(shards), C)
    prompts = templates(args.templates)
    log.info("encoding %d texts", len(classes.queries) * len(prompts))
    features = text_features(built.model, built.tokenizer, classes.queries, prompts)

    def prepare(sample: Sample) -> tuple[Tensor, int]:
        return built.preprocess_val(picture_of(sample)), class_of(sample, C)

    pairs = prepare_all(
        read_shards(shards, args.limit), prepare, tally, args.workers, args.batch_size
    )
    scored = score(
        built.model, pairs, features, classes,
        batch_size=args.batch_size, precision=args.precision, progress=Progress(total, "images"),
    )  # fmt: skip
    if not scored.n:
        raise UserError(f"no image is left to score; skipped {dict(tally.skipped)}")
    return scored


def run(argv: Sequence[str] | None = None) -> None:
    """Score zero-shot classification on shards that carry classes."""
    args = _parser().read(argv, "--val-data", "--classes")
    setup()
    check_sample_flags(args)
    classes = read_classes(args.classes)
    templates(args.templates)
    shards = expand(args.val_data, "--val-data")
    built = load_from_flags(args)
    record = make_record(
        "eval.zeroshot_cls", argv, vars(args), device=args.device, dtype=args.precision
    )
    tally = Tally(args.max_bad)
    scored = classify(args, built, shards, classes, tally)
    absent = scored.per_class_n.count(0)
    if absent:
        log.warning("%d of %d classes have no image here", absent, len(classes))
    print(table(scored, args.model, len(classes)))
    if tally.skipped:
        print(f"skipped: {', '.join(f'{n} {reason}' for reason, n in tally.skipped.items())}")
    if args.output is None:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    _write_per_class(args.output / "per_class.csv", scored, classes)
    about = result_parts(scored, classes, tally, built.info, args.templates)
    write_json(args.output / RESULTS, {**about, "record": {**record, "end": utc_now()}})
    log.info("written to %s", args.output)


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
