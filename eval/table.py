"""Collect results into one table: `python -m eval.table logs/seg --output DIR`.

Not here: reading results (`runs`), laying them out (`layout`), published figures (`published`),
the pictures (`segmentation.sheet`).
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lazyclip.base.errors import UserError, cli
from lazyclip.base.logs import setup
from lazyclip.base.record import command_line

from .commandline import Parser, check_output
from .layout import arrange, labels_of, text
from .published import compare, paper_text, read_matches
from .runs import SEGMENTATION, Found, Run, collect, frame
from .segmentation.sheet import Column, contact_sheet

log = logging.getLogger(__name__)
MODULE = "eval.table"
EXAMPLE = f"python -m {MODULE} logs/seg logs/cls --output logs/table --paper --sheet"


def make_parser() -> Parser:
    """Make the parser of this command."""
    parser = Parser(EXAMPLE, "Collect results into csv and Markdown, in the paper's layout.")
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="RESULT",
        help="folders that hold results of eval.zeroshot_seg, eval.zeroshot_cls, eval.clip_bench",
    )
    parser.add_argument("--output", type=Path, help="folder for table.csv, table.md and the rest")
    parser.add_argument("--overwrite", action="store_true", help="replace tables that are there")
    parser.add_argument(
        "--paper", action="store_true", help="published figures and the distance to ours"
    )
    parser.add_argument(
        "--match",
        action="append",
        default=[],
        metavar="ROW=RUN",
        help="set the results below a folder beside a published row that their weights do not name",
    )
    parser.add_argument(
        "--sheet", action="store_true", help="a contact sheet for each data set, with --output"
    )
    return parser


def _check(args: argparse.Namespace) -> dict[str, Path]:
    if not args.results:
        raise UserError(f"no results are named; an example: {EXAMPLE}")
    if args.sheet and not args.output:
        raise UserError("--sheet writes pictures; say where with --output DIR")
    if args.match and not args.paper:
        raise UserError("--match sets results beside published rows; add --paper")
    if not args.output:
        return {}
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is a file; give a folder")
    names = ["table.csv", "table.md", *(("paper.csv", "paper.md") if args.paper else ())]
    files = {name: args.output / name for name in names}
    for file in files.values():
        check_output(file, args.overwrite, "--output DIR")
    return files


def _titles(runs: Sequence[Run]) -> list[str]:
    """Name columns by what tells them apart."""
    labels = labels_of(runs)
    parts = [
        (labels[r.weights.key], r.method, r.weights.pooling, r.protocol, r.precision) for r in runs
    ]
    told = [i for i in range(len(parts[0])) if len({p[i] for p in parts}) > 1] or [0, 1]
    return ["\n".join(p[i] for i in told) for p in parts]


def _columns(runs: Sequence[Run]) -> list[Column]:
    columns = []
    for run, title in zip(runs, _titles(runs), strict=True):
        score = run.scores["miou"]
        words = [f"mIoU {100 * score:.2f}" if score is not None else "mIoU -"]
        if not run.complete:
            words.append(f"({run.images} of {run.expected or '?'} images)")
        columns.append(Column(f"{title}\n{' '.join(words)}", run.file.parent / "shown"))
    return columns


def make_sheets(found: Found) -> dict[str, Image.Image]:
    """Draw one contact sheet for each data set that has pictures; returns them by file name.

    Raises:
        UserError: no result has any.
    """
    layout = arrange(found.runs)
    placed = [run for line in (*layout.lines, *layout.marked) for run in line.runs.values()]
    sheets = {}
    for dataset in sorted({run.dataset for run in placed}):
        here = [r for r in placed if r.dataset == dataset]
        runs = [r for r in here if any((r.file.parent / "shown").glob("*.prediction.png"))]
        for run in here:
            if run not in runs:
                log.warning("%s has no pictures in shown/; not on the sheet", run.file.parent)
        if not runs:
            continue
        columns = _columns(runs)
        sheets[f"sheet-{dataset}.png"] = contact_sheet(dataset, runs[0].classes, columns)
    if not sheets:
        kinds = {run.kind for run in found.runs}
        why = "" if SEGMENTATION in kinds else " (no result of eval.zeroshot_seg is among them)"
        raise UserError(
            f"--sheet: no result holds pictures in shown/{why}; score with --overlays 4"
        )
    return sheets


def run(argv: Sequence[str] | None = None) -> None:
    """Collect results into one table."""
    args = make_parser().read(argv)
    setup()
    files = _check(args)
    found = collect(args.results)
    matches = read_matches(args.match, found.runs)
    layout = arrange(found.runs)
    texts = {"table.md": text(found, command_line(MODULE, argv))}
    if args.paper:
        texts["paper.md"] = paper_text(layout, matches)
    sheets = make_sheets(found) if args.sheet else {}
    print("\n".join(texts.values()))
    for file, why in found.passed_over:
        log.warning("passed over %s: %s", file, why)
    if not args.output:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    for name, words in texts.items():
        files[name].write_text(words, encoding="utf-8")
    frame(found.runs).to_csv(files["table.csv"], index=False)
    if args.paper:
        compare(layout, matches).to_csv(files["paper.csv"], index=False)
    for name, sheet in sheets.items():
        sheet.save(args.output / name)
        log.info("wrote %s", args.output / name)
    log.info("%d results in %s", len(found.runs), files["table.md"])


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
