"""Lay scores out as the paper does: rows weights x method x pooling, columns data sets.

Two results for one cell are never merged: another protocol hash makes another row, and of equal
ones the newest stands while the others are named. Not here: reading (`runs`), published figures
(`published`).
"""

import dataclasses
import itertools
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence

import pandas as pd

from lazyclip.base.record import shorten
from lazyclip.dense import METHODS

from .runs import CLASSIFICATION, RETRIEVAL, SEGMENTATION, Found, Run, Weights
from .segmentation.results import percent

# In the order of the paper's table; the last two are not in it.
COLUMNS = {
    "coco_object": "Object",
    "ade20k": "ADE",
    "cityscapes": "City",
    "voc20": "VOC20",
    "context59": "C59",
    "coco_stuff": "Stuff",
    "voc21": "VOC21",
    "context60": "C60",
}
SHOWN_SCORES = {"top1": "top-1", "image_retrieval": "image R", "text_retrieval": "text R"}


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of the table: what it is of, and data set -> its run."""

    weights: Weights
    label: str
    method: str
    protocol: str
    precision: str
    runs: Mapping[str, Run]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Rows that may be compared, rows that may not, and duplicates: (kept, left out)."""

    lines: tuple[Line, ...]
    marked: tuple[Line, ...]
    duplicates: tuple[tuple[Run, Run], ...]


def markdown(table: pd.DataFrame) -> str:
    """Write a table of texts as Markdown; what is empty or missing becomes `-`."""

    def line(cells: Iterable[object]) -> str:
        words = ["-" if pd.isna(c) or c == "" else str(c).replace("|", "\\|") for c in cells]  # type: ignore[call-overload]
        return "| " + " | ".join(words) + " |"

    rows = [line(row) for row in table.itertuples(index=False)]
    return "\n".join([line(table.columns), "|" + " --- |" * len(table.columns), *rows])


def labels_of(runs: Sequence[Run]) -> dict[tuple[object, ...], str]:
    """Name each of the weights; two that would share a name get a part of their hash."""
    by_label: dict[str, set[tuple[object, ...]]] = {}
    for run in runs:
        by_label.setdefault(run.weights.label, set()).add(_identity(run.weights))
    found: dict[tuple[object, ...], str] = {}
    for run in runs:
        label = run.weights.label
        if len(by_label[label]) > 1:
            label += f" [{(run.weights.sha256 or 'no hash')[:8]} {run.weights.size}]"
        found.setdefault(run.weights.key, label)
    return found


def _identity(weights: Weights) -> tuple[object, ...]:
    return (weights.sha256, weights.seed, weights.size, weights.activation)


def _row_key(run: Run) -> tuple[object, ...]:
    return (run.weights.key, run.method, run.protocol, run.precision)


def _place(runs: Sequence[Run], labels: Mapping[tuple[object, ...], str],
           duplicates: list[tuple[Run, Run]]) -> tuple[Line, ...]:  # fmt: skip
    """Put runs into rows; a second hash for a cell opens a second row, a third a third."""
    cells: dict[tuple[object, ...], dict[str, list[Run]]] = {}
    for run in sorted(runs, key=lambda r: r.ended, reverse=True):
        held = cells.setdefault(_row_key(run), {}).setdefault(run.dataset, [])
        # A shorter run is another thing than a whole one: only equals are duplicates.
        same = [r for r in held if (r.protocol_hash, r.images) == (run.protocol_hash, run.images)]
        if same:
            duplicates.append((same[0], run))
        else:
            held.append(run)
    lines = []
    for by_dataset in cells.values():
        for depth in range(max(len(held) for held in by_dataset.values())):
            row = {name: held[depth] for name, held in by_dataset.items() if depth < len(held)}
            first = next(iter(row.values()))
            weights = first.weights
            lines.append(
                Line(weights, labels[weights.key], first.method, first.protocol,
                     first.precision, row)
            )  # fmt: skip
    return tuple(sorted(lines, key=_order))


def _order(line: Line) -> tuple[object, ...]:
    known = list(METHODS)
    place = known.index(line.method) if line.method in known else len(known)
    hashes = sorted(run.protocol_hash for run in line.runs.values())
    return (line.label, line.weights.pooling, place, line.method, line.protocol, line.precision,
            hashes)  # fmt: skip


def arrange(runs: Sequence[Run]) -> Layout:
    """Put segmentation runs into rows, those that may not be compared into rows of their own."""
    scored = [run for run in runs if run.kind == SEGMENTATION]
    labels = labels_of(scored)
    duplicates: list[tuple[Run, Run]] = []
    whole = _place([run for run in scored if run.comparable], labels, duplicates)
    marked = _place([run for run in scored if not run.comparable], labels, duplicates)
    return Layout(whole, marked, tuple(duplicates))


def datasets_of(lines: Sequence[Line]) -> dict[str, str]:
    """Return data set -> column title: the eight of the paper's layout first, then others."""
    seen = {name for line in lines for name in line.runs}
    return {**COLUMNS, **{name: name for name in sorted(seen - set(COLUMNS))}}


def _cell(run: Run | None) -> str:
    if run is None:
        return "-"
    text = percent(run.scores["miou"], 2)
    if run.complete:
        return text
    return f"{text} ({run.images} of {run.expected or '?'})"


@dataclasses.dataclass(frozen=True)
class Retention:
    """What the same weights hold besides.

    Fields: legend, letter -> what was scored; columns, title -> (run, name of its score), newest
    first; duplicates, (kept, left out).
    """

    legend: Mapping[str, str]
    columns: Mapping[str, tuple[tuple[Run, str], ...]]
    duplicates: tuple[tuple[Run, Run], ...] = ()

    def cell(self, column: str, weights: Weights) -> str:
        """Return the score of these weights in per cent, `-` where none is known."""
        for run, score in self.columns[column]:
            if run.weights.same_as(weights) and run.scores.get(score) is not None:
                return percent(run.scores[score], 1)
        return "-"


def _kept_scores(run: Run) -> list[tuple[str, str]]:
    """List (name in the result, short title) of the scores that stand beside mIoU."""
    found = []
    for name in run.scores:
        head, _, k = name.partition("_recall@")
        if head in SHOWN_SCORES:
            found.append((name, f"{SHOWN_SCORES[head]}{f'@{k}' if k else ''}"))
    return found


def _task_words(run: Run) -> str:
    number = f", {run.images} images" if run.images is not None else ""
    cut = "" if run.complete else ", CUT SHORT"
    return f"{run.dataset} ({run.about}{number}{cut})"


def retention(runs: Sequence[Run]) -> Retention:
    """Gather zero-shot classification and retrieval: one letter for each task that was run.

    Without any, `top-1` and `R@5` still stand there, empty: a cost that was not measured shows.
    """
    kinds = (CLASSIFICATION, RETRIEVAL)
    held = [run for run in runs if run.kind in kinds]
    held.sort(key=lambda run: run.ended, reverse=True)
    letters = dict(zip(sorted({_task_words(run) for run in held}), _letters(), strict=False))
    columns: dict[str, list[tuple[Run, str]]] = {}
    duplicates: list[tuple[Run, Run]] = []
    for run in held:
        for name, title in _kept_scores(run):
            column = columns.setdefault(f"{title} {letters[_task_words(run)]}", [])
            newer = [other for other, _ in column if other.weights.same_as(run.weights)]
            if newer and (newer[0], run) not in duplicates:
                duplicates.append((newer[0], run))
            column.append((run, name))
    legend = {letter: words for words, letter in letters.items()}
    for kind, title in zip(kinds, ("top-1", "R@5"), strict=True):
        if not any(run.kind == kind for run in runs):
            legend[title] = "not measured"
            columns[title] = []
    ordered = sorted(columns, key=lambda column: column.rsplit(" ", 1)[::-1])
    return Retention(legend, {c: tuple(columns[c]) for c in ordered}, tuple(duplicates))


def _letters() -> Iterator[str]:
    yield from string.ascii_lowercase
    yield from (f"a{number}" for number in itertools.count(1))


def wide(lines: Sequence[Line], columns: Mapping[str, str], held: Retention) -> pd.DataFrame:
    """Make the table of texts: mIoU per cent with two decimals, the rest with one."""
    rows = []
    for line in lines:
        hashes = [f"{title} {line.runs[name].protocol_hash}"
                  for name, title in columns.items() if name in line.runs]  # fmt: skip
        rows.append(
            {
                "weights": line.label,
                "method": line.method,
                "pooling": line.weights.pooling,
                **{title: _cell(line.runs.get(name)) for name, title in columns.items()},
                **{column: held.cell(column, line.weights) for column in held.columns},
                "protocol": line.protocol,
                "precision": line.precision,
                "protocol hashes": ", ".join(hashes),
            }
        )
    names = ["weights", "method", "pooling", *columns.values(), *held.columns, "protocol",
             "precision", "protocol hashes"]  # fmt: skip
    return pd.DataFrame(rows, columns=names)


def _duplicate_words(kept: Run, other: Run) -> str:
    score = next(iter(kept.scores))
    values = [percent(run.scores.get(score), 2) for run in (kept, other)]
    differ = "EQUAL" if values[0] == values[1] else "DIFFERENT"
    of = ", ".join(w for w in (kept.dataset, kept.weights.label, kept.method, kept.protocol) if w)
    places = [shorten(str(run.file)) for run in (kept, other)]
    return (
        f"- {of}: {score} {values[0]} of {places[0]} stands, the older {values[1]} of {places[1]} "
        f"does not ({differ})"
    )


def text(found: Found, command: str) -> str:
    """Write the whole table for people, in Markdown."""
    layout = arrange(found.runs)
    held = retention(found.runs)
    columns = datasets_of([*layout.lines, *layout.marked])
    parts = ["# Zero-shot segmentation", f"`{command}`", "mIoU in per cent; `-` was not measured."]
    if layout.lines:
        parts.append(markdown(wide(layout.lines, columns, held)))
    else:
        parts.append("No result here is complete and of trained weights.")
    if layout.marked:
        parts += [
            "## Not comparable",
            "Random weights, or fewer images than the benchmark has (how many stands in the cell). "
            "These say nothing beside a published figure, and little beside each other.",
            markdown(wide(layout.marked, columns, held)),
        ]
    notes = [f"- {column}: {words}" for column, words in held.legend.items()]
    parts.append(
        "Zero-shot classification and retrieval of the same weights and pooling, so that no dense "
        "gain is read without its cost:\n\n" + "\n".join(notes)
    )
    duplicates = [*layout.duplicates, *held.duplicates]
    if duplicates:
        lines = [_duplicate_words(*pair) for pair in duplicates]
        parts += ["## Twice the same cell", "\n".join(lines)]
    if found.passed_over:
        parts += [
            "## Passed over",
            "\n".join(f"- {shorten(str(f))}: {why}" for f, why in found.passed_over),
        ]
    return "\n\n".join(parts) + "\n"
