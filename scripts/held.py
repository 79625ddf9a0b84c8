"""Weights that are on this machine: the file of a tag, and the hash it has to have.

Nothing is downloaded. Not here: what is checked of them (`accept`).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import open_clip

from eval.published import KnownWeights
from lazyclip.base.errors import UserError, unknown
from lazyclip.weights import fetch_tag, find_weight_file


@dataclasses.dataclass(frozen=True)
class Held:
    """Weights that are here: what is known of them, their file, and what to pass as pretrained."""

    known: KnownWeights
    file: Path
    pretrained: str

    @property
    def name(self) -> str:
        """Name them as the flags do."""
        return f"{self.known.model}:{self.known.tag}"


def hub_blob(file: Path) -> str:
    """Return the SHA-256 that the hub's cache keeps a file under, "" for other files.

    A cached file is a link to `blobs/SHA256`, the hash that the hub announced for it.
    """
    name = file.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else ""


def expected_hash(held: Held) -> tuple[str, str]:
    """Return the hash that a file has to have, perhaps its first digits only, and its source."""
    known = held.known
    if known.sha256 and known.file in ("", held.file.name):
        return known.sha256, known.sha256_source
    return hub_blob(held.file), "the hub's cache"


def read_given(pairs: Sequence[str], rows: Sequence[KnownWeights]) -> dict[str, Path]:
    """Read `--weights MODEL:TAG=FILE`.

    Raises:
        UserError: another form, an unknown tag, or a file that is not there.
    """
    known = [f"{row.model}:{row.tag}" for row in rows]
    given = {}
    for pair in pairs:
        name, _, place = pair.partition("=")
        if name not in known:
            raise unknown("weights of --weights", name, known, "write MODEL:TAG=FILE")
        if not place or not Path(place).exists():
            raise UserError(f"--weights {pair}: there is no file '{place}'")
        given[name] = find_weight_file(Path(place))
    return given


def find(row: KnownWeights, given: Mapping[str, Path]) -> Held | str:
    """Find the file of a tag without downloading; returns why it is not here."""
    name = f"{row.model}:{row.tag}"
    if name in given:
        return Held(row, given[name], str(given[name]))
    if not open_clip.is_pretrained_cfg(row.model, row.tag):
        return f"this open_clip has no tag {row.tag}; pass --weights {name}=FILE"
    entry = open_clip.get_pretrained_cfg(row.model, row.tag)
    if not (entry.get("file") or entry.get("hf_hub")):
        return f"not in the hub; pass --weights {name}=FILE"
    try:
        return Held(row, fetch_tag(row.model, row.tag), row.tag)
    except UserError:
        return f"not in the hub's cache; pass --weights {name}=FILE"
