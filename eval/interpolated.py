"""What an interpolation leaves: curve.csv, curve.png, results.json, and a table for people.

A row is what `interpolate.score_share` returns. The picture is made from results.json alone and can
be made again from it (`save_curve`). Not here: the scoring, how curves are drawn.
"""

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lazyclip.base.config import read_json, write_json

from .commandline import RESULTS
from .curve import MOST_LINES, Line, save_picture

log = logging.getLogger(__name__)
CURVE, PICTURE = "curve.csv", "curve.png"
WRITTEN = (CURVE, PICTURE, RESULTS)
X_TITLE = "alpha, the share of the fine-tuned weights: 0 = start, 1 = fine-tuned"
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


def lines_of(
    rows: Sequence[Row], own: Row | None, names: Sequence[str], chance: float | None = None
) -> list[Line]:
    """Make the picture's curves: zero-shot top-1, then mIoU of each benchmark.

    Args:
        rows: of the shares.
        own: of the start model with its own pooling.
        names: benchmarks.
        chance: top-1 of guessing.
    """
    top = tuple((row["alpha"], row["top1"]) for row in rows if row.get("top1") is not None)
    level = (f"top-1 of the start by {_by(own['pooling'])}", own["top1"]) if own else None
    guess = None if chance is None else ("top-1 by chance", chance)
    lines = [Line("zero-shot top-1", top, level, guess)]
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


def _by(pooling: str) -> str:
    """Write what `runs.pooling_words` returns for people who read a picture."""
    name, _, settings = pooling.partition(" ")
    if name == "last":
        return f"LaSt pooling ({settings.replace(' score', ', score')})"
    return {"token": "its CLS token"}.get(name, f"{name} pooling")


def _title(found: Mapping[str, Any]) -> tuple[str, str]:
    """Name the models; then how they are read, and how many images each score is of."""
    row = found["curve"][0]
    parts = [f"top-1 of {row['n']} images"] if row.get("n") else []
    parts += [f"mIoU {name} of {one['images']}" for name, one in row["dense"].items()]
    if parts and row.get("n"):
        parts[0] += f" read by {_by(row['pooling'])}"
    pair = f"start {found['start']['name']} mixed with fine-tuned {found['tuned']['name']}"
    return pair, "; ".join(parts)


def save_curve(folder: Path) -> None:
    """Draw curve.png from the results.json beside it."""
    found = read_json(folder / RESULTS)
    rows = found["curve"]
    lines = lines_of(rows, found["start_own_pooling"], list(rows[0]["dense"]), found["chance"])
    if len(lines) > MOST_LINES:
        log.warning("%s shows %d of %d lines", PICTURE, MOST_LINES, len(lines))
    save_picture(folder / PICTURE, lines, _title(found), X_TITLE)


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
        about: what else stands in results.json: start, tuned, chance, model, record.
    """
    write_curve(output / CURVE, [*([own] if own else []), *rows], names)
    bare = [{k: v for k, v in row.items() if k != "of"} for row in (*rows, *([own] if own else []))]
    write_json(
        output / RESULTS,
        {"curve": bare[: len(rows)], "start_own_pooling": bare[-1] if own else None, **about},
    )
    save_curve(output)
