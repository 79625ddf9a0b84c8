"""From the ids stored in label files to ids 0..C-1 and 255 (ignored).

Not here: opening of files. A stored id that a rule cannot place is an error, not a dropped pixel:
a wrong encoding would otherwise lower scores in silence.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lazyclip.base.errors import UserError
from lazyclip.base.registry import Registry

Labels = npt.NDArray[np.int64]

IGNORE = 255
LABEL_RULES: Registry[Callable[[Labels], Labels]] = Registry("label rule")


@LABEL_RULES.add("as_is")
def as_is(stored: Labels) -> Labels:
    """Keep the ids: 0..C-1 are classes, 255 is ignored."""
    return stored


@LABEL_RULES.add("zero_ignored")
def zero_ignored(stored: Labels) -> Labels:
    """Ignore id 0 and take 1 from the others; 255 stays 255."""
    return np.where((stored == 0) | (stored == IGNORE), IGNORE, stored - 1)


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
    ids = LABEL_RULES[rule](stored)
    wrong = (ids != IGNORE) & ((ids < 0) | (ids >= classes))
    if wrong.any():
        bad, counts = np.unique(stored[wrong], return_counts=True)
        shift = 1 if rule == "zero_ignored" else 0
        listed = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise UserError(
            f"{file}: {int(counts.sum())} pixels hold label ids {listed}; expected "
            f"0..{classes - 1 + shift} and 255 (rule {rule}, {classes} classes); use the "
            "benchmark's own label files, or the data set's name that has these classes"
        )
    return ids
