"""The data set doctor: what is wrong with a copy of a benchmark, one line a fault.

Looked at are counts, pairs, sizes, whether every file can be decoded, all label values, and the
faults that copies of a data set are known to have (`Benchmark.traps`). Not here: reading
(`readers`), and what is done with the lines.
"""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lazyclip.base.errors import UserError
from lazyclip.base.logs import Progress
from lazyclip.base.registry import Registry

from .pairs import open_reader
from .protocol import Task
from .readers import IGNORE, NotHereError, Reader, to_ids
from .readers.files import picture_size
from .readers.labels import Labels, lookup

MOST = 5  # faults of one kind that get a line of their own
SPARE = 0.1  # share of classes that may occur in no label
WORKERS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is known of a copy of a data set.

    Attributes:
        task: benchmark and protocol.
        root: data root.
        reader: pictures and labels, None where the data set cannot be opened.
        values: id -> pixels of each stored label id 0..255, for labels that could be read.
    """

    task: Task
    root: Path
    reader: Reader | None
    values: Mapping[str, Labels]

    def seen(self) -> Labels:
        """List the stored ids that any label holds."""
        return np.flatnonzero(sum(self.values.values(), np.zeros(256, dtype=np.int64)))

    def highest(self) -> int:
        """Return the highest id below 255 that any label holds, -1 for none."""
        seen = self.seen()
        return int(seen[seen < IGNORE].max(initial=-1))

    def holding(self, value: int) -> list[str]:
        """List the ids whose label holds a stored value."""
        return [name for name, counts in self.values.items() if counts[value]]


TRAPS: Registry[Callable[[Survey], Iterator[str]]] = Registry("trap")


def _some(names: Sequence[str], of: int) -> str:
    return f"{len(names)} of {of} labels (first {names[0]})"


@TRAPS.add("void_border")
def void_border(survey: Survey) -> Iterator[str]:
    """VOC: masks of the SBD extension and of SegmentationClassAug lack the ignored border."""
    bare = [
        name
        for name, counts in survey.values.items()
        if not counts[IGNORE] and np.count_nonzero(counts) > 1
    ]
    if bare:
        yield (
            f"{_some(bare, len(survey.values))} have objects without the border of 255 around "
            "them: copies from SBD or SegmentationClassAug, which score otherwise; use the "
            "SegmentationClass of the download"
        )


@TRAPS.add("shifted")
def shifted(survey: Survey) -> Iterator[str]:
    """Context and ADE20K: 255 shows that 1 was taken from the ids already."""
    found = survey.holding(IGNORE)
    if found:
        yield (
            f"{_some(found, len(survey.values))} hold 255, which this data set's labels do not: "
            "they look shifted (0 to 255, the rest less 1), and would be shifted twice; use the "
            "original label files"
        )


@TRAPS.add("train_ids")
def train_ids(survey: Survey) -> Iterator[str]:
    """Cityscapes: trainIds saved under the name of labelIds."""
    reader = survey.reader
    if reader is None or not survey.values:
        return
    named = reader.label_file(next(iter(survey.values))).name.endswith("_labelIds.png")
    if named and survey.highest() <= 18:
        yield (
            "no labelIds file holds an id above 18 (vegetation is 21, sky 23, car 26): these are "
            "trainIds under another name; use the labelIds of gtFine_trainvaltest.zip"
        )


@TRAPS.add("full_release")
def full_release(survey: Survey) -> Iterator[str]:
    """ADE20K: the full release has another tree, and masks coded in colours."""
    signs = ("ADE20K_*", "images/ADE", "*_seg.png", "training/*/*_seg.png", "images/*/*_seg.png")
    folders = (survey.root, survey.root / survey.task.benchmark.folder)
    for place in [found for folder in folders for sign in signs for found in folder.glob(sign)][:1]:
        yield (
            f"{place} belongs to the full ADE20K release, whose masks are coded in colours: "
            "another data set; the benchmark is ADEChallengeData2016"
        )


@TRAPS.add("converted_copies")
def converted_copies(survey: Survey) -> Iterator[str]:
    """COCO: only converted maps, or converted maps under the raw ones' names."""
    reader, bench = survey.reader, survey.task.benchmark
    if reader is None:
        places = [survey.root, *(survey.root / f for f in (bench.folder, *bench.folders))]
        form = "*/*/*TrainIds.png"
        for found in [file for place in places for file in place.glob(form)][:1]:
            yield f"{found} is a converted copy, which is not read; the raw maps are missing"
        return
    files = [reader.label_file(name) for name in reader.ids]
    copies = ("_labelTrainIds.png", "_instanceTrainIds.png")
    lone = [
        file
        for file in files
        if not file.is_file() and any(file.with_name(file.stem + c).is_file() for c in copies)
    ]
    if lone:
        yield (
            f"{len(lone)} of {len(files)} raw maps are missing where a converted copy stands "
            f"(first {lone[0]}); unpack stuffthingmaps_trainval2017.zip again"
        )
    few = len(survey.values) < 2  # one map may hold things only
    if survey.task.protocol.labels.endswith("_panoptic") or few:
        return
    if survey.highest() <= 90 and not survey.holding(IGNORE):
        yield (
            "no map holds a stuff id (91..181) or 255: these are instanceTrainIds under the raw "
            "maps' names; unpack stuffthingmaps_trainval2017.zip again"
        )


@TRAPS.add("mixed_splits")
def mixed_splits(survey: Survey) -> Iterator[str]:
    """COCO: pictures of train2017 and val2017 in one folder."""
    if survey.reader is None:
        return
    here = survey.reader.image_file(survey.reader.ids[0]).parent
    other = here.with_name("train2017" if here.name == "val2017" else "val2017")
    there = set(os.listdir(other)) if other.is_dir() else set()
    both = [name for name in survey.reader.ids if f"{name}.jpg" in there]
    if both:
        yield (
            f"{len(both)} pictures lie in {here.name} and in {other.name} (first {both[0]}): the "
            "splits are mixed; unpack both archives into empty folders"
        )


@dataclasses.dataclass(frozen=True)
class _Finding:
    """What one pair shows: faults as (kind, line), and its label's pixels of each stored id."""

    faults: list[tuple[str, str]]
    values: Labels | None = None


def _look(reader: Reader, task: Task, name: str) -> _Finding:
    """Look at one pair: both files there, readable, of one size, every id in the table."""
    faults, shown = [], None
    image, label = reader.image_file(name), reader.label_file(name)
    if not image.is_file():
        faults.append(("picture", f"{label if label.is_file() else name}: no picture {image}"))
    else:
        try:
            height, width, orientation = picture_size(image)
            shown = (height, width)
            if orientation != 1:
                faults.append(("exif", (
                    f"{image}: EXIF orientation {orientation} turns it on reading, as OpenCV does; "
                    "its label must be turned as well"
                )))  # fmt: skip
        except UserError as error:
            faults.append(("broken", str(error)))
    if not label.is_file():
        faults.append(("label", f"{image if image.is_file() else name}: no label file {label}"))
        return _Finding(faults)
    try:
        stored = reader.read_label(name)
    except UserError as error:
        return _Finding([*faults, ("broken", str(error))])
    if shown is not None and shown != stored.shape:
        faults.append(("size", (
            f"{image}: picture is {shown[1]}x{shown[0]}, its label "
            f"{stored.shape[1]}x{stored.shape[0]}; labels are never resized"
        )))  # fmt: skip
    rule, classes = task.protocol.labels, task.protocol.classes
    try:
        to_ids(stored, rule, classes, label)
    except UserError as error:
        faults.append(("value", str(error)))
    return _Finding(faults, np.bincount(np.clip(stored, 0, IGNORE).ravel(), minlength=256))


def _survey_all(reader: Reader, task: Task) -> Iterator[tuple[str, _Finding]]:
    """Look at every pair of the split in a few threads, with progress."""
    progress = Progress(len(reader.ids), "pairs")
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        found = pool.map(lambda name: _look(reader, task, name), reader.ids)
        for name, finding in zip(reader.ids, found, strict=True):
            progress.update()
            yield name, finding


def _shorten(faults: Sequence[tuple[str, str]]) -> list[str]:
    """Keep the first lines of each kind and count the rest."""
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for kind, line in faults:
        kinds[kind].append(line)
    lines = []
    for listed in kinds.values():
        lines.extend(listed[:MOST])
        if len(listed) > MOST:
            lines.append(f"and {len(listed) - MOST} more faults like the last ({len(listed)} such)")
    return lines


def _count_faults(task: Task, reader: Reader) -> list[tuple[str, str]]:
    bench = task.benchmark
    faults = []
    expected = bench.images.get(bench.split)
    if expected not in (None, len(reader.ids)):
        faults.append(("count", (
            f"{bench.dataset} {bench.split} has {len(reader.ids)} pictures here, the benchmark "
            f"{expected}: scores will not compare with published ones"
        )))  # fmt: skip
    for name in sorted(set(reader.label_ids) - set(reader.ids)):
        file, wanted = reader.label_file(name), reader.image_file(name)
        faults.append(("picture", f"{file}: no picture {wanted}"))
    return faults


def _unused_classes(survey: Survey) -> list[tuple[str, str]]:
    """Find classes that no label of a split of full size holds: another, coarser set of labels."""
    task, bench = survey.task, survey.task.benchmark
    if bench.images.get(bench.split) != len(survey.values):
        return []
    table = lookup(task.protocol.labels, task.protocol.classes)
    seen = set(table[survey.seen()])
    lost = [name for i, name in enumerate(task.names) if i not in seen]
    if len(lost) <= SPARE * len(task.names):
        return []
    return [("classes", (
        f"{len(lost)} of {len(task.names)} classes occur in no label of {bench.dataset} "
        f"{bench.split}, such as {', '.join(lost[:MOST])}: these look like another set of labels"
    ))]  # fmt: skip


def describe_missing(task: Task) -> list[str]:
    """Say what to download for a data set and where to put it, one line a file."""
    bench = task.benchmark
    return [f"to get {bench.dataset}: {line}" for line in bench.download] or [
        f"{bench.dataset} belongs in DATA_ROOT/{bench.folder}, layout {bench.layout}"
    ]


def check_dataset(task: Task, data_root: Path) -> list[str]:
    """Look for every fault of a copy of a data set.

    Args:
        task: benchmark (with its split) and protocol.
        data_root: folder that holds the benchmark's own folder, or is it.

    Returns:
        One line a fault, with the path and the remedy; of more than a few of one kind the first and
        their number; none when the copy is sound. Where the data set is not there: what is missing,
        what to download, and where to put it.

    Raises:
        UserError: the benchmark's file names an unknown trap.
    """
    traps = [TRAPS[name] for name in task.benchmark.traps]
    try:
        task, reader = open_reader(task, data_root)
    except NotHereError as error:
        survey = Survey(task, data_root, None, {})
        signs = [line for trap in traps for line in trap(survey)]
        return [str(error), *signs, *describe_missing(task)]
    except UserError as error:  # a split, list or json that cannot be right
        return [str(error)]
    faults = _count_faults(task, reader)
    values = {}
    for name, finding in _survey_all(reader, task):
        faults.extend(finding.faults)
        if finding.values is not None:
            values[name] = finding.values
    survey = Survey(task, data_root, reader, values)
    faults.extend(_unused_classes(survey))
    faults.extend(("trap", line) for trap in traps for line in trap(survey))
    return _shorten(faults)
