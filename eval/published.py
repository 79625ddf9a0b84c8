"""Published figures (`configs/published`), and which result of ours stands beside which row.

A result is paired with a row only where architecture, tag, method and protocol are those of the
row, the pooling is the plain one, and all images were scored; anything else takes an explicit
`--match ROW=RUN`. Not here: how results are read (`runs`).
"""

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pandas as pd
import yaml

from lazyclip.base.errors import UserError, unknown
from lazyclip.base.record import shorten
from lazyclip.base.resources import config_root
from lazyclip.weights import clean_tag

from .layout import COLUMNS, Layout, Line, markdown
from .runs import Run
from .segmentation.protocol import read_task
from .segmentation.results import percent

FOLDER = "published"
ANY = "*"
GROUPS = {
    "paper": "The paper's Table 4",
    "plain": "The same weights without changes, as others report them",
    "training-free": "Training-free methods on the same weights",
}
Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A published mIoU as printed, in per cent, and where it stands."""

    text: str
    source: str


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """One row of a published table.

    Fields: row, its id; label; group, a key of `GROUPS`; weights in words; models and tags that are
    these weights (none: no result is paired by itself); method; accepts, names of protocols of ours
    that are the row's (`*`: the row's is not stated, any named one); protocol in words; cells.
    """

    row: str
    label: str
    group: str
    weights: str
    models: tuple[str, ...]
    tags: tuple[str, ...]
    method: str
    accepts: tuple[str, ...]
    protocol: str
    cells: Mapping[str, Cell]


@dataclasses.dataclass(frozen=True)
class KnownWeights:
    """What is known of a tag: activation, hash of a file of it, and zero-shot top-1 on ImageNet.

    Fields: sha256 may be the first digits only, and is that of `file`; "" where nothing is known.
    """

    model: str
    tag: str
    activation: str
    file: str
    sha256: str
    sha256_source: str
    top1: str
    top1_source: str


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """One score that this code has to reach with given weights, per cent, within `tolerance`."""

    model: str
    tag: str
    dataset: str
    protocol: str
    method: str
    miou: str
    tolerance: str
    source: str


def _read(name: str, make: Callable[[dict[str, str]], Record], folder: Path | None) -> list[Record]:
    file = (folder or config_root() / FOLDER) / f"{name}.csv"
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return [make({k: v or "" for k, v in row.items()}) for row in csv.DictReader(stream)]
    except (OSError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not readable as the table '{name}' ({error})") from None


def read_published() -> tuple[PublishedRow, ...]:
    """Read the shipped published rows, in their order."""
    cells: dict[str, dict[str, Cell]] = {}
    for line in _read("cells", dict, None):
        cells.setdefault(line["row"], {})[line["dataset"]] = Cell(line["miou"], line["source"])
    listed = ("models", "tags", "accepts")

    def make(line: dict[str, str]) -> PublishedRow:
        words = {key: line[key] for key in line if key not in listed}
        lists = {key: tuple(line[key].split()) for key in listed}
        return PublishedRow(**words, **lists, cells=cells[line["row"]])  # type: ignore[arg-type]

    return tuple(_read("rows", make, None))


def read_weights(folder: Path | None = None) -> tuple[KnownWeights, ...]:
    """Read what is known of weights; `folder` holds another `weights.csv` than the shipped one."""
    return tuple(_read("weights", lambda line: KnownWeights(**line), folder))


def read_acceptance(folder: Path | None = None) -> tuple[Acceptance, ...]:
    """Read the acceptance rows; `folder` holds another `acceptance.csv` than the shipped one."""
    return tuple(_read("acceptance", lambda line: Acceptance(**line), folder))


def shipped_hash(dataset: str, name: str) -> str | None:
    """Return the hash of a shipped protocol, `sclip` or changed as in `naclip+pamr=off`.

    Returns:
        None where no such protocol ships: results of it are paired with nothing.
    """
    base, *changed = name.split("+")
    overrides = {}
    for pair in changed:
        key, _, value = pair.partition("=")
        overrides[key] = yaml.safe_load(value)
    if overrides.get("pamr") is False:
        overrides["pamr"] = "off"  # YAML reads the bare word as a truth value
    try:
        return read_task(dataset, base, overrides=overrides or None).protocol.hash
    except UserError:
        return None


def why_not(row: PublishedRow, run: Run) -> str | None:
    """Say why a result does not stand beside a row by itself; None: it does."""
    weights = run.weights
    if weights.seed is not None:
        return "random weights"
    if not run.complete:
        return f"{run.images} of {run.expected or '?'} images"
    if weights.name not in row.models or clean_tag(weights.tag) not in row.tags:
        return "other weights"
    if run.method != row.method:
        return "another method"
    if weights.pooling != "token":
        return f"pooling {weights.pooling}"
    # An entry `voc21:clearclip+threshold=0.2` stands for one data set, before those for all.
    own = f"{run.dataset}:"
    accepts = [name.removeprefix(own) for name in row.accepts if name.startswith(own)]
    accepts = accepts or [name for name in row.accepts if ":" not in name]
    any_named = ANY in accepts and "+" not in run.protocol
    if not any_named and run.protocol not in accepts:
        return f"protocol {run.protocol}"
    if run.protocol_hash != shipped_hash(run.dataset, run.protocol):
        return f"protocol {run.protocol}:{run.protocol_hash} is not the one that ships"
    return None


def read_matches(pairs: Sequence[str], runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Read `--match ROW=RUN`: the results below the path RUN stand beside row ROW.

    Raises:
        UserError: an unknown row, or a path below which no result was read.
    """
    known = [row.row for row in read_published()]
    matches: dict[str, list[Run]] = {}
    for pair in pairs:
        name, _, place = pair.partition("=")
        if name not in known:
            raise unknown("row of --match", name, known, "write --match ROW=RUN_FOLDER")
        here = Path(place).resolve()
        below = [r for r in runs if here == r.file.resolve() or here in r.file.resolve().parents]
        if not place or not below:
            raise UserError(
                f"--match {pair}: no result that was read lies below '{place}'; give a folder "
                "that is among the results, such as --match paper-clip-b16=logs/seg/x"
            )
        matches.setdefault(name, []).extend(below)
    return matches


def _beside(
    row: PublishedRow, layout: Layout, matches: Mapping[str, Sequence[Run]]
) -> list[tuple[Line, dict[str, Run]]]:
    """Return our rows that stand beside a published one, each with the data sets that do."""
    forced = {id(run) for run in matches.get(row.row, ())}
    found = []
    for line in (*layout.lines, *layout.marked):
        held = {
            name: run
            for name, run in line.runs.items()
            if name in row.cells and (id(run) in forced or why_not(row, run) is None)
        }
        if held:
            found.append((line, held))
    return found


def compare(layout: Layout, matches: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Lay published cells out long, each with ours beside: a line for each of our rows, or one.

    Columns: row, label, group, dataset, theirs, ours, distance (points, ours - theirs; all per
    cent), status (`scored`, `missing`, `not comparable`), our weights, protocols and sources.
    """
    lines = []
    for row in read_published():
        beside: list[tuple[Line | None, dict[str, Run]]] = [*_beside(row, layout, matches)]
        for line, held in beside or [(None, {})]:
            for dataset in COLUMNS:
                cell, run = row.cells.get(dataset), held.get(dataset)
                if cell is None:
                    continue
                score = run.scores["miou"] if run else None
                ours = round(100 * score, 2) if score is not None else None
                status = "missing" if run is None else "scored"
                lines.append(
                    {
                        "row": row.row,
                        "label": row.label,
                        "group": row.group,
                        "dataset": dataset,
                        "theirs": cell.text,
                        "ours": ours,
                        "distance": None if ours is None else round(ours - float(cell.text), 2),
                        "status": "not comparable" if run and not run.comparable else status,
                        "our_weights": line.label if line else "",
                        "our_pooling": line.weights.pooling if line else "",
                        "our_protocol": run.protocol if run else "",
                        "our_protocol_hash": run.protocol_hash if run else "",
                        "our_images": run.images if run else None,
                        "our_file": shorten(str(run.file)) if run else "",
                        "their_protocol": row.protocol,
                        "source": cell.source,
                    }
                )
    table = pd.DataFrame(lines)
    table["our_images"] = table["our_images"].astype("Int64")
    return table


def _mark(status: str) -> str:
    return " (not comparable)" if status == "not comparable" else ""


def _block(rows: pd.DataFrame, letters: Mapping[str, str]) -> list[dict[str, str]]:
    """Write the lines of one published row: theirs, and for each of ours the score and distance."""
    first = rows.iloc[0]
    theirs, out = {}, []
    for cell in rows.drop_duplicates("dataset").itertuples():
        theirs[COLUMNS[str(cell.dataset)]] = f"{cell.theirs} {letters[str(cell.source)]}"
    out.append({"row": f"{first['label']} (`{first['row']}`)", "figure": "theirs",
                "protocol": str(first["their_protocol"]), **theirs})  # fmt: skip
    keys = ["our_weights", "our_pooling", "our_protocol"]
    # A row of ours has one protocol name; its empty cells have none.
    groups = rows.assign(our_protocol=rows["our_protocol"].replace("", pd.NA))
    groups["our_protocol"] = groups.groupby(keys[:2])["our_protocol"].transform("first").fillna("")
    for (weights, _, protocol), held in groups.groupby(keys, sort=False):
        ours: dict[str, str] = {}
        apart: dict[str, str] = {}
        for score in held[held["ours"].notna()].to_dict("records"):
            title = COLUMNS[score["dataset"]]
            ours[title] = f"{score['ours']:.2f}{_mark(score['status'])}"
            apart[title] = f"{score['distance']:+.2f}"
        missing = len(held) - len(ours)
        note = f"{missing} of {len(held)} missing" if missing else "none missing"
        out.append(
            {"row": str(weights), "figure": f"ours ({note})", "protocol": str(protocol), **ours}
        )
        if apart:
            out.append({"row": "", "figure": "distance", **apart})
    return out


def paper_text(layout: Layout, matches: Mapping[str, Sequence[Run]]) -> str:
    """Write ours beside theirs for people, in Markdown, with the source of each cell."""
    table = compare(layout, matches)
    sources = list(dict.fromkeys(table["source"]))
    letters = {source: f"[{index}]" for index, source in enumerate(sources, 1)}
    parts = [
        "# Published figures, and ours",
        "mIoU in per cent; distance is ours minus theirs, in points; `-` is missing. **A distance, "
        "not a pass mark:** the paper states no protocol, and there is no code of its evaluation. "
        "For plain CLIP B/16 the row to meet is that of the SCLIP paper (protocol `sclip`). The "
        "number behind a figure is its source.",
    ]
    names = ["row", "figure", *COLUMNS.values(), "protocol"]
    for group, title in GROUPS.items():
        rows = table[table["group"] == group]
        lines: list[dict[str, str]] = []
        for _, held in rows.groupby("row", sort=False):
            lines += _block(held, letters)
        parts += [f"## {title}", markdown(pd.DataFrame(lines, columns=names))]
    parts.append("\n".join(f"{letter} {source}  " for source, letter in letters.items()))
    left = left_over(layout, matches)
    if left:
        parts += ["## Ours without a published row", "\n".join(left)]
    return "\n\n".join(parts) + "\n"


def left_over(layout: Layout, matches: Mapping[str, Sequence[Run]]) -> list[str]:
    """Name our results that stand beside no published row, with what keeps the nearest apart."""
    rows = read_published()
    forced = {id(run) for runs in matches.values() for run in runs}
    found = []
    for line in (*layout.lines, *layout.marked):
        for run in line.runs.values():
            reasons = [why_not(row, run) for row in rows if run.dataset in row.cells]
            if id(run) in forced or None in reasons:
                continue
            # Reasons come in the order of the checks: the last one reached is the nearest miss.
            near = [r for r in reasons if r not in ("other weights", "another method")]
            why = near[0] if near else (reasons[0] if reasons else "no published row")
            found.append(
                f"- {run.dataset}, {line.label}, {run.method}, pooling {line.weights.pooling}, "
                f"{run.protocol}: {percent(run.scores['miou'], 2)} ({why})"
            )
    return found
