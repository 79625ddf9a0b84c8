"""What an interpolation leaves: curve.csv, curve.png, results.json, and a table for people.

A row is what `interpolate.score_share` returns. Not here: the scoring, how curves are drawn.
"""

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lazyclip.base.config import write_json

from .commandline import RESULTS
from .curve import MOST_LINES, Line, save_picture

log = logging.getLogger(__name__)
CURVE, PICTURE = "curve.csv", "curve.png"
WRITTEN = (CURVE, PICTURE, RESULTS)
Row = Mapping[str, Any]


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _miou(row: Row, name: str) -> float | None:
    value = row["dense"].get(name, {}).get("miou")
    return None if value is None else float(value)


def write_curve(file: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Write rows as csv: fractions, one row a share.

    Args:
        file: to be written.
        rows: in order; the start model with its own pooling stands first, where there is one.
        names: benchmarks, a column each.
    """
    with file.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream, lineterminator="\n")
        out.writerow(["alpha", "pooling", "top1", "top5", "images", *(f"miou_{n}" for n in names)])
        for row in rows:
            scores = [row.get("top1"), row.get("top5"), *(_miou(row, name) for name in names)]
            cells = ["" if value is None else f"{value:.6f}" for value in scores]
            about = [f"{row['alpha']:g}", row["pooling"], *cells[:2], row.get("n", "")]
            out.writerow([*about, *cells[2:]])


def lines_of(rows: Sequence[Row], own: Row | None, names: Sequence[str]) -> list[Line]:
    """Make the picture's curves: zero-shot top-1, then mIoU of each benchmark."""
    top = tuple((row["alpha"], row["top1"]) for row in rows if row.get("top1") is not None)
    level = (f"start, {own['pooling']}", own["top1"]) if own else None
    lines = [Line("zero-shot top-1", top, level)]
    for name in names:
        points = [(row["alpha"], _miou(row, name)) for row in rows]
        lines.append(Line(f"mIoU {name}", tuple((a, s) for a, s in points if s is not None)))
    return [line for line in lines if line.points]


def table(rows: Sequence[Row], own: Row | None, names: Sequence[str]) -> str:
    """Lay the curve out for people, per cent."""
    heads = ["alpha", "top-1", *(f"mIoU {name}" for name in names)]
    widths = [max(7, len(head)) for head in heads]
    lines = ["  ".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))]
    for row in rows:
        cells = [f"{row['alpha']:g}", _percent(row.get("top1"))]
        cells += [_percent(_miou(row, name), 2) for name in names]
        lines.append("  ".join(f"{c:>{width}}" for c, width in zip(cells, widths, strict=True)))
    if own is not None:
        lines.append(f"start model, pooling {own['pooling']}: top-1 {_percent(own['top1'])}")
    return "\n".join(lines)


def _title(row: Row) -> str:
    parts = [f"top-1 of {row['n']} images"] if row.get("n") else []
    parts += [f"{name} of {found['images']}" for name, found in row["dense"].items()]
    return "start and tuned weights mixed; " + ", ".join(parts)


def write_results(
    output: Path,
    rows: Sequence[Row],
    own: Row | None,
    names: Sequence[str],
    about: Mapping[str, Any],
) -> None:
    """Write the csv, the picture, and results.json.

    Args:
        output: folder.
        rows: of the shares, in rising order.
        own: of the start model with the pooling its weights were trained with, None for none.
        names: benchmarks.
        about: what else stands in results.json: models, chance, record.
    """
    write_curve(output / CURVE, [*([own] if own else []), *rows], names)
    lines = lines_of(rows, own, names)
    if len(lines) > MOST_LINES:
        log.warning("%s shows %d of %d lines", PICTURE, MOST_LINES, len(lines))
    save_picture(output / PICTURE, lines, _title(rows[0]), "share alpha of the tuned weights")
    bare = [{k: v for k, v in row.items() if k != "of"} for row in (*rows, *([own] if own else []))]
    write_json(
        output / RESULTS,
        {"curve": bare[: len(rows)], "start_own_pooling": bare[-1] if own else None, **about},
    )
