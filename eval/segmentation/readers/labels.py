"""From the ids stored in label files to ids 0..C-1 and 255 (ignored).

A rule says for each stored id which class it is. Rules with a table read it from
`configs/classes/*.csv`. Not here: opening of files. A stored id that a rule cannot place is an
error, not a dropped pixel: a wrong encoding would otherwise lower scores in silence.
"""

import csv
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lazyclip.base.errors import UserError
from lazyclip.base.registry import Registry
from lazyclip.base.resources import config_root

Labels = npt.NDArray[np.int64]
Table = Mapping[int, int]

IGNORE = 255
PANOPTIC_STUFF = range(91, 201)  # COCO category ids of stuff; things are 1..90
LABEL_RULES: Registry[Callable[[int], Table]] = Registry("label rule")


@LABEL_RULES.add("as_is")
def as_is(classes: int) -> Table:
    """Keep the ids: 0..C-1 are classes, 255 is ignored."""
    return {**{i: i for i in range(classes)}, IGNORE: IGNORE}


@LABEL_RULES.add("zero_ignored")
def zero_ignored(classes: int) -> Table:
    """Ignore id 0 and take 1 from the others; 255 stays 255."""
    return {0: IGNORE, **{i + 1: i for i in range(classes)}, IGNORE: IGNORE}


@functools.cache
def read_table(name: str, stored: str, wanted: str) -> Table:
    """Read a table of `configs/classes` from one column to another.

    Rows that are no id of a file are left out: an empty target, a name that ends in `(removed)`
    (the 11 COCO ids that never occur), and negative ids.

    Args:
        name: stem of the csv file.
        stored: column of the stored ids.
        wanted: column of the class ids.
    """
    file = config_root() / "classes" / f"{name}.csv"
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {
        int(row[stored]): int(row[wanted])
        for row in rows
        if row[wanted] and int(row[stored]) >= 0
        and not any((text or "").endswith("(removed)") for text in row.values())
    }  # fmt: skip


@LABEL_RULES.add("cityscapes_ids")
def cityscapes_ids(classes: int) -> Table:
    """Map Cityscapes labelIds 0..33 to the 19 classes; 255 is not among them."""
    return read_table("cityscapes_id_to_train", "label_id", "train_id")


@LABEL_RULES.add("coco_stuff")
def coco_stuff(classes: int) -> Table:
    """Map the values of COCO's stuffthingmaps to 171 classes; 255 (unlabelled) is ignored."""
    return read_table("coco_stuff_raw_to_train", "raw_id", "train_id")


@LABEL_RULES.add("coco_object")
def coco_object(classes: int) -> Table:
    """Map the values of COCO's stuffthingmaps to 80 things; stuff and unlabelled are background."""
    return read_table("coco_stuff_raw_to_object", "raw_id", "object_id")


@LABEL_RULES.add("coco_object_panoptic")
def coco_object_panoptic(classes: int) -> Table:
    """Map COCO category ids of panoptic segments to 80 things; stuff and 0 are background.

    Another truth than `coco_object`: in the panoptic maps segments do not overlap and were cleaned.
    """
    things = {raw + 1: to for raw, to in coco_object(classes).items() if to > 0}
    return {0: 0, **things, **dict.fromkeys(PANOPTIC_STUFF, 0)}


def _spans(ids: list[int]) -> str:
    """Write sorted ids as `0..10 and 12 and 255`, at most four spans in full."""
    spans: list[list[int]] = []
    for i in ids:
        if spans and i == spans[-1][1] + 1:
            spans[-1][1] = i
        else:
            spans.append([i, i])
    words = [f"{a}..{b}" if b > a else str(a) for a, b in spans]
    return " and ".join([*words[:3], "...", words[-1]] if len(words) > 4 else words)


@functools.cache
def lookup(rule: str, classes: int) -> Labels:
    """Return the rule as an array of 256: stored id -> class id, 255, or -1 where it has none.

    Raises:
        UserError: the rule's table belongs to a data set with another number of classes.
    """
    if classes > IGNORE:
        raise UserError(f"{classes} classes are more than label files of 8 bits hold ({IGNORE})")
    table = LABEL_RULES[rule](classes)
    given = 1 + max(to for to in table.values() if to != IGNORE)
    if given != classes:
        raise UserError(
            f"label rule {rule} gives {given} classes, the class file has {classes}; use the class "
            "file and the rule of one data set"
        )
    found = np.full(256, -1, dtype=np.int64)
    found[list(table)] = list(table.values())
    found.setflags(write=False)
    return found


def expected_ids(rule: str, classes: int) -> str:
    """Phrase the ids that files of this rule may hold, such as `0..20 and 255`."""
    return _spans(np.flatnonzero(lookup(rule, classes) >= 0).tolist())


def refuse_ids(bad: Labels, counts: Labels, rule: str, classes: int, file: Path) -> UserError:
    """Make the error for stored ids without a class.

    Args:
        bad: the ids.
        counts: pixels of each.
        rule: name in `LABEL_RULES`.
        classes: number of classes C.
        file: where they were read.
    """
    listed = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    return UserError(
        f"{file}: {int(counts.sum())} pixels hold label ids {listed}; expected "
        f"{expected_ids(rule, classes)} (rule {rule}, {classes} classes); use the "
        "benchmark's own label files, or the data set's name that has these classes"
    )


def to_ids(stored: Labels, rule: str, classes: int, file: Path) -> Labels:
    """Map stored ids to class ids.

    Args:
        stored: H x W int64 as read from the file.
        rule: name in `LABEL_RULES`.
        classes: number of classes C.
        file: where they were read, for the message.

    Returns:
        H x W int64 with values 0..C-1 and 255.

    Raises:
        UserError: an id without a class, with file, id and pixel count.
    """
    table = lookup(rule, classes)
    inside = (stored >= 0) & (stored < len(table))
    ids = table[stored] if inside.all() else np.where(inside, table[stored * inside], -1)
    if (ids < 0).any():
        bad, counts = np.unique(stored[ids < 0], return_counts=True)
        raise refuse_ids(bad, counts, rule, classes, file)
    return ids
