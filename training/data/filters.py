"""Filters on what is known of a sample beside its picture: which samples count at all.

`similarity>=0.3`, `NSFW==UNLIKELY`, `width>=256`, `caption_length>=5`: a column of the parquet file
beside a shard, a field of the sample's json, or the caption's letters. A sample without the field
does not pass. Not here: what decoding finds (`samples`).
"""

import dataclasses
import itertools
import json
import logging
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lazyclip.base.errors import UserError, nearest
from lazyclip.base.logs import Progress

from .locate import Located
from .manifest import Manifest
from .reading import range_of
from .records import Caps, Record, group
from .survey import Finding, How, run_jobs, stem_of
from .tar import Damage, ReadRange, members

log = logging.getLogger(__name__)
CAPTION_LENGTH = "caption_length"
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
    ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Filter:
    """A condition: field, operator, and a number or a word."""

    field: str
    operator: str
    value: float | str

    @property
    def text(self) -> str:
        """The condition as it is hashed and shown."""
        return f"{self.field}{self.operator}{self.value}"

    def passes(self, values: Mapping[str, object]) -> bool | None:
        """Tell whether a sample passes; None when it has no value that can be compared."""
        value = values.get(self.field)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if isinstance(self.value, str):
            return _OPERATORS[self.operator](_word(value), self.value)
        try:
            number = float(value)  # type: ignore[arg-type]  # what does not convert is caught
        except (TypeError, ValueError):
            return None
        return None if math.isnan(number) else _OPERATORS[self.operator](number, self.value)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_filter(text: str, flag: str = "--filter") -> Filter:
    """Read a condition such as `similarity>=0.3`.

    Raises:
        UserError: it is none, or compares a word by size.
    """
    match = re.fullmatch(r"\s*([\w.-]+)\s*(>=|<=|==|!=|>|<)(?!=)\s*(\S.*?)\s*", text)
    if not match:
        raise UserError(f"{flag} '{text}' is no condition; write {flag} 'similarity>=0.3'")
    field, sign, value = match.groups()
    value = value.strip("'\"")
    try:
        number = float(value)
    except ValueError:
        if sign not in ("==", "!="):
            raise UserError(
                f"{flag} '{text}': '{value}' is no number; words are compared by == and !="
            ) from None
        return Filter(field, sign, value)
    if not math.isfinite(number):
        raise UserError(f"{flag} '{text}': '{value}' is no finite number")
    return Filter(field, sign, number)


@dataclasses.dataclass(frozen=True)
class _Passed:
    """What filters leave of a shard: places that pass; samples that each filter was the first to
    turn away; samples without its field; fields that were seen."""

    ordinals: tuple[int, ...]
    turned: tuple[int, ...]
    without: tuple[int, ...]
    fields: tuple[str, ...]


def _table(shard: Located, fields: set[str]) -> dict[str, dict[str, object]] | None:
    """Return the parquet rows beside a shard by key; None where they cannot answer."""
    stem = stem_of(shard.origin)
    file = stem.with_name(f"{stem.name}.parquet")
    if not file.is_file() or not fields:
        return None
    import pandas

    try:
        rows = pandas.read_parquet(file, columns=["key", *sorted(fields)])
    except (ImportError, OSError, ValueError, KeyError):
        return None  # no engine, or no such columns: the json members answer
    if rows["key"].duplicated().any():
        return None
    return {str(row["key"]): {str(k): v for k, v in row.items()} for row in rows.to_dict("records")}


def _from_json(record: Record, read: ReadRange, caps: Caps) -> dict[str, object]:
    span = record.spans.get("json")
    if span is None or span.size > caps.json:
        return {}
    try:
        values = json.loads(bytes(read(*span)))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _values(
    shard: Located, records: Iterator[Record], read: ReadRange, fields: set[str]
) -> Iterator[tuple[Record, dict[str, object]]]:
    """Yield each complete record with what is known of it."""
    caps = Caps()
    asked = fields - {CAPTION_LENGTH}
    table = _table(shard, asked)
    for record in records:
        if not record.complete:
            continue
        known: dict[str, object] = {}
        if table is not None:
            known = dict(table.get(record.key.rpartition("/")[2], {}))
        elif asked:
            known = _from_json(record, read, caps)
        if CAPTION_LENGTH in fields:
            span = record.spans["txt"]
            text = bytes(read(span.offset, min(span.size, caps.text)))
            known[CAPTION_LENGTH] = len(text.decode("utf-8", "replace").strip())
        yield record, known


def _judge(job: tuple[Located, int, int, tuple[Filter, ...]]) -> _Passed:
    """Judge a shard's samples."""
    shard, size, number, filters = job
    read = range_of(shard.path)
    turned, without = Counter[int](), Counter[int]()
    fields: set[str] = set()
    ordinals = []
    records = itertools.islice(_undamaged(read, size), number)
    for record, known in _values(shard, records, read, {f.field for f in filters}):
        fields.update(known)
        verdicts = [one.passes(known) for one in filters]
        without.update(i for i, verdict in enumerate(verdicts) if verdict is None)
        if all(verdicts):
            ordinals.append(record.ordinal)
        else:
            turned[next(i for i, verdict in enumerate(verdicts) if not verdict)] += 1
    every = range(len(filters))
    return _Passed(
        tuple(ordinals), tuple(turned[i] for i in every), tuple(without[i] for i in every),
        tuple(sorted(fields)),
    )  # fmt: skip


def _undamaged(read: ReadRange, size: int) -> Iterator[Record]:
    """Yield a shard's records up to its damage, which its survey has told."""
    try:
        yield from group(members(read, size, window=How().window))
    except Damage:
        return


def filtered(
    manifest: Manifest, shards: Sequence[Located], filters: Sequence[Filter], processes: int = 1
) -> Manifest:
    """Leave out samples that do not pass every filter.

    Args:
        manifest: unfiltered.
        shards: those of the manifest.
        filters: conditions, all of which must hold.
        processes: to work in.

    Returns:
        The manifest of what is left; its hash is another one, and its findings say what each filter
        turned away.

    Raises:
        UserError: no sample has a filter's field (names the fields there are), or none is left.
    """
    jobs = [
        (shard, int(size), int(number), tuple(filters))
        for shard, size, number in zip(shards, manifest.sizes, manifest.records, strict=True)
    ]
    progress = Progress(len(jobs), "shards filtered")
    keep = manifest.keep.copy()
    turned, without = np.zeros(len(filters), dtype=int), np.zeros(len(filters), dtype=int)
    fields: set[str] = set()
    for i, passed in enumerate(run_jobs(_judge, jobs, processes)):
        first, last = int(manifest.first[i]), int(manifest.first[i + 1])
        bits = np.zeros((last - first, manifest.chunk), dtype=bool)
        bits.reshape(-1)[list(passed.ordinals)] = True
        keep[first:last] &= np.packbits(bits, axis=1)
        turned += passed.turned
        without += passed.without
        fields.update(passed.fields)
        progress.update()
    before = int(manifest.counts.sum())
    for one, lacking in zip(filters, without, strict=True):
        if lacking == before:
            raise UserError(
                f"--filter '{one.text}': no sample has a field '{one.field}' that compares; "
                f"{nearest(one.field, fields | {CAPTION_LENGTH})}"
            )
    left = dataclasses.replace(
        manifest, keep=keep, filters=tuple(sorted(one.text for one in filters)),
        findings=(*manifest.findings, *_told(filters, turned, without, before)),
    )  # fmt: skip
    if left.samples == 0:
        raise UserError(
            f"--filter {' '.join(repr(one.text) for one in filters)} leaves none of {before} "
            "samples; loosen it"
        )
    return left


def _told(
    filters: Sequence[Filter], turned: Iterable[int], without: Iterable[int], before: int
) -> list[Finding]:
    return [
        Finding("filtered", one.text, f"{away} of {before} samples left out, {lacking} lack it")
        for one, away, lacking in zip(filters, turned, without, strict=True)
    ]
