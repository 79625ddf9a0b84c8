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

Remainder = Literal["drop"]
Pamr = Literal["off"]


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
            right and bottom and stretches the map over the window.
        logit_scale: factor on cosines before the softmax.
        threshold: best class probability below which a pixel becomes background, 0 for never.
        area: share of the foreground up to which a class is removed from an image, 0 for none.
        pamr: refinement of the maps by the image, `off`.
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


def _number(
    value: object, key: str, where: str, low: float, high: float = math.inf, *, whole: bool = False
) -> float:
    number = math.nan
    if isinstance(value, int if whole else int | float) and not isinstance(value, bool):
        number = value
    if not low <= number <= high or math.isinf(number):
        kind = "whole number" if whole else "number"
        limits = f"from {low:g} on" if math.isinf(high) else f"within {low:g}..{high:g}"
        raise UserError(f"{where}: {key} is {value!r}; give a {kind} {limits}")
    return int(number) if whole else float(number)


def _triple(value: object, key: str, where: str) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise UserError(f"{where}: {key} is {value!r}; give three numbers, red green blue")
    red, green, blue = (_number(v, key, where, 0.0) for v in value)
    return red, green, blue


def _choice(value: object, key: str, where: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{where}: {key} is {value!r}; {nearest(str(value), known)}")


def _mapping(value: object, key: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where}: {key} must be a mapping with at least one entry")
    return {str(k): v for k, v in value.items()}


def _data_file(value: object, kind: str, suffix: str, yaml: Path) -> Path:
    """Find a file named in a YAML: a name below `configs/`, or a path seen from the YAML."""
    name = str(value)
    if name.endswith(suffix):
        return config_file(kind, str(yaml.parent / name), suffix, f"{yaml}: {kind}")
    return config_file(kind, name, suffix)


def _read_benchmark(values: dict[str, Any], yaml: Path, split: str | None) -> Benchmark:
    where = str(yaml)
    needed = [f.name for f in dataclasses.fields(Benchmark) if f.default is dataclasses.MISSING]
    for key in needed:
        if key not in values:
            raise UserError(f"{where}: key '{key}' is missing")
    values["classes"] = _data_file(values["classes"], "classes", ".txt", yaml)
    if values.get("palette") is not None:
        values["palette"] = _data_file(values["palette"], "palettes", ".csv", yaml)
    values["images"] = {
        name: int(_number(count, f"images.{name}", where, 1, whole=True))
        for name, count in _mapping(values["images"], "images", where).items()
    }
    values["split"] = split or values["split"]
    benchmark = strict(Benchmark, values, where)
    if not isinstance(benchmark.background, bool):
        raise UserError(f"{where}: background is {benchmark.background!r}; give true or false")
    for key in ("dataset", "title", "layout", "folder", "split", "labels"):
        if not isinstance(getattr(benchmark, key), str):
            raise UserError(f"{where}: {key} is {getattr(benchmark, key)!r}; give text")
    _choice(benchmark.layout, "layout", where, tuple(READERS))
    _choice(benchmark.labels, "labels", where, tuple(LABEL_RULES))
    return benchmark


def _check(protocol: Protocol, where: str) -> None:
    _choice(protocol.remainder, "remainder", where, get_args(Remainder))
    _choice(protocol.pamr, "pamr", where, get_args(Pamr))
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
            "real one); set both to 0"
        )


def _make_protocol(
    name: str,
    values: dict[str, Any],
    benchmark: Benchmark,
    classes: ClassList,
    template_texts: list[str],
    where: str,
) -> Protocol:
    checked = dict(values)
    for key, low in (("short", 1), ("cap", 1), ("window", 0), ("stride", 0)):
        if key in checked:
            checked[key] = int(_number(checked[key], key, where, low, whole=True))
    for key, most in (("logit_scale", math.inf), ("threshold", 1.0), ("area", 1.0)):
        if key in checked:
            checked[key] = _number(checked[key], key, where, 0.0, most)
    if checked.get("pamr") is False:
        checked["pamr"] = "off"  # YAML reads the bare word as a truth value
    for key in ("mean", "std"):
        if key in checked:
            checked[key] = _triple(checked[key], key, where)
    from_file = {
        "name": name,
        "dataset": benchmark.dataset,
        "split": benchmark.split,
        "labels": benchmark.labels,
        "background": benchmark.background,
        "classes": len(classes.names),
        "classes_sha256": classes.sha256,
        "templates_sha256": hashlib.sha256("\n".join(template_texts).encode()).hexdigest(),
    }
    settings = [f.name for f in dataclasses.fields(Protocol) if f.name not in from_file]
    for key in checked:
        if key not in settings:
            raise UserError(f"{where}: unknown key '{key}'; {nearest(key, settings)}")
    for key in settings:
        if key not in checked:
            raise UserError(f"{where}: key '{key}' is missing")
    protocol = strict(Protocol, {**checked, **from_file}, where)
    _check(protocol, where)
    return protocol


def _find_templates(value: object, yaml: Path) -> list[Callable[[str], str]]:
    name = str(value)
    return templates(str(yaml.parent / name) if name.endswith(".txt") else name)


def read_task(dataset: str, protocol: str | None = None, split: str | None = None) -> Task:
    """Read a benchmark and one of its protocols.

    Args:
        dataset: name of a file in `configs/protocols`, or the path of such a YAML file. Class,
            template and palette files in it are names, or paths seen from the YAML's folder.
        protocol: name of a protocol in it; None for the first.
        split: another split than the file's own.

    Raises:
        UserError: an unknown name or key (nearest names first), a missing key, a value out of
            range, a threshold without a background class.
    """
    yaml = config_file("protocols", dataset, ".yaml", "data set")
    values = read_yaml(yaml)
    protocols = _mapping(values.pop("protocols", None), "protocols", str(yaml))
    name = next(iter(protocols)) if protocol is None else protocol
    if name not in protocols:
        raise unknown(f"protocol of {dataset}", name, protocols)
    benchmark = _read_benchmark(values, yaml, split)
    classes = read_classes(benchmark.classes)
    where = f"{yaml}: protocols.{name}"
    settings = _mapping(protocols[name], f"protocols.{name}", str(yaml))
    prompts = _find_templates(settings.get("templates", "openai"), yaml)
    texts = [prompt("{}") for prompt in prompts]
    return Task(
        benchmark=benchmark,
        protocol=_make_protocol(name, settings, benchmark, classes, texts, where),
        classes=classes,
        templates=prompts,
    )
