"""All that can be checked before a model is built: task, files, and where results may go.

Not here: flags, models, scoring.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from lazyclip.base.errors import UserError

from .job import OVERLAYS, SHOWN, Job, spread
from .ledger import ledger_files
from .overlays import Legend, read_palette
from .pairs import open_reader, read_pair
from .protocol import Task
from .readers import Reader, check_files
from .separable import MAX_CLASSES

log = logging.getLogger(__name__)
FIRST = 3  # pairs read before the model is built


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the command line asks of one data set.

    Fields: data_root; output folder; limit, the first N pictures only; predictions folder or None;
    overlays, how many pictures to show; overwrite results; resume an interrupted run; max_bad,
    pictures that may be left unscored.
    """

    data_root: Path
    output: Path
    limit: int | None = None
    predictions: Path | None = None
    overlays: int = 0
    overwrite: bool = False
    resume: bool = False
    max_bad: int = 0


def _check_predictions(wanted: Wanted, reader: Reader, names: Sequence[str]) -> None:
    """Refuse a folder whose .png files this run would replace, or be mixed with."""
    folder = wanted.predictions
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save-predictions {folder} is a file; give a folder")
    taken = {reader.label_file(name).parent.resolve() for name in names}
    taken |= {(wanted.output / own).resolve() for own in (OVERLAYS, SHOWN)}
    if folder.resolve() in taken:
        raise UserError(
            f"--save-predictions {folder} holds the labels or the overlays; give another folder"
        )
    there = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.png")}
    foreign = sorted(there - set(names))
    if there and (foreign or not (wanted.overwrite or wanted.resume)):
        first = (foreign or sorted(there))[0]
        raise UserError(
            f"--save-predictions {folder} holds {len(there)} .png already, such as {first}.png; "
            "give an empty folder" + ("" if foreign else ", or --overwrite")
        )


def _check_interrupted(wanted: Wanted) -> None:
    """Refuse to start over a run that could be continued, unless that is asked for."""
    if wanted.resume and wanted.overwrite:
        raise UserError("--resume and --overwrite exclude each other; leave one out")
    if ledger_files(wanted.output) and not (wanted.resume or wanted.overwrite):
        raise UserError(
            f"{wanted.output} holds an evaluation that was cut short; continue it with --resume, "
            "or start anew with --overwrite"
        )
    if wanted.resume or wanted.overwrite:
        return
    for folder in (wanted.output / OVERLAYS, wanted.output / SHOWN):
        there = sorted(folder.glob("*.png"))
        if there:
            raise UserError(
                f"{folder} holds pictures already, such as {there[0].name}; give another --output, "
                "or --overwrite"
            )


def _check_first(task: Task, reader: Reader, names: Sequence[str]) -> None:
    """Refuse data of which none of the first pairs is whole: a wrong encoding shows there.

    One broken file among good ones is met later, counted and named.
    """
    errors = []
    for name in names[:FIRST]:
        try:
            read_pair(task, reader, name)
        except UserError as error:
            errors.append(error)
    if len(errors) == len(names[:FIRST]):
        raise errors[0]


def prepare(task: Task, wanted: Wanted) -> Job:
    """Check data set, files and output, and gather what scoring needs.

    Raises:
        UserError: whatever of them does not fit.
    """
    if task.protocol.classes > MAX_CLASSES:
        raise UserError(
            f"{task.protocol.dataset} has {task.protocol.classes} classes; label maps of 8 bits "
            f"hold {MAX_CLASSES}"
        )
    task, reader = open_reader(task, wanted.data_root)
    bench = task.benchmark
    legend = Legend(task.names, read_palette(bench.palette, len(task.names)))
    names = tuple(reader.ids[: wanted.limit])
    _check_interrupted(wanted)
    _check_predictions(wanted, reader, names)
    check_files(reader, names, wanted.max_bad)
    _check_first(task, reader, names)
    expected = bench.images.get(bench.split)
    if expected not in (None, len(reader.ids)):
        log.warning(
            "%s %s has %d images here, the benchmark %s: scores are not comparable with "
            "published ones", bench.dataset, bench.split, len(reader.ids), expected,
        )  # fmt: skip
    return Job(
        task=task,
        reader=reader,
        names=names,
        expected=expected,
        complete=len(names) == len(reader.ids) and expected in (None, len(names)),
        legend=legend,
        output=wanted.output,
        predictions=wanted.predictions,
        shown=spread(names, wanted.overlays),
    )
