"""One benchmark through one model: the loop over pictures, its counts and its files.

Not here: where the settings come from (flags), and what the scores look like (`results`).
"""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lazyclip.base.errors import UserError
from lazyclip.base.logs import Progress

from .confusion import Counts, count, score
from .engine import CosineMaps, segment
from .overlays import Legend, overlay, save_ids
from .protocol import Task
from .readers import Reader, to_ids
from .results import percent

OVERLAYS = "overlays"


@dataclasses.dataclass(frozen=True)
class Job:
    """What is scored and where the files go.

    Attributes:
        task: benchmark, protocol, classes and prompts.
        reader: pictures and stored labels.
        names: ids scored, in the order of the split's list.
        expected: number of images the benchmark has in this split, None where it is not known.
        complete: whether all images of the split are scored, and are as many as expected.
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


def spread(names: tuple[str, ...], most: int) -> frozenset[str]:
    """Pick at most so many names, evenly over the list."""
    most = min(most, len(names))
    return frozenset(names[i * len(names) // most] for i in range(most))


def read_pair(
    task: Task, reader: Reader, name: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read a picture H x W x 3 and its label H x W with ids 0..C-1 and 255.

    Raises:
        UserError: a file that cannot be read, two sizes, or an id outside the classes.
    """
    image, stored = reader.read(name)
    label = to_ids(stored, task.protocol.labels, task.protocol.classes, reader.label_file(name))
    return image, label


def make_folders(job: Job) -> None:
    """Make the folders; overlays of an earlier run go, so that none is taken for this one's."""
    folder = job.output / OVERLAYS
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    if job.predictions:
        job.predictions.mkdir(parents=True, exist_ok=True)


def evaluate(job: Job, maps: CosineMaps, batch_size: int) -> Counts:
    """Segment all images, count, and write the pictures asked for on the way.

    Args:
        job: what is scored.
        maps: the model, see `engine.cosine_maps`.
        batch_size: windows in one pass.

    Returns:
        C x C int64, rows truth, columns prediction.

    Raises:
        UserError: an image that cannot be scored, by its file; none is left out.
    """
    task, classes = job.task, job.task.protocol.classes
    confusion = np.zeros((classes, classes), dtype=np.int64)
    progress = Progress(len(job.names), "images")
    for name in job.names:
        image, label = read_pair(task, job.reader, name)
        try:
            found = segment(image, maps, task.protocol, task.classes.query_class, batch_size)
        except UserError as error:
            raise UserError(f"{job.reader.image_file(name)}: {error}") from None
        confusion += count(label, found, classes)
        if job.predictions:
            save_ids(found, job.predictions / f"{name}.png")
        if name in job.shown:
            file = job.output / OVERLAYS / f"{name.replace('/', '_')}.png"
            overlay(image, label, found, job.legend).save(file)
        progress.update(1, f"mIoU {percent(score(confusion).miou, 2)}")
    return confusion
