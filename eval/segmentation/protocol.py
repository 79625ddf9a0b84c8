"""Benchmarks and their named protocols, from `configs/protocols/*.yaml`, closed and hashed.

A file describes one benchmark (where pictures and labels lie, how labels are encoded, the class
file) and lists protocols for it (prompts, sizes, windows, decision). Two scores can be compared
when their protocol hashes are equal: everything that changes the task is in the hash, and the
method, the weights, the precision and the batch size are not. Not here: reading of data
(`readers`).
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from lazyclip.base.config import config_hash, read_yaml, strict
from lazyclip.base.errors import UserError, nearest, unknown
from lazyclip.base.resources import config_file
from lazyclip.zeroshot import ClassList, read_classes, templates

from .readers import LABEL_RULES, READERS
from .readers.labels import lookup
from .values import choice, mapping, number, parsed, texts, triple

Remainder = Literal["drop", "pad"]
Positions = Literal["offset", "antialias"]
Pamr = Literal["off", "naclip", "original"]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A data set as a benchmark: where its pictures are and what its labels mean.

    Attributes:
        dataset: name in results and hash.
        title: one line for people.
        layout: folder layout, a name of `readers.READERS`.
        folder: the benchmark's own folder below the data root, such as `VOCdevkit/VOC2012`.
        split: the split scored by default.
        images: split -> expected number of images; a split not listed is not checked.
        classes: class file, one class a line in label order.
        labels: rule from stored to scored ids, a name of `readers.LABEL_RULES`.
        background: whether class 0 is a background class that a threshold may assign.
        palette: csv of display colours, None for generated ones.
        folders: other names under which people keep the folder.
        also: layout -> label rule of another truth for the same pictures, used where the first is
            not on disk; the rule is in the hash.
        download: what to get for it and where to put it, one line a file.
        traps: known faults of copies of this data set, names of `check.TRAPS`.
    """

    dataset: str
    title: str
    layout: str
    folder: str
    split: str
    images: Mapping[str, int]
    classes: Path
    labels: str
    background: bool
    palette: Path | None = None
    folders: tuple[str, ...] = ()
    also: Mapping[str, str] = dataclasses.field(default_factory=dict)
    download: tuple[str, ...] = ()
    traps: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that changes the task; `hash` is taken over all fields but the name.

    Attributes:
        name: name of the protocol, such as `sclip`.
        dataset: name of the benchmark.
        split: split scored.
        labels: label rule.
        background: whether class 0 is background.
        classes: number of classes C.
        classes_sha256: content hash of the class file.
        templates: prompt templates, by name or file name.
        templates_sha256: content hash of the template texts.
        mean: subtracted from each channel, grey levels 0..255.
        std: divides each channel, grey levels.
        short: target short side in pixels.
        cap: largest long side in pixels.
        window: window side in pixels, 0 for the whole image.
        stride: window step in pixels.
        remainder: what happens to window pixels beyond whole patches; `drop` cuts them off at the
            right and bottom and stretches the map over the window, `pad` fills up with zeros on
            all sides and cuts the map.
        positions: how position embeddings are resized to another grid: `offset` is the published
            code's (bicubic, sampled at steps of (n + 0.1) / g), `antialias` is open_clip's.
        logit_scale: factor on cosines before the softmax.
        threshold: best class probability below which a pixel becomes background, 0 for never.
        area: share of the foreground up to which a class is removed from an image, 0 for none.
        pamr: refinement of the maps by the image: `off`, `naclip` (10 iterations, dilations 8 16)
            or `original` (10 iterations, dilations 1 2 4 8 12 24).
    """

    name: str
    dataset: str
    split: str
    labels: str
    background: bool
    classes: int
    classes_sha256: str
    templates: str
    templates_sha256: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    short: int
    cap: int
    window: int
    stride: int
    remainder: Remainder
    positions: Positions
    logit_scale: float
    threshold: float
    area: float
    pamr: Pamr

    @property
    def hash(self) -> str:
        """12 hex digits over all fields but the names of the protocol and the templates."""
        values = dataclasses.asdict(self)
        del values["name"], values["templates"]
        return config_hash(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the hash for a result file."""
        fields = dataclasses.asdict(self)
        return {"name": fields.pop("name"), "hash": self.hash, **fields}


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark with one of its protocols, its classes and prompts, ready to be run."""

    benchmark: Benchmark
    protocol: Protocol
    classes: ClassList
    templates: list[Callable[[str], str]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; class 0 is called background where it is one.

        Its queries may be words such as sky and wall, so that its first query is no name.
        """
        first = ("background",) if self.benchmark.background else self.classes.names[:1]
        return (*first, *self.classes.names[1:])


def _data_file(value: object, kind: str, suffix: str, yaml: Path) -> Path:
    """Find a file named in a YAML: a name below `configs/`, or a path seen from the YAML."""
    name = str(value)
    if name.endswith(suffix):
        return config_file(kind, str(yaml.parent / name), suffix, f"{yaml}: {kind}")
    return config_file(kind, name, suffix)


def _read_benchmark(values: dict[str, Any], yaml: Path, split: str | None) -> Benchmark:
    where = str(yaml)
    missing = dataclasses.MISSING
    for field in dataclasses.fields(Benchmark):
        if field.default is missing and field.default_factory is missing:
            _need(field.name, values, where)
    values["classes"] = _data_file(values["classes"], "classes", ".txt", yaml)
    if values.get("palette") is not None:
        values["palette"] = _data_file(values["palette"], "palettes", ".csv", yaml)
    values["images"] = {
        name: int(number(count, f"images.{name}", where, 1, whole=True))
        for name, count in mapping(values["images"], "images", where).items()
    }
    for key in ("folders", "download", "traps"):
        values[key] = texts(values.get(key, []), key, where)
    values["also"] = mapping(values["also"], "also", where) if "also" in values else {}
    values["split"] = split or values["split"]
    benchmark = strict(Benchmark, values, where)
    if not isinstance(benchmark.background, bool):
        raise UserError(f"{where}: background is {benchmark.background!r}; give true or false")
    for key in ("dataset", "title", "layout", "folder", "split", "labels"):
        if not isinstance(getattr(benchmark, key), str):
            raise UserError(f"{where}: {key} is {getattr(benchmark, key)!r}; give text")
    for layout, labels in [(benchmark.layout, benchmark.labels), *benchmark.also.items()]:
        choice(layout, "layout", where, tuple(READERS))
        choice(labels, "labels", where, tuple(LABEL_RULES))
    return benchmark


def _need(key: str, values: Mapping[str, object], where: str) -> None:
    if key not in values:
        raise UserError(f"{where}: key '{key}' is missing")


def _check(protocol: Protocol, where: str) -> None:
    choice(protocol.remainder, "remainder", where, get_args(Remainder))
    choice(protocol.positions, "positions", where, get_args(Positions))
    choice(protocol.pamr, "pamr", where, get_args(Pamr))
    lookup(protocol.labels, protocol.classes)  # a table of another length raises
    if protocol.window and not 1 <= protocol.stride <= protocol.window:
        raise UserError(
            f"{where}: stride {protocol.stride} leaves gaps between windows of {protocol.window}; "
            f"use 1..{protocol.window}"
        )
    if protocol.logit_scale == 0:
        raise UserError(f"{where}: logit_scale is 0, which makes all classes equal; such as 40")
    if min(protocol.std) <= 0:
        raise UserError(f"{where}: std is {protocol.std}; all three must be above 0")
    if (protocol.threshold or protocol.area) and not protocol.background:
        raise UserError(
            f"{where}: threshold {protocol.threshold:g} and area {protocol.area:g}: "
            f"{protocol.dataset} has no background class that they could assign (class 0 is a "
            "real one); set both to 0, or leave {protocol.dataset} out"
        )


def _checked_numbers(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings with numbers in one form, so that 40 and 40.0 have one hash."""
    checked = dict(values)
    for key, low in (("short", 1), ("cap", 1), ("window", 0), ("stride", 0)):
        if key in checked:
            checked[key] = int(number(checked[key], key, where, low, whole=True))
    for key, most in (("logit_scale", math.inf), ("threshold", 1.0), ("area", 1.0)):
        if key in checked:
            checked[key] = number(checked[key], key, where, 0.0, most)
    if checked.get("pamr") is False:
        checked["pamr"] = "off"  # YAML reads the bare word as a truth value
    for key in ("mean", "std"):
        if key in checked:
            checked[key] = triple(checked[key], key, where)
    return checked


FROM_BENCHMARK = (
    "name", "dataset", "split", "labels", "background",
    "classes", "classes_sha256", "templates_sha256",
)  # fmt: skip
SETTINGS = tuple(f.name for f in dataclasses.fields(Protocol) if f.name not in FROM_BENCHMARK)


def _make_protocol(
    name: str,
    values: Mapping[str, Any],
    benchmark: Benchmark,
    classes: ClassList,
    template_texts: list[str],
    where: str,
) -> Protocol:
    checked = _checked_numbers(values, where)
    for key in checked:
        if key not in SETTINGS:
            known = (*SETTINGS, "classes")
            raise UserError(f"{where}: unknown key '{key}'; {nearest(key, known)}")
    for key in SETTINGS:
        _need(key, checked, where)
    from_benchmark = {
        "name": name,
        "dataset": benchmark.dataset,
        "split": benchmark.split,
        "labels": benchmark.labels,
        "background": benchmark.background,
        "classes": len(classes.names),
        "classes_sha256": classes.sha256,
        "templates_sha256": hashlib.sha256("\n".join(template_texts).encode()).hexdigest(),
    }
    protocol = strict(Protocol, {**checked, **from_benchmark}, where)
    _check(protocol, where)
    return protocol


def _find_templates(value: object, yaml: Path) -> list[Callable[[str], str]]:
    name = str(value)
    return templates(str(yaml.parent / name) if name.endswith(".txt") else name)


def _find_classes(value: object, benchmark: Benchmark, yaml: Path, where: str) -> ClassList:
    """Read the class file of a protocol; it may rename the benchmark's classes, not drop one."""
    own = read_classes(benchmark.classes)
    if value is None:
        return own
    # A comma list from the command line is taken as it is.
    listed = "," in str(value)
    file = str(value) if listed else _data_file(value, "classes", ".txt", yaml)
    classes = read_classes(file)
    if len(classes) != len(own):
        raise UserError(
            f"{where}: class {'list' if listed else 'file'} {file} has {len(classes)} classes, "
            f"{benchmark.dataset} has {len(own)}; write one class a line in the order of "
            f"{benchmark.classes}"
        )
    return classes


def refuse_doubles(classes: ClassList, where: str) -> None:
    """Refuse class names given twice: results are named by them.

    Raises:
        UserError: with the places of the first such name, counted from 1.
    """
    for name in classes.names:
        places = [i + 1 for i, other in enumerate(classes.names) if other == name]
        if len(places) > 1:
            raise UserError(
                f"{where}: class '{name}' stands at places {', '.join(map(str, places))}; name "
                "each class once (more words for one class go on its line, separated by ', ')"
            )


def _split_name(name: str, overrides: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """Split `sclip+threshold=0.2` into the name and its changes; `overrides` are added."""
    first, *parts = name.split("+")
    changes: dict[str, object] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise UserError(f"protocol '{name}': '{part}' is no KEY=VALUE, such as threshold=0.2")
        changes[key] = value
    return first, {**changes, **overrides}


def _override(
    settings: Mapping[str, Any], changes: Mapping[str, object], where: str
) -> tuple[dict[str, Any], str]:
    """Replace single values of a protocol; returns the settings and the suffix of its name."""
    merged = dict(settings)
    words = []
    for key in sorted(changes):
        known = (*SETTINGS, "classes")
        if key not in known:
            raise unknown("protocol key", key, known)
        value = changes[key]
        if key in ("classes", "templates"):
            name = str(value)  # a path is seen from here, not from the protocol file
            if name.endswith(".txt") and not Path(name).is_file():
                raise UserError(f"--{key} {name} does not exist")
            value = str(Path(name).resolve()) if name.endswith(".txt") else name
            written = Path(name).stem
        else:
            value = parsed(value)
            listed = list(value) if isinstance(value, list | tuple) else [value]
            value = listed if isinstance(value, list | tuple) else value
            written = ",".join(f"{v:.12g}" if isinstance(v, float) else str(v) for v in listed)
        before = _checked_numbers({key: settings[key]}, where)[key] if key in settings else None
        if _checked_numbers({key: value}, where)[key] == before:
            continue  # nothing changes, neither hash nor name
        merged[key] = value
        words.append(f"+{key}={written}")
    return merged, "".join(words)


def read_task(
    dataset: str,
    protocol: str | None = None,
    split: str | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Task:
    """Read a benchmark and one of its protocols.

    Args:
        dataset: name of a file in `configs/protocols`, or the path of such a YAML file. Class,
            template and palette files in it are names, or paths seen from the YAML's folder.
        protocol: name of a protocol in it, None for the first; changes may follow in the form in
            which results write them, such as `sclip+threshold=0.2`.
        split: another split than the file's own.
        overrides: protocol keys -> values that replace the file's (texts such as `0.2` are read as
            numbers). They change the hash, and the name becomes `sclip+threshold=0.2`.

    Raises:
        UserError: an unknown name or key (nearest names first), a missing key, a value out of
            range, a class file of another length, a threshold without a background class.
    """
    yaml = config_file("protocols", dataset, ".yaml", "data set")
    values = read_yaml(yaml)
    protocols = mapping(values.pop("protocols", None), "protocols", str(yaml))
    name, changes = _split_name(protocol or next(iter(protocols)), overrides or {})
    if name not in protocols:
        raise unknown(f"protocol of {dataset}", name, protocols)
    benchmark = _read_benchmark(values, yaml, split)
    where = f"{yaml}: protocols.{name}"
    settings = mapping(protocols[name], f"protocols.{name}", str(yaml))
    settings, suffix = _override(settings, changes, f"protocol {name} of {dataset}")
    if suffix:
        name, where = name + suffix, f"protocol {name}{suffix} of {benchmark.dataset}"
    classes = _find_classes(settings.pop("classes", None), benchmark, yaml, where)
    refuse_doubles(classes, where)
    prompts = _find_templates(settings.get("templates", "openai"), yaml)
    prompt_texts = [prompt("{}") for prompt in prompts]
    return Task(
        benchmark=benchmark,
        protocol=_make_protocol(name, settings, benchmark, classes, prompt_texts, where),
        classes=classes,
        templates=prompts,
    )
