"""The demo's figures: one list, pivoted for text, CSV and the page, and sentences chosen by them.

Not here: where the figures come from (`run`), the page around them (`page`).
"""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Column:
    """A score: its key, the heading in a table, what it means, and decimals in per cent.

    `scale` is 100 for shares shown in per cent, 1 for figures shown as they are.
    """

    key: str
    heading: str
    meaning: str
    decimals: int = 1
    scale: int = 100


COLUMNS = (
    Column("top1", "top-1", "class of the picture right, object never on its class's own texture"),
    Column("top1_own", "top-1 own", "the same, object always on its class's own texture"),
    Column("pib", "PiB", "Point-in-Box: the patch most like the global feature lies in the box"),
    Column("pib_text", "PiB text", "the same for the patch most like the text of the true class"),
    Column("miou_one", "mIoU 1", "segmentation, one object a picture, ground left out", 2),
    Column("miou_two", "mIoU 2", "segmentation, two objects a picture, ground left out", 2),
    Column("auroc", "AUROC", "chance that an object patch has a higher patch score than a ground "
           "patch; 0.5 is blind, below it the map is turned round", 2, 1),
    Column("votes", "votes", "share of LaSt's votes on patches that are more than half object"),
)  # fmt: skip

# Labels of the rows that the sentences name.
TOKEN, LAST = "token", "last K=1"
UNTRAINED = {TOKEN: "untrained token", LAST: "untrained last K=1"}
CHANCE, MAJORITY, CENTRE = "chance", "majority class", "centre patch"
HALF = "last K=32 (N/2)"
FLOOR = 0.5  # top-1 below which nothing is concluded
SEEDS = 0.18  # Point-in-Box: 12 points between seeds for the CLS token, 6 for LaSt with K = 1


def painted(label: str) -> str:
    """Return the label of the row of pictures painted with one arm's image-level class."""
    return f"painted by {label}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number: row and column of the table, a fraction (None: not there), and its command."""

    row: str
    column: str
    value: float | None
    command: str


def pivot(figures: Sequence[Figure]) -> dict[str, dict[str, float]]:
    """Return row -> column -> value, rows in order of appearance, without those not there."""
    rows: dict[str, dict[str, float]] = {}
    for figure in figures:
        row = rows.setdefault(figure.row, {})
        if figure.value is not None:
            row[figure.column] = figure.value
    return rows


def shown(value: float | None, column: Column) -> str:
    """Return a value as a cell: per cent for shares, `-` where there is none."""
    return "-" if value is None else f"{value * column.scale:.{column.decimals}f}"


def text_table(figures: Sequence[Figure]) -> str:
    """Return the table as aligned text, scores in per cent (AUROC as a fraction)."""
    rows = pivot(figures)
    width = max(len(name) for name in rows)
    lines = ["  ".join([" " * width, *(f"{c.heading:>9}" for c in COLUMNS)])]
    for name, values in rows.items():
        cells = [f"{shown(values.get(c.key), c):>9}" for c in COLUMNS]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def write_csv(path: Path, figures: Sequence[Figure]) -> None:
    """Write one line a figure: row, column, value (a fraction), command."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["row", "score", "value", "command"])
        for figure in figures:
            value = "" if figure.value is None else repr(figure.value)
            writer.writerow([figure.row, figure.column, value, figure.command])


def _percent(value: float, decimals: int = 1) -> str:
    return f"{100 * value:.{decimals}f} %"


def _segmentation(rows: Mapping[str, Mapping[str, float]]) -> str:
    token, last = rows[TOKEN]["miou_two"], rows[LAST]["miou_two"]
    paint = max(rows[painted(TOKEN)]["miou_two"], rows[painted(LAST)]["miou_two"])
    start = "Where two things share a picture,"
    times = f", {last / token:.1f} times as much" if last > token > 0 else ""
    figures = (
        f"{_percent(last, 2)} mIoU against {_percent(token, 2)} of the CLS token{times} (a blind "
        f"guess: {_percent(rows[CHANCE]['miou_two'], 2)}; each picture painted in one class: "
        f"{_percent(paint, 2)})"
    )
    if last > paint and last > token:
        return f"{start} the model trained with LaSt tells them apart: {figures}."
    if last > token:
        return (
            f"{start} LaSt is above the CLS token but not above painting the whole picture with "
            f"one class on this seed: {figures}."
        )
    return f"{start} LaSt did not beat the CLS token on this seed: {figures}."


def _maps(rows: Mapping[str, Mapping[str, float]]) -> str:
    token, last = rows[TOKEN], rows[LAST]
    chance, centre = rows[CHANCE]["pib_text"], rows[CENTRE]["pib"]
    gap = last["pib_text"] - token["pib_text"]
    verdict = (
        "The text finds the object more often in LaSt's patches"
        if gap > 0.05
        else "The text finds the object no more often in LaSt's patches on this seed"
    )
    difference = last["pib"] - token["pib"]
    own = (
        "says nothing here (the two differ by less than seeds do)"
        if abs(difference) <= SEEDS
        else "differs by more than seeds do, in favour of " + ("LaSt" if difference > 0 else "CLS")
    )
    return (
        f"{verdict}: {_percent(last['pib_text'])} against {_percent(token['pib_text'])}, with "
        f"{_percent(chance)} by chance; Point-in-Box with each model's own global feature, "
        f"{_percent(last['pib'])} against {_percent(token['pib'])} (always the centre: "
        f"{_percent(centre)}; untrained: {_percent(rows[UNTRAINED[LAST]]['pib'])} and "
        f"{_percent(rows[UNTRAINED[TOKEN]]['pib'])}), {own}."
    )


def _classes(rows: Mapping[str, Mapping[str, float]]) -> str:
    token, last = rows[TOKEN], rows[LAST]
    gap = last["top1"] - token["top1"]
    verdict = (
        "Naming the picture is about as good with either"
        if abs(gap) <= 0.02
        else f"Naming the picture is {'better' if gap > 0 else 'worse'} with LaSt on this seed"
    )
    return (
        f"{verdict}: top-1 {_percent(last['top1'])} against {_percent(token['top1'])} on grounds "
        f"that never go with the class, {_percent(last['top1_own'])} against "
        f"{_percent(token['top1_own'])} on grounds that always do; so the shortcut through the "
        f"ground is worth "
        f"{100 * (last['top1_own'] - last['top1']):.1f} and "
        f"{100 * (token['top1_own'] - token['top1']):.1f} points."
    )


def _half(rows: Mapping[str, Mapping[str, float]]) -> str:
    area = rows[HALF]["auroc"]
    if area < 0.5:
        said = (
            "turns the maps round: the objects cover fewer patches than K, so ground patches are "
            "in every mean and the class is written onto them"
        )
    else:
        said = "does not turn the maps round on this seed"
    return (
        f"The configs' default K = N/2 {said} (AUROC {area:.2f} against {rows[LAST]['auroc']:.2f} "
        f"at K = 1, mIoU with two objects {_percent(rows[HALF]['miou_two'], 2)})."
    )


def sentences(figures: Sequence[Figure]) -> list[str]:
    """Say in words what the table shows; the words depend on the numbers alone.

    Returns:
        Three sentences (segmentation, maps, classification), a fourth where K = N/2 was trained;
        or one that nothing can be concluded.
    """
    rows = pivot(figures)
    weak = [name for name in (TOKEN, LAST) if rows[name]["top1"] < FLOOR]
    if weak:
        return [
            f"No conclusion: {' and '.join(weak)} reached a top-1 below {_percent(FLOOR)}, so the "
            "training did not work well enough for the maps to mean anything."
        ]
    said = [_segmentation(rows), _maps(rows), _classes(rows)]
    return [*said, _half(rows)] if HALF in rows else said
