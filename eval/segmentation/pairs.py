"""Pictures and scored labels of a task: the reader for what is on disk, and one pair at a time.

Not here: folder layouts and label files (`readers`), the check of a whole data set (`check`).
"""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .protocol import Task
from .readers import READERS, NotHereError, Reader, to_ids


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Reader and label rule without the task's prompts, so that worker processes can be sent it.

    Attributes:
        reader: pictures and stored labels.
        labels: label rule, a name of `readers.LABEL_RULES`.
        classes: number of classes C.
    """

    reader: Reader
    labels: str
    classes: int

    def read(self, name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Read a picture H x W x 3 uint8 and its label H x W int64 of ids 0..C-1 and 255.

        Raises:
            UserError: a file that cannot be read, two sizes, or an id outside the classes.
        """
        image, stored = self.reader.read(name)
        return image, to_ids(stored, self.labels, self.classes, self.reader.label_file(name))

    def image_file(self, name: str) -> Path:
        """Return the picture's file."""
        return self.reader.image_file(name)


def open_reader(task: Task, data_root: Path) -> tuple[Task, Reader]:
    """Open the split of a task in whichever form lies on disk.

    The data set's layout is looked for in each of its folders; where it is in none, the other
    truths it may have (`Benchmark.also`) are looked for in the same way.

    Args:
        task: benchmark and protocol.
        data_root: folder that holds the benchmark's own folder, or is it.

    Returns:
        The task, with another label rule and so another hash where another truth was found, and
        the reader.

    Raises:
        NotHereError: the data set is not there, or not whole.
        UserError: an unknown split, or a list or json that cannot be right.
    """
    bench = task.benchmark
    failures = []
    for layout, labels in [(bench.layout, bench.labels), *bench.also.items()]:
        for folder in (bench.folder, *bench.folders):
            try:
                reader = READERS[layout](data_root, folder, bench.split)
            except NotHereError as error:
                failures.append(error)
                continue
            return with_labels(task, labels), reader
    # What was found in part says more than what was not found at all.
    first = max(failures, key=lambda error: error.depth)
    others = [f for f in (bench.folder, *bench.folders) if f not in str(first)]
    tail = f"; also looked for as {', '.join(others)}" if others and first.depth < 2 else ""
    raise NotHereError(f"{first}{tail}", first.depth)


def with_labels(task: Task, labels: str) -> Task:
    """Return the task with another label rule, which is part of the protocol's hash."""
    if labels == task.protocol.labels:
        return task
    return dataclasses.replace(task, protocol=dataclasses.replace(task.protocol, labels=labels))


def pairs_of(task: Task, reader: Reader) -> Pairs:
    """Return what is needed to read pairs, and no more."""
    return Pairs(reader, task.protocol.labels, task.protocol.classes)


def read_pair(
    task: Task, reader: Reader, name: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one pair, see `Pairs.read`."""
    return pairs_of(task, reader).read(name)
