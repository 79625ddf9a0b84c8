"""Mix a start model and its fine-tune, and score the mixtures: the WiSE-FT curve.

    python -m eval.interpolate --start LaSt-ViT-B-16/openai --tuned logs/NAME \
        --val-data "val/{00000..00009}.tar" --classes classes.txt --dataset voc20 --output out

Every mixture is scored with the tuned model's pooling; one more row has the start model with the
pooling its weights were trained with. Not here: mixing (`mixing`), what is left (`interpolated`).
"""

import argparse
import dataclasses
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lazyclip.base.config import read_json, write_json
from lazyclip.base.errors import UserError, cli
from lazyclip.base.logs import setup
from lazyclip.base.record import make_record, shorten, utc_now
from lazyclip.export import save_model
from lazyclip.factory import Built
from lazyclip.poolflags import POOL_FLAGS, pool_overrides
from lazyclip.shards import expand
from lazyclip.tower import attach_spec, pooling_of
from lazyclip.zeroshot import ClassList, read_classes, templates

from . import zeroshot_seg
from .commandline import RESULTS, Parser, add_output_flags, check_output
from .endpoints import Endpoints, load_endpoints
from .interpolated import WRITTEN, table, write_results
from .mixing import parse_alphas
from .models import add_run_flags, settle_machine
from .ranks import Ranks
from .runs import pooling_words
from .samples import Tally
from .seg_run import write_scores
from .segmentation.job import Job
from .zeroshot_cls import classify, result_parts

log = logging.getLogger(__name__)
MODULE = "eval.interpolate"
EXAMPLE = (
    f"python -m {MODULE} --start LaSt-ViT-B-16/openai --tuned logs/NAME "
    '--val-data "val/{00000..00009}.tar" --classes classes.txt --dataset voc20 --output out'
)
SCORES = "scores.json"
START = "start"
THREADS = 2  # that decode
# What two runs must have in common for the first one's scores to stand.
SAME = "other than what is asked for here"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is scored: shares, shards and classes (None without --val-data), benchmarks."""

    alphas: tuple[float, ...]
    saved: tuple[float, ...]
    shards: tuple[Path, ...]
    classes: ClassList | None
    jobs: tuple[Job, ...]
    seg: argparse.Namespace | None


def make_parser() -> Parser:
    """Make the parser of this command."""
    parser = Parser(EXAMPLE, "Mix a start model and its fine-tune, and score each mixture.")
    pair = parser.add_argument_group("models")
    pair.add_argument(
        "--start", help="what the fine-tune began with: MODEL/TAG, a folder, a file, or a tag"
    )
    pair.add_argument("--tuned", help="the fine-tuned run's folder, or one of its checkpoints")
    pair.add_argument(
        "--alphas", default="0,0.1,...,1", help="shares of the tuned weights (0,0.1,...,1)"
    )
    pair.add_argument(
        "--save", metavar="ALPHAS", help="write these mixtures as OUTPUT/model-ALPHA, scored or not"
    )
    add_run_flags(pair)
    shards = parser.add_argument_group("zero-shot classification")
    shards.add_argument("--val-data", help="shards with classes, or their folder")
    shards.add_argument("--classes", help="their classes: a file, a shipped list, a comma list")
    shards.add_argument("--templates", default="openai", help="prompts (openai)")
    shards.add_argument("--limit", type=int, help="read this many samples only")
    dense = parser.add_argument_group("zero-shot segmentation")
    dense.add_argument("--dataset", help="benchmarks as in eval.zeroshot_seg: a name or a list")
    dense.add_argument("--data-root", help="see eval.zeroshot_seg")
    dense.add_argument("--protocol", help="see eval.zeroshot_seg")
    dense.add_argument("--method", default="vanilla", help="dense features (vanilla)")
    dense.add_argument("--seg-limit", type=int, help="score the first N images only")
    how = parser.add_argument_group("how it is run")
    how.add_argument("--batch-size", type=int, default=64, help="images or windows in a pass (64)")
    how.add_argument(
        "--workers",
        type=int,
        help=f"threads that decode ({THREADS}), and "
        "processes that read for segmentation; 0: one thread, no process",
    )
    how.add_argument("--max-bad", type=int, default=0, help="bad images that may be left out (0)")
    how.add_argument("--no-text-cache", action="store_true", help="see eval.zeroshot_seg")
    add_output_flags(how, "needed")
    how.add_argument("--resume", action="store_true", help="keep the shares that are scored")
    return parser


def _seg_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags of `zeroshot_seg` that this command's mean."""
    given = {
        "--dataset": args.dataset,
        "--data-root": args.data_root,
        "--protocol": args.protocol,
        "--limit": args.seg_limit,
        "--workers": args.workers,
        "--method": args.method,
        "--max-bad": args.max_bad,
        "--batch-size": args.batch_size,
        "--output": args.output,
        "--overlays": 0,
    }
    words = [str(w) for flag, value in given.items() if value is not None for w in (flag, value)]
    # What is there of other runs has gone, or is to be gone on with.
    words += ["--resume", *(["--no-text-cache"] if args.no_text_cache else [])]
    seg = zeroshot_seg.make_parser().read(words)
    seg.device, seg.precision = args.device, args.precision
    return seg


def _check(args: argparse.Namespace) -> Wanted:
    """Check all that can be checked before a model is built."""
    alphas = parse_alphas(args.alphas)
    saved = parse_alphas(args.save, "--save") if args.save else ()
    for name, low in (("limit", 1), ("seg_limit", 1), ("batch_size", 1), ("workers", 0),
                      ("max_bad", 0)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} {value} is below {low}")
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other; leave one out")
    if not (args.val_data or args.dataset or saved):
        raise UserError(
            f"nothing to do: give --val-data and --classes, --dataset, or --save; such as {EXAMPLE}"
        )
    if bool(args.val_data) != bool(args.classes):
        raise UserError("--val-data and --classes belong together; give both")
    check_output(args.output, args.overwrite or args.resume)
    _check_taken(args, saved)
    templates(args.templates)
    classes = read_classes(args.classes) if args.classes else None
    shards = tuple(expand(args.val_data, "--val-data")) if args.val_data else ()
    settle_machine(args)
    seg = _seg_flags(args) if args.dataset else None
    jobs = tuple(zeroshot_seg.prepare_jobs(seg)) if seg is not None else ()
    return Wanted(alphas, saved, shards, classes, jobs, seg)


def _check_taken(args: argparse.Namespace, saved: Sequence[float]) -> None:
    """Refuse a folder with the shares of another run, and models that are there."""
    if args.overwrite or not args.output.is_dir():
        return
    there = sorted(p.name for p in args.output.glob("alpha-*"))
    if there and not args.resume:
        raise UserError(
            f"{args.output} holds {len(there)} scored shares of a run that was cut short; go on "
            "with --resume, or start anew with --overwrite"
        )
    for alpha in saved:
        if _model_folder(args.output, alpha).exists() and not args.resume:
            raise UserError(
                f"{_model_folder(args.output, alpha)} exists; give another --output, or --overwrite"
            )


def _model_folder(output: Path, alpha: float) -> Path:
    return output / f"model-{alpha:g}"


def _alpha_folder(output: Path, alpha: float | None) -> Path:
    return output / ("alpha-" + START if alpha is None else f"alpha-{alpha:g}")


def _asked(args: argparse.Namespace, wanted: Wanted, ends: Endpoints) -> dict[str, Any]:
    """Say what is scored, so that only scores of the same are gone on with."""
    info = ends.built.info
    return {
        "start": ends.sha256[0],
        "tuned": ends.sha256[1],
        "pooling": pooling_words(info.pooling),
        "image_size": list(info.image_size),
        "precision": args.precision,
        "val_data": [shard.name for shard in wanted.shards],
        "classes": wanted.classes.sha256 if wanted.classes else None,
        "templates": shorten(args.templates),
        "limit": args.limit,
        "protocols": [job.task.protocol.hash for job in wanted.jobs],
        "seg_images": [len(job.names) for job in wanted.jobs],
        "method": args.method,
    }


def _earlier(file: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a share's scores, None where they are not there.

    Raises:
        UserError: they are of something else, with what differs.
    """
    if not file.is_file():
        return None
    held = read_json(file)
    of = held.get("of", {})
    differing = [key for key in asked if of.get(key) != asked[key]]
    if differing:
        raise UserError(
            f"{file} holds scores of {', '.join(differing)} {SAME}; give another --output, or "
            "--overwrite to start anew"
        )
    return held


def _zero_shot(
    args: argparse.Namespace, wanted: Wanted, built: Built, folder: Path, argv: Sequence[str] | None
) -> dict[str, Any]:
    if wanted.classes is None:
        return {}
    record = make_record(MODULE, argv, vars(args), device=args.device, dtype=args.precision)
    threads = THREADS if args.workers is None else max(args.workers, 1)
    how = argparse.Namespace(**{**vars(args), "workers": threads})
    tally = Tally(args.max_bad)
    scored = classify(how, built, list(wanted.shards), wanted.classes, tally)
    info = dataclasses.replace(built.info, pooling=pooling_of(built.model).to_dict())
    found = result_parts(scored, wanted.classes, tally, info, args.templates)
    # As eval.zeroshot_cls leaves it, so that eval.table finds it.
    (folder / "cls").mkdir(parents=True, exist_ok=True)
    write_json(folder / "cls" / RESULTS, {**found, "record": {**record, "end": utc_now()}})
    return {key: found[key] for key in ("top1", "top5", "n", "skipped")}


def _dense(
    wanted: Wanted, built: Built, folder: Path, argv: Sequence[str] | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seg = wanted.seg
    if seg is None:
        return found
    for job in wanted.jobs:
        name = job.task.benchmark.dataset
        own = dataclasses.replace(job, output=folder / name)
        scores, broken = write_scores(own, built, argv, seg, Ranks(), MODULE)
        if len(broken) > seg.max_bad:
            raise UserError(
                f"{len(broken)} images of {name} could not be scored (--max-bad "
                f"{seg.max_bad}): {broken[0].reason}; mend them, and go on with --resume"
            )
        found[name] = {
            "miou": None if scores is None else scores.miou,
            "images": len(job.names) - len(broken),
        }
    return found


def score_share(
    args: argparse.Namespace,
    wanted: Wanted,
    ends: Endpoints,
    alpha: float | None,
    argv: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Score one mixture, or find its scores; they are on disk afterwards.

    Args:
        args: the flags.
        wanted: what is scored.
        ends: the two models.
        alpha: share of the tuned weights; None: the start model with its own pooling, whose dense
            score is that of share 0, since no pooling takes part in it.
        argv: of the command, for the record.
    """
    folder = _alpha_folder(args.output, alpha)
    asked = _asked(args, wanted, ends)
    held = _earlier(folder / SCORES, asked)
    if held is not None:
        log.info("%s is scored already", folder.name)
        return held
    log.info("scoring %s", folder.name)
    built = ends.at(alpha or 0.0)
    used = pooling_of(built.model)
    if alpha is None:
        attach_spec(built.model, ends.own)
    try:
        row: dict[str, Any] = {
            "alpha": alpha or 0.0,
            "pooling": pooling_words(pooling_of(built.model).to_dict()),
            **_zero_shot(args, wanted, built, folder, argv),
            "dense": {} if alpha is None else _dense(wanted, built, folder, argv),
        }
    finally:
        attach_spec(built.model, used)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SCORES, {**row, "of": asked, "end": utc_now()})
    return row


def _clear(output: Path) -> None:
    """Take away what an earlier run of this command left; nothing else."""
    for folder in [*output.glob("alpha-*"), *output.glob("model-*")]:
        shutil.rmtree(folder)
    for name in WRITTEN:
        (output / name).unlink(missing_ok=True)


def run(argv: Sequence[str] | None = None) -> None:
    """Mix a start model and its fine-tune, and score each mixture."""
    args = make_parser().read(argv, "--start", "--tuned", "--output")
    setup()
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UserError("eval.interpolate runs as one process; start it without torchrun")
    wanted = _check(args)
    last = pool_overrides({row.field: getattr(args, f"last_{row.field}") for row in POOL_FLAGS})
    ends = load_endpoints(args.start, args.tuned, args.device, last or None)
    if args.overwrite and args.output.is_dir():
        _clear(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    record = make_record(MODULE, argv, vars(args), device=args.device, dtype=args.precision)
    for alpha in wanted.saved:
        built = ends.at(alpha)
        save_model(built.model, built.info, _model_folder(args.output, alpha), record)
        log.info("mixture %g saved as %s", alpha, _model_folder(args.output, alpha))
    if not (wanted.classes or wanted.jobs):
        return
    own = None
    if wanted.classes is not None and not ends.own.alike(pooling_of(ends.built.model)):
        own = score_share(args, wanted, ends, None, argv)
    rows = [score_share(args, wanted, ends, alpha, argv) for alpha in wanted.alphas]
    names = [job.task.benchmark.dataset for job in wanted.jobs]
    write_results(args.output, rows, own, names, {
        "start": {"name": shorten(ends.names[0]), "sha256": ends.sha256[0]},
        "tuned": {"name": shorten(ends.names[1]), "sha256": ends.sha256[1]},
        "chance": 1 / len(wanted.classes) if wanted.classes else None,
        "model": ends.built.info.to_dict(),
        "record": {**record, "end": utc_now()},
    })  # fmt: skip
    print(table(rows, own, names))
    log.info("written to %s", args.output)


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
