"""One benchmark through one model: this rank's pictures, their counts and their files.

Not here: where the settings come from (flags), and what the scores look like (`results`).
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lazyclip.base.logs import Progress

from .confusion import Counts, count_on, score
from .engine import CosineMaps, predict
from .ledger import Cells, Ledger, to_cells, to_counts
from .loading import Broken, Item, Pictures, stream
from .overlays import Legend, overlay, paint_ids, save_ids
from .pairs import pairs_of
from .protocol import Task
from .readers import Reader
from .results import percent

log = logging.getLogger(__name__)
OVERLAYS = "overlays"
SHOWN = "shown"


@dataclasses.dataclass(frozen=True)
class Job:
    """What is scored and where the files go.

    Attributes:
        task: benchmark, protocol, classes and prompts.
        reader: pictures and stored labels.
        names: ids scored, in the order of the split's list.
        expected: number of images the benchmark has in this split, None where it is not known.
        complete: whether all images of the split are asked for, and are as many as expected.
        legend: names and colours of the classes.
        output: folder of the results.
        predictions: folder of the label maps, None for none.
        shown: ids that get an overlay.
    """

    task: Task
    reader: Reader
    names: tuple[str, ...]
    expected: int | None
    complete: bool
    legend: Legend
    output: Path
    predictions: Path | None
    shown: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Done:
    """What a rank brings back: the cells of each picture it scored, and those it could not."""

    cells: Mapping[str, Cells]
    broken: tuple[Broken, ...]


def spread(names: tuple[str, ...], most: int) -> frozenset[str]:
    """Pick at most so many names, evenly over the list."""
    most = min(most, len(names))
    return frozenset(names[i * len(names) // most] for i in range(most))


def make_folders(job: Job, *, keep: bool) -> None:
    """Make the folders.

    Pictures of an earlier run go unless `keep`, so that none is taken for this one's.
    """
    for folder in (job.output / OVERLAYS, job.output / SHOWN):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.png") if not keep else ():
            old.unlink()
    if job.predictions:
        job.predictions.mkdir(parents=True, exist_ok=True)


def missing_files(job: Job, names: Sequence[str]) -> list[str]:
    """Name the pictures of which this run should have written a file and which lack one.

    With `--resume`, counts may be there and a label map not, as when it was asked for only now.
    """
    return [
        name
        for name in names
        if (job.predictions and not (job.predictions / f"{name}.png").is_file())
        or (name in job.shown and not _shown_file(job, name, "prediction").is_file())
    ]


def _shown_file(job: Job, name: str, what: str) -> Path:
    return job.output / SHOWN / f"{name.replace('/', '_')}.{what}.png"


def _write_pictures(job: Job, item: Item, found: npt.NDArray[np.int64]) -> None:
    if job.predictions:
        save_ids(found, job.predictions / f"{item.name}.png")
    if item.name not in job.shown or item.label is None:
        return
    file = job.output / OVERLAYS / f"{item.name.replace('/', '_')}.png"
    overlay(item.image, item.label, found, job.legend).save(file)
    colours = job.legend.colours
    for what, pixels in (
        ("image", item.image),
        ("truth", paint_ids(item.label, colours)),
        ("prediction", paint_ids(found, colours)),
    ):
        Image.fromarray(pixels).save(_shown_file(job, item.name, what))


def _count(item: Item, found: Tensor, classes: int) -> Counts:
    label = torch.from_numpy(np.asarray(item.label)).to(found.device, non_blocking=True)
    counts: Counts = count_on(label, found, classes).cpu().numpy()
    return counts


def score_pictures(
    job: Job,
    names: Sequence[str],
    maps: CosineMaps,
    ledger: Ledger,
    *,
    patch: int,
    batch_size: int,
    workers: int,
    before: Counts,
    note: str = "",
) -> Done:
    """Segment pictures, count, and write the files asked for on the way.

    Args:
        job: what is scored.
        names: the ids of this rank.
        maps: the model, see `engine.cosine_maps`.
        ledger: takes the counts of each picture as soon as they are known.
        patch: patch side of the model in pixels.
        batch_size: windows in one pass.
        workers: processes that read pictures.
        before: counts C x C of earlier pictures, for the running mIoU only.
        note: shown beside the progress, such as the share of this rank.
    """
    task, classes = job.task, job.task.protocol.classes
    running = before.copy()
    pictures = Pictures(names, pairs_of(task, job.reader), task.protocol, patch)
    progress = Progress(len(names), "images")
    cells: dict[str, Cells] = {}
    broken: list[Broken] = []

    def readable() -> Iterator[Item]:
        for item in stream(pictures, workers):
            if isinstance(item, Broken):
                broken.append(item)
                log.warning("not scored: %s", item.reason)
                progress.update(1)
            else:
                yield item

    for item, found in predict(
        readable(), maps, task.protocol, task.classes.query_class, batch_size
    ):
        counts = _count(item, found, classes)
        if job.predictions or item.name in job.shown:
            _write_pictures(job, item, found.cpu().numpy().astype(np.int64))
        cells[item.name] = to_cells(counts)
        ledger.add(item.name, cells[item.name])
        running += counts
        progress.update(1, f"mIoU {percent(score(running).miou, 2)}{note}")
    return Done(cells, tuple(broken))


def merge(
    names: Sequence[str], earlier: Mapping[str, Cells], parts: Sequence[Done], classes: int
) -> tuple[Counts, list[Broken]]:
    """Sum the counts of all ranks, after checking that each picture was met once.

    Args:
        names: ids that were to be scored.
        earlier: cells from before this run.
        parts: what the ranks of this run bring.
        classes: number of classes C.

    Returns:
        C x C int64, and the pictures that could not be scored, in the order of `names`.

    Raises:
        RuntimeError: a picture met twice or not at all (a fault of ours).
    """
    met = [*earlier, *(name for part in parts for name in (*part.cells, *_names(part.broken)))]
    if len(met) != len(set(met)) or set(met) != set(names):
        raise RuntimeError(
            f"{len(names)} pictures, {len(met)} met, {len(set(met))} of them different"
        )
    total = np.zeros((classes, classes), dtype=np.int64)
    for some in (earlier, *(part.cells for part in parts)):
        for cells in some.values():
            total += to_counts(cells, classes)
    order = {name: place for place, name in enumerate(names)}
    broken = [one for part in parts for one in part.broken]
    return total, sorted(broken, key=lambda one: order[one.name])


def _names(broken: Sequence[Broken]) -> list[str]:
    return [one.name for one in broken]
